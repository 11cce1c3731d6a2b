"""A run on kernels is the run without, but for rounding; and goes on bit for bit with those it began with."""

import pytest
import torch

from tests.equivalence.conftest import curve, weights
from tuner.errors import UserError
from tuner.models.kernels import compiled
from tuner.training.step import Step

EVALUATED = {"data.split.validation": 0.2, "evaluation.every": 2}
HALVES = {"adapter": None, "optimizer.lr": 1e-3, "checkpoint.every": 2, "max_steps": 4, **EVALUATED}


@pytest.fixture(autouse=True)
def _aot_eager(monkeypatch):
    """Compiled graphs without code that is made of them, which takes longer than the runs."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()


def test_a_chosen_kernel_computes_the_same_run_and_stays(small, train):
    plain = train(small(HALVES), "plain")
    chosen = small({**HALVES, "kernels": "auto"})
    whole = train(chosen, "whole")
    assert whole.read_json("kernels") == {
        "names": ["compile"],
        "left_out": {"liger": "does what compile does"},
    }
    assert (
        "kernels: compile (left out: liger does what compile does)" in (whole.folder / "log.txt").read_text()
    )
    losses = [[record["loss"] for record in run.metrics] for run in (whole, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert not (plain.folder / "kernels.json").exists()

    with pytest.MonkeyPatch.context() as patch:
        _stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(chosen, "parts")
    with pytest.raises(UserError, match="kernels was 'auto' and is now 'plain'"):
        train(small(HALVES), "parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "unavailable", lambda device: "has no compiler")
        with pytest.raises(UserError, match='kernels: "compile" has no compiler'):
            train(chosen, "parts")
    resumed = train(chosen, "parts")
    assert curve(resumed) == curve(whole)
    assert all(torch.equal(weight, weights(resumed)[name]) for name, weight in weights(whole).items())


def _stop_after(patch, steps):
    finish = Step.finish

    def stopped(self):
        finish(self)
        if self.index + 1 == steps:
            raise KeyboardInterrupt

    patch.setattr(Step, "finish", stopped)


def test_all_roles_of_ppo_are_computed_by_the_kernel(ppo, train):
    """Policy, reference, critic and reward model on one base: losses, ratio and scores are those of the plain run."""
    changes = {"max_steps": 1, "critic_warmup": 0, "update_epochs": 1}
    plain = train(ppo(changes), "plain")
    fast = train(ppo({**changes, "kernels": ["compile"]}), "compiled")
    assert fast.read_json("kernels")["names"] == ["compile"]
    names = ("policy_loss", "value_loss", "ratio", "score", "kl")
    for record, other in zip(fast.metrics, plain.metrics, strict=True):
        for name in names:
            assert record[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
