"""How many steps and passes a number of pairs makes: by hand, and as transformers counts them (tests/oracle)."""

import pytest

from tuner.errors import UserError
from tuner.training.pair_plan import PairPlan

CONFIG = {"pairs_per_step": 8, "pairs_per_pass": 2, "epochs": 1.0}


@pytest.mark.parametrize(
    ("changes", "pairs", "processes", "steps", "passes", "seen"),
    [
        ({}, 16, 1, 2, 8, 16),
        ({}, 17, 1, 3, 9, 17),  # a step of one pair
        ({"epochs": 2.0}, 17, 1, 6, 18, 34),
        ({"epochs": 1.5}, 17, 1, 5, 17, 33),  # the second epoch's first two steps
        ({"max_steps": 2}, 17, 1, 2, 8, 16),
        ({"max_steps": 9}, 17, 1, 3, 9, 17),  # the epochs are over before
        ({}, 16, 2, 2, 8, 16),
        ({}, 17, 2, 3, 10, 17),  # both take part in the last step
        ({}, 1, 1, 1, 1, 1),
    ],
)
def test_counts(changes: dict, pairs: int, processes: int, steps: int, passes: int, seen: int) -> None:
    plan = PairPlan(pairs=pairs, processes=processes, **(CONFIG | changes))
    assert (plan.steps, plan.passes, plan.seen) == (steps, passes, seen)


def test_processes_must_fill_a_step() -> None:
    with pytest.raises(
        UserError, match=r"pairs_per_step \(8\) is not a multiple of pairs_per_pass \(2\) times 3"
    ):
        _ = PairPlan(pairs=100, processes=3, **CONFIG).passes_per_step
