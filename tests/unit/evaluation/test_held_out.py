"""Held-out rows: loss by hand, answers scored against the data's own."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.equivalence.conftest import SMALL
from tests.whole_models import full_logits
from tuner.config import override
from tuner.data.load_examples import load_examples
from tuner.evaluation.held_out_chat import HeldOutRows, load_score
from tuner.models.generate import Answer
from tuner.models.load import load_model
from tuner.models.roles import Roles
from tuner.training.devices import Devices

SCORED = override(
    SMALL,
    {
        "data.test_files": ["tuner:sums/test.jsonl"],
        "evaluation.score": "exact",
        "evaluation.max_new_tokens": 6,
        "evaluation.samples": 2,
        "data.limit": 12,
    },
)


ENDS = frozenset({2, 2047})


@pytest.fixture(scope="module")
def scene():
    loaded = load_model(SCORED.model, precision="fp32", device=torch.device("cpu"))
    roles = Roles.of("policy", loaded, lambda: torch.autocast("cpu", enabled=False))
    return load_examples(SCORED.data, loaded.tokenizer).train, roles, Devices.of(SCORED)


@pytest.mark.parametrize("tokens_per_pass", [64, 4096])
def test_loss_is_the_weighted_mean_over_tokens(scene, tokens_per_pass):
    examples, roles, devices = scene
    rows = HeldOutRows(examples, roles, devices, SCORED.evaluation, tokens_per_pass, ENDS)
    total = weight = 0.0
    from tuner.data.batch import make_batch

    for index in range(len(examples)):
        batch = make_batch([examples.example(index)])
        with torch.no_grad():
            logprobs = full_logits(roles.loaded.model, batch).log_softmax(-1)[batch.learned_N - 1]
        picked = logprobs.gather(-1, batch.tokens_T[batch.learned_N][:, None])[:, 0]
        total -= float((picked * batch.weights_N).sum())
        weight += float(batch.weights_N.sum())
    assert rows.loss() == pytest.approx(total / weight, rel=1e-5)


def answers(contents):
    return [
        Answer(np.array([*tokens, 2], np.int32), ended=True, logprobs=np.zeros(len(tokens) + 1, np.float32))
        for tokens in contents
    ]


def test_an_answer_equal_to_the_reference_scores_one(scene, monkeypatch):
    examples, roles, devices = scene
    from tuner.evaluation import held_out_chat as held_out

    right = [examples.reference(row)[:-1].tolist() for row in range(len(examples))]  # without the end token
    monkeypatch.setattr(held_out, "generate", lambda *_, **__: answers(right))
    assert HeldOutRows(examples, roles, devices, SCORED.evaluation, 512, ENDS).score() == 1.0
    wrong = [*right[:-3], [5], [5], [5]]
    monkeypatch.setattr(held_out, "generate", lambda *_, **__: answers(wrong))
    assert HeldOutRows(examples, roles, devices, SCORED.evaluation, 512, ENDS).score() == pytest.approx(
        9 / 12
    )


def test_without_rows_there_is_nothing_to_say(scene):
    _, roles, devices = scene
    rows = HeldOutRows(None, roles, devices, SCORED.evaluation, 512, ENDS)
    assert rows.loss() is None
    assert rows.score() is None
    assert rows.samples() == []


def test_samples_leave_training_and_its_generators_as_they_were(scene):
    examples, roles, devices = scene
    with roles.role("policy", train=True):
        pass
    state = torch.get_rng_state()
    samples = HeldOutRows(examples, roles, devices, SCORED.evaluation, 512, ENDS).samples()
    assert len(samples) == SCORED.evaluation.samples
    assert torch.equal(state, torch.get_rng_state())
    assert "<|im_start|>user" in samples[0].prompt
    assert samples[0].reference.removesuffix(".").split()[-1].isdigit()


def starts_alike(answer: str, reference: str) -> float:
    return float(answer[:1] == reference[:1])


def test_scores_by_name_and_by_function():
    assert load_score(None) is None
    assert load_score("exact")("4", "4") == 1.0
    assert load_score("exact")("4", "5") == 0.0
    mine = load_score(f"{Path(__file__)}:starts_alike")
    assert mine("42", "41") == 1.0
    assert not math.isnan(mine("", ""))
