"""Learning rates against numbers worked out by hand."""

import json
import math

import pytest

from tuner.config import SFT, Chat, Constant, Cosine, Linear, Model, from_json, override, to_json
from tuner.errors import UserError
from tuner.training.schedules import learning_rate, warmup_steps

CONFIG = SFT(model=Model(path="tuner:tiny"), data=Chat(files=("rows.jsonl",), template="internlm2"))


def rates(schedule, total, peak=1.0):
    return [learning_rate(schedule, peak, step, total) for step in range(total)]


def test_cosine_by_hand():
    # 1 step of warm-up, then done = 0, 1/4, 2/4, 3/4 of half a cosine
    expected = [1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    assert rates(Cosine(warmup=1), 5) == pytest.approx(expected)


def test_linear_with_a_floor_by_hand():
    assert rates(Linear(warmup=0, final=0.2), 4) == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_constant_after_warmup_from_a_start():
    assert rates(Constant(warmup=2, warmup_start=0.5), 4, peak=2.0) == pytest.approx([1.5, 2.0, 2.0, 2.0])


def test_a_run_of_one_step_learns():
    assert rates(Cosine(), 1) == rates(Linear(), 1) == [1.0]


def test_warmup_is_a_share_below_one_and_steps_above():
    assert warmup_steps(Cosine(warmup=0.03), 1000) == 30
    assert warmup_steps(Cosine(warmup=10), 1000) == 10
    assert warmup_steps(Cosine(warmup=10), 4) == 3
    assert warmup_steps(Cosine(warmup=0.9), 1000) == 900
    assert warmup_steps(Cosine(warmup=0.03), 10) == 0


@pytest.mark.parametrize(
    ("warmup", "message"), [(1.0, "one step or all steps"), (1.5, "1.5 is not whole: write 2")]
)
def test_a_warmup_that_could_mean_two_things_is_refused(warmup, message):
    for change in (warmup, json.dumps(warmup)):
        with pytest.raises(UserError, match=f"override: schedule.warmup: .*{message}"):
            override(
                CONFIG, {"schedule.warmup": warmup} if change is warmup else [f"schedule.warmup={change}"]
            )


def test_one_step_of_warmup_stays_one_step_in_json():
    config = override(CONFIG, ["schedule.warmup=1"])
    again = from_json(to_json(config))
    assert again == config
    assert warmup_steps(again.schedule, 1000) == 1


@pytest.mark.parametrize(("kind", "expected"), [(Cosine, 0.171), (Linear, 0.235)])
def test_the_last_step_is_where_the_field_says(kind, expected):
    last = rates(kind(warmup=0, final=0.15), 10)[-1]
    assert f"n=10 at {expected}" in " ".join(kind.model_fields["final"].description.split())
    assert last == pytest.approx(expected, abs=5e-4)


def test_internlm2_recipe_ends_at_its_floor():
    recipe = Cosine(warmup=0.025, warmup_start=1 / 40, final=0.15)  # facts/internlm2.md, section 1
    curve = rates(recipe, 400, peak=4e-5)
    assert max(curve) == pytest.approx(4e-5)
    assert 6e-6 < curve[-1] < 6.01e-6
    assert curve[0] == pytest.approx(4e-5 * (1 / 40 + 39 / 40 / 10))
