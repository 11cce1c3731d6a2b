"""The plan against every storage that a real step holds; benchmarks/plan_memory.py has more and larger cases."""

import sys
from dataclasses import replace
from typing import Any

import pytest

from tests.conftest import ROOT


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import plan_memory

    yield plan_memory
    for name in ("plan_memory", "memory_cases", "memory_steps", "live_memory", "report"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "name",
    [
        "sft: llama, all weights, bf16, recomputed",
        "sft: qwen3, QLoRA, bf16",
        "reward: internlm2, QLoRA, dropout, bf16, recomputed",
        "policy: llama, LoRA, bf16",
        "sft: llama, QLoRA, dropout, bf16, recomputed but for products",
        "critic: internlm2, QLoRA, bf16, inputs on the host",
        "reward: internlm2, QLoRA, bf16, inputs on the host, MLPs of 256 tokens",
    ],
)
def test_a_plan_is_within_five_percent(bench: Any, name: str) -> None:
    case = replace(next(case for case in bench.CASES if case.name == name), tokens=1_024)
    planned, counted = bench.measure(case)
    assert planned.peak == pytest.approx(counted.peak, rel=bench.LIMIT)
    assert planned.of_pass == pytest.approx(counted.of_pass, rel=bench.LIMIT)
    assert planned.host == counted.host
    assert (counted.host > 0) == ("on the host" in name)
    assert planned.peak > planned.of_pass > 0.2 * planned.peak


def test_the_counter_sees_what_comes_and_goes(bench: Any) -> None:
    """By hand: two tensors of 4,000 bytes and their sum, one of which goes before another comes."""
    import live_memory
    import torch

    memory = live_memory.LiveMemory()
    memory.hold([torch.zeros(1_000)])  # gone at once
    assert (memory.live, memory.peak) == (0, 4_000)
    memory.restart()
    with memory:
        first = torch.zeros(1_000)
        second = first + first
        view = second[:10]
        assert (memory.live, memory.peak) == (8_000, 8_000)
        del first, second
        assert memory.live == 4_000  # the view holds all of it
        del view
        third = torch.zeros(500)
    assert (memory.live, memory.peak) == (2_000, 8_000)
    del third
