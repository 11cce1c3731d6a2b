"""A step's sums, means and updates, by hand; and what the loop takes from any stage's config."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.equivalence.conftest import SMALL
from tuner.config import DPO, Evaluation, Model, Preferences, override
from tuner.data.stream import Contents
from tuner.training.devices import Devices, sum_by_name
from tuner.training.loop_settings import LoopSettings
from tuner.training.step import Step
from tuner.training.updater import UpdateResult


class Recorder:
    """An updater that steps nothing, and the loop's part of finishing."""

    def __init__(self) -> None:
        self.applied: list[tuple[int, dict[tuple[str, str], float], tuple[str, ...]]] = []
        self.finished: list[Step] = []
        self.of_other_rank: dict[tuple[str, str], float] = {}

    def apply(
        self, step: int, sums: Mapping[tuple[str, str], torch.Tensor], sets: Sequence[str]
    ) -> UpdateResult:
        values = {name: value.item() for name, value in sums.items()}
        self.applied.append((step, values, tuple(sets)))
        values = sum_by_name([values, self.of_other_rank])
        return UpdateResult(values, {"all": 2.0}, applied=len(self.applied) < 3)


@pytest.fixture
def updater() -> Recorder:
    return Recorder()


@pytest.fixture
def step(updater: Recorder) -> Step:
    contents = Contents(epoch=1, totals={"tokens": 4.0, "pairs": 2.0}, metrics={"fill": 0.5})
    return Step(7, contents, Devices(device="cpu"), updater, updater.finished.append, lambda _: None)


def test_sums_are_divided_by_their_totals_and_losses_are_backpropagated(step, updater):
    weight = torch.tensor(3.0, requires_grad=True)
    step.add(weight * 8, per="tokens", name="ce")
    step.add(weight * 2, per="pairs", name="penalty", factor=0.5)
    step.backward()
    step.note("accuracy", torch.tensor(1.0), per="pairs")
    step.finish()
    assert weight.grad == 8 / 4 + 0.5 * 2 / 2
    per_token = {("loss", "tokens"): 7.5, ("ce", "tokens"): 6.0}
    per_pair = {("penalty", "pairs"): 3.0, ("accuracy", "pairs"): 0.5}
    assert updater.applied == [(7, per_token | per_pair, ())]
    assert updater.finished == [step]
    assert step.finished
    assert step.grad_norms == {"all": 2.0}


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_the_gradient_of_a_head_in_fp32_is_not_rounded(step, is_checkpointed):
    """A role is open, and with it autocast, until the backward pass is done; its products in bf16 stay in bf16."""
    torch.manual_seed(1)
    layer, head = torch.nn.Linear(64, 64), torch.nn.Linear(64, 1, bias=False)
    rows, passes = torch.randn(8, 64), []

    def body(rows: torch.Tensor) -> torch.Tensor:
        passes.append(torch.is_autocast_enabled("cpu"))
        return layer(rows)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = checkpoint(body, rows, use_reentrant=False) if is_checkpointed else body(rows)
        with torch.autocast("cpu", enabled=False):
            scores = head(hidden.float())
        step.add((scores**2).sum(), per="pairs")
        step.backward()
        assert torch.is_autocast_enabled("cpu")
    exact = (scores * hidden.float()).sum(0, keepdim=True)  # of half the sum of squares
    torch.testing.assert_close(head.weight.grad, exact, rtol=1e-6, atol=1e-6)
    assert hidden.dtype == torch.bfloat16
    assert passes == [True] * (2 if is_checkpointed else 1)
    assert layer.weight.grad.dtype == torch.float32


def test_means_over_updates_are_weighted_by_their_totals(step, updater):
    for total, loss_sum in ((4.0, 8.0), (1.0, 7.0)):
        step.totals = {"tokens": total}
        step.add(torch.tensor(loss_sum), per="tokens")
        step.update("policy")
    step.finish()
    assert step.means() == {"loss": (8 + 7) / 5}
    assert [sets for _, _, sets in updater.applied] == [("policy",)] * 2, "finish makes no further update"
    assert step.is_finite


def test_another_rank_may_count_names_and_divisors_that_this_one_does_not(step, updater):
    """As where one has answers and replayed rows, and the other replayed rows alone."""
    updater.of_other_rank = {("loss", "tokens"): 0.25, ("policy_loss", "tokens"): 0.25}
    step.add(torch.tensor(1.0), per="pairs")
    step.finish()
    assert step.updates == [{"loss": (0.75, 4.0), "policy_loss": (0.25, 4.0)}]


def test_the_order_in_which_terms_are_counted_does_not_choose_the_divisor(step):
    """Replayed rows alone in one update, and before the answers' in the next."""
    step.totals = {"tokens": 4.0, "pairs": 2.0}
    step.add(torch.tensor(2.0), per="pairs")
    step.update()
    step.add(torch.tensor(2.0), per="pairs")
    step.add(torch.tensor(8.0), per="tokens")
    step.update()
    assert step.updates == [{"loss": (1.0, 2.0)}, {"loss": (3.0, 4.0)}]


def test_one_update_that_is_not_applied_spoils_the_step(step):
    for _ in range(4):
        step.update()
    assert not step.is_finite


def test_parts_of_a_name_add_up_beside_the_contents_own_metrics(step):
    for _ in range(2):
        with step.part("generate"):
            pass
    assert step.metrics.keys() == {"fill", "seconds/generate"}
    assert step.metrics["seconds/generate"] > 0


def test_settings_are_read_from_any_stage():
    config = override(SMALL, {"max_steps": 5, "max_bad_steps": 2, "evaluation.every": 3})
    settings = LoopSettings.of(config)
    assert (settings.optimizer, settings.schedule, settings.max_steps) == (
        config.optimizer,
        config.schedule,
        5,
    )
    assert settings.max_bad_steps == 2
    dpo = LoopSettings.of(DPO(model=Model(path="x"), data=Preferences(files=("x.jsonl",))))
    assert dpo.max_bad_steps == 1, "TRL skips no step"


@pytest.mark.parametrize(
    ("every", "due"), [(None, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 21]), (8, [8, 16, 21])]
)
def test_evaluations_are_as_often_as_is_said_and_one_at_the_end(every, due):
    settings = LoopSettings.of(SMALL)
    settings = LoopSettings(
        settings.optimizer, settings.schedule, settings.checkpoint, Evaluation(every=every)
    )
    assert [step for step in range(1, 22) if settings.evaluates_at(step, 21, 2)] == due
