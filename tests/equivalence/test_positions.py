"""Loss by position of rows that are long: as transformers has it of each row alone."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tuner.models  # noqa: F401 (registers InternLM2)
from tests.equivalence.conftest import SHALLOW, SMALL
from tuner.data.examples import Collector, Examples, Sample
from tuner.evaluation.position_loss import HeldOutReplay, RangeLoss, mean_loss
from tuner.models.load import load_model
from tuner.models.roles import Roles
from tuner.training.devices import Devices

RANGES = [(0, 256), (256, 512), (512, 1024), (1024, 2048)]
LENGTHS = [90, 1500, 256, 257, 700, 1025, 513, 512]
"""Rows that end inside a range, at its last position, and at the first of the next."""


def rows() -> list[Sample]:
    """Random tokens with many weights, the largest at the borders of the ranges."""
    draw, found = np.random.default_rng(0), []
    for length in LENGTHS:
        weights_T = draw.choice([0, 0.25, 1, 2.5], length).astype(np.float32)
        for border in (border for border, _ in RANGES[1:] if border < length):
            weights_T[border - 1 : border + 1] = 3, 7
        weights_T[0] = 0
        found.append((draw.integers(3, 2000, length).astype(np.int32), weights_T))
    return found


def examples(samples: list[Sample]) -> Examples:
    collector = Collector()
    for line, sample in enumerate(samples, 1):
        collector.add(sample, 0, "rows.jsonl", line)
    found = collector.finish()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def roles() -> Roles:
    loaded = load_model(SMALL.model, precision="fp32", device=torch.device("cpu"), train=False)
    return Roles.of("policy", loaded, Devices.of(SMALL).autocast)


@pytest.fixture(scope="module")
def expected() -> list[RangeLoss]:
    """Token by token, from the logits of one row at a time."""
    model = AutoModelForCausalLM.from_pretrained(SHALLOW, dtype=torch.float32, attn_implementation="sdpa")
    sums, weights = dict.fromkeys(RANGES, 0.0), dict.fromkeys(RANGES, 0.0)
    for tokens, weights_T in rows():
        tokens_T = torch.from_numpy(tokens).long()
        with torch.no_grad():
            logits = model(input_ids=tokens_T[None], use_cache=False).logits[0, :-1].double()
        losses_T = -logits.log_softmax(-1).gather(-1, tokens_T[1:, None])[:, 0]
        for position in range(1, len(tokens)):
            (place,) = [(start, end) for start, end in RANGES if start <= position < end]
            sums[place] += float(losses_T[position - 1]) * float(weights_T[position])
            weights[place] += float(weights_T[position])
    return [RangeLoss(*place, sums[place], weights[place]) for place in RANGES]


@pytest.mark.parametrize("tokens_per_pass", [256, 3000, 8192])
def test_loss_by_position_is_that_of_each_row_alone(roles, expected, tokens_per_pass):
    """A pass of 256 tokens is as long as the longest row; in one of 8,192 stand all rows together."""
    found = HeldOutReplay(examples(rows()), roles, Devices.of(SMALL), tokens_per_pass).losses_by_position()
    assert [(one.start, one.end) for one in found] == RANGES
    assert [one.weight for one in found] == [one.weight for one in expected]  # quarters: sums are exact
    assert [one.loss for one in found] == pytest.approx([one.loss for one in expected], abs=1e-4)
    weight = sum(one.weight for one in expected)
    assert mean_loss(found) == pytest.approx(sum(one.loss_sum for one in expected) / weight, abs=1e-4)


def test_a_range_without_a_learned_token_is_left_out(roles):
    """One token learned at a border's either side, and one far behind; nothing between."""
    tokens, weights_T = rows()[1]
    weights_T = np.zeros_like(weights_T)
    weights_T[[255, 256, 1499]] = 0.5, 2, 3
    found = HeldOutReplay(examples([(tokens, weights_T)]), roles, Devices.of(SMALL), 256).losses_by_position()
    assert [(one.start, one.end, one.weight) for one in found] == [
        (0, 256, 0.5),
        (256, 512, 2),
        (1024, 2048, 3),
    ]
