"""What stages declare of their figures, and what is read from records by it."""

import subprocess
import sys

import pytest

from tuner.config import load_config
from tuner.config.registry import config_class
from tuner.display.policy_panels import conditions_of
from tuner.display.run_facts import RunFacts
from tuner.stages.registry import stage_of
from tuner.stages.reward.figures import FIGURES as REWARD
from tuner.stages.rl.figures import critic_warmup, figures
from tuner.training.figures import no_phase, phases_of


def test_the_critic_is_trained_alone_where_the_policy_has_no_loss() -> None:
    assert critic_warmup({"value_loss": 1.0})
    assert critic_warmup({"value_loss": 1.0, "policy_loss": None})
    assert not critic_warmup({"value_loss": 1.0, "policy_loss": 0.0})
    assert not critic_warmup({"value_loss": None, "policy_loss": None}), "skipped: nothing was trained"


def test_a_skipped_step_belongs_to_the_phase_before_it() -> None:
    warm, skip, trained = ({"phase": "warm", "loss": 1.0}, {"loss": None}, {"phase": "", "loss": 1.0})
    names = phases_of([skip, warm, skip, trained, skip], lambda record: str(record.get("phase", "")))
    assert names == ["warm", "warm", "warm", "", ""]
    assert phases_of([skip, skip], no_phase) == ["", ""]


def test_conditions_come_in_the_order_of_the_records() -> None:
    records = [
        {"step": 1, "score": 0.0},
        {"score/b": 1.0, "reward/c": 1.0},
        {"score/a/x": None, "score/b": 1.0},
    ]
    assert conditions_of(records, "score") == ["b", "a/x"]
    assert conditions_of(records, "reward") == ["c"]


def test_without_a_critic_nothing_of_one_is_shown() -> None:
    declared = figures("grpo", critic=False)
    assert "critic" not in declared.charts.all_groups()
    assert not {"explained_variance", "value_loss"} & {figure.key for figure in declared.figures}
    assert not {"explained_variance", "value_loss"} & {panel.key for panel in declared.picture.small}
    facts = RunFacts(declared, 10)
    facts.add({"step": 1, "score": 0.5, "length": 10.0, "value_loss": 1.0})
    assert [fact.text for fact in facts.line()] == ["score 0.500 (mean 0.500)", "length 10"]


@pytest.mark.parametrize(
    ("name", "reward", "score", "clipped"),
    [
        ("quickstart_ppo", None, "score by the reward model", "share of answer tokens clipped"),
        ("quickstart_grpo", "rules.py:gold", "score by the reward rule", "share of answer tokens clipped"),
        ("quickstart_rloo", "rules.py:gold", "score by the reward rule", "share of answers clipped"),
    ],
)
def test_panels_name_what_scores_and_what_is_clipped(
    name: str, reward: str | None, score: str, clipped: str
) -> None:
    config = load_config(name)
    config = config if reward is None else config.model_copy(update={"reward": reward})
    picture = stage_of(config).figures(config).picture
    assert picture.large[0].title == score
    assert next(panel.title for panel in picture.small if panel.key == "clipped") == clipped


def test_accuracy_is_a_running_mean_between_held_out_loss_and_learning_rate() -> None:
    facts = RunFacts(REWARD, 10)
    facts.add({"step": 1, "loss": 0.5, "accuracy": 0.75, "lr": 1e-3, "eval_loss": 0.6})
    facts.add({"step": 2, "loss": 0.5, "accuracy": 0.75, "lr": 1e-3})
    assert [(fact.text, fact.tone) for fact in facts.line()] == [
        ("loss 0.5000 (mean 0.5000)", "main"),
        ("eval loss 0.6000", "held out"),
        ("accuracy 0.750", "plain"),
        ("lr 1.00e-03", "plain"),
    ]


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "kto", "ppo", "grpo", "rloo"])
def test_every_stage_declares_figures_that_have_their_series(stage: str) -> None:
    config = config_class(stage).model_construct(stage=stage, reward=None)
    declared = stage_of(config).figures(config)
    assert declared.picture.large[0].shown([], declared.picture.large[0]), "others share its steps"
    keys = [figure.key for figure in declared.figures]
    assert len(keys) == len(set(keys))
    assert {figure.unless for figure in declared.figures} <= {"", *keys}
    charts = [declared.charts.chart_of(key) for key in keys]
    assert len(charts) == len(set(charts))


def test_looking_at_a_finished_run_needs_no_torch() -> None:
    program = (
        "import sys, tuner.stages.run, tuner.display.curves, tuner.display.progress, tuner.display.notebook\n"
        "import tuner.stages.sft.figures, tuner.stages.reward.figures, tuner.stages.dpo.figures\n"
        "import tuner.stages.rl.figures, tuner.stages.kto.figures\n"
        "sys.exit(', '.join({'torch', 'matplotlib', 'rich'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_charts_follow_the_first_rule_then_the_groups_then_the_default() -> None:
    chart = figures("ppo", critic=True).charts.chart_of
    keys = (
        "seconds",
        "seconds/generate",
        "replay_loss",
        "eval_replay_loss",
        "value_loss",
        "ratio",
        "score/a b",
    )
    assert [chart(key) for key in keys] == [
        *("time/step", "time/generate", "replay/loss", "eval/replay_loss", "critic/value_loss", "ppo/ratio"),
        "conditions/score/a b",
    ]
