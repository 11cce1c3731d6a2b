"""Savings are what a check with the setting says; nothing is read but shapes."""

from pathlib import Path

import pytest

from tuner.config import load_config, override
from tuner.stages.check import check
from tuner.stages.memory_savings import smallest_card

CASES: dict[str, tuple[dict[str, object], set[str]]] = {
    "internlm2_7b_lora": (
        {"tokens_per_pass": 4_096},
        {"tokens_per_pass=2048", "optimizer.bits=8", "model.quantization=nf4"},
    ),
    "internlm2_7b_reward": (
        {"gradient_checkpointing": False, "data.max_length": 1_024},
        {"gradient_checkpointing=true", "optimizer.bits=8", "tokens_per_pass=8192"},
    ),
    "internlm2_7b_dpo_qlora": ({}, {"pairs_per_pass=1"}),
    "internlm2_7b_ppo": ({"sampling.cache_gib": 24.0}, {"sampling.cache_gib=12.0"}),
}
"""Config, changes of it -> settings that must be among its savings."""


@pytest.mark.parametrize("name", CASES)
def test_a_saving_is_what_a_check_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes, expected = CASES[name]
    config = override(load_config(name), changes)
    report = check(config, shapes=True)
    assert expected <= {saving.setting for saving in report.savings}
    sizes = [saving.saved_gib for saving in report.savings]
    assert sizes == sorted(sizes, reverse=True)
    for saving in report.savings:
        again = check(override(config, [saving.setting]), shapes=True)
        assert again.peak_gib == pytest.approx(saving.peak_gib)
        assert report.peak_gib - again.peak_gib == pytest.approx(saving.saved_gib)


def test_the_smallest_card_leaves_room_for_cuda() -> None:
    assert smallest_card(11.0) == 12
    assert smallest_card(11.1) == 16
    assert smallest_card(500.0) is None
