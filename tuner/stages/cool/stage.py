"""The stage of COOL RLHF, which is made of reward model and policy runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuner.config import COOL, Model, TrainingConfig, override
from tuner.data.dataset import Dataset, Progress
from tuner.data.examples import Examples
from tuner.stages.check import CheckReport
from tuner.stages.context import Context
from tuner.stages.cool.check import check_rounds
from tuner.stages.cool.loop import cool
from tuner.stages.cool.page import PAGE
from tuner.stages.cool.patch import model_of
from tuner.stages.cool.rounds import RoundPlace, rounds_of, trained_rounds
from tuner.stages.model_folder import TrainedModel
from tuner.stages.registry import stage_of
from tuner.stages.rl.evaluate import evaluate
from tuner.stages.run import Run
from tuner.stages.stage import Evaluation, Preview, Stage
from tuner.training.figures import StageFigures


class CoolStage(Stage[COOL]):
    """Rounds of reward model, policy and feedback. Rows, figures and evaluation are those of its policy."""

    rows_field = "policy.prompts"
    example_rows = {  # noqa: RUF012 (a constant)
        "policy.prompts": "prompt.jsonl",
        "policy.replay": "messages.jsonl",
        "reward.data": "pair.jsonl",
    }
    memory_fields = ("policy.tokens_per_pass", "policy.sampling.cache_gib", "reward.tokens_per_pass")
    has_page = True
    compares_policies = True
    trains_runs = True

    def figures(self, config: COOL) -> StageFigures:
        return stage_of(config.policy).figures(config.policy)

    def training_config(self, config: COOL) -> TrainingConfig:
        return config.policy

    def tokenizer_model(self, config: COOL) -> Model:
        return config.policy.policy

    def load_rows(self, config: COOL, tokenizer: Any, *, progress: Progress | None = None) -> Dataset[Any]:
        return stage_of(config.policy).load_rows(config.policy, tokenizer, progress=progress)

    def tokens_after(self, config: COOL) -> int:
        return stage_of(config.policy).tokens_after(config.policy)

    def data_config(self, config: COOL) -> Any:
        return config.policy.prompts

    def preview(self, config: COOL, rows: Dataset[Any], num_passes: int) -> Preview:
        return stage_of(config.policy).preview(config.policy, rows, num_passes)

    def examples(self, rows: Dataset[Any]) -> Examples:
        return rows.train.examples()

    def check(self, config: COOL, stand_ins: frozenset[str] = frozenset()) -> CheckReport:
        return check_rounds(config, stand_ins)

    def train(self, config: COOL, context: Context) -> None:
        cool(config, context)

    def trained_model(self, config: COOL) -> TrainedModel:
        return stage_of(config.policy).trained_model(config.policy)

    def newest_part(self, run: Path, config: COOL) -> Path | None:
        """The last policy that was trained."""
        policies = list(self.round_models(run, config).values())
        return policies[-1] if policies else None

    def round_models(self, run: Path, config: COOL) -> Mapping[str, Path]:
        return {f"round {place.number}": place.policy.folder for place in trained_rounds(config, run)}

    def unfinished_part(self, run: Path, config: COOL) -> Path | None:
        """The reward model or the policy that is in training."""
        parts = [part for place in rounds_of(config, run) for part in (place.reward, place.policy)]
        begun = (part for part in parts if part.has_started and not part.is_finished)
        return next((part.folder for part in begun), None)

    def evaluate(self, run: Run, config: COOL, against: Sequence[str] = ()) -> Evaluation:
        """The last policy against those of earlier rounds, the one it started from, and others.

        All are judged by the reward model that the last one was trained against.
        """
        places = list(trained_rounds(config, run.folder))
        names = {str(place.policy.folder): f"round {place.number}" for place in places}
        last, *earlier = reversed(names)
        others = [*earlier, config.policy.policy.path, *against]
        # Of the config given: its rows and functions may be other ones than the round's run has.
        policy = override(config.policy, {"reward": _last_reward(config, places)})
        return evaluate(Run(last), policy, others, title=run.folder.name, names=names)

    def result_lines(self, results: Mapping[str, Any]) -> Mapping[str, Mapping[str, float | None]]:
        """Of the test prompts' answers, round by round."""
        lines: dict[str, Mapping[str, float | None]] = {}
        for place in results.get("rounds", ()):
            measures = {
                f"{name} {when}": place[name][when]
                for name in ("gold", "score")
                if name in place
                for when in ("before", "after")
            }
            lines[f"round {place['round']}"] = {**measures, **place["hack"]}
        return lines

    def closing_lines(self, run: Run) -> Mapping[str, str]:
        page = run.folder / PAGE
        lines = {"rounds": str(page)} if page.is_file() else {}
        return {**lines, "next": f"tuner chat {run.folder}, tuner eval {run.folder} --trust"}

    def model_fields(self, config: COOL) -> Mapping[str, Model]:
        parts = {"policy": config.policy, "reward": config.reward}
        return {
            f"{name}.{field}": model
            for name, part in parts.items()
            for field, model in stage_of(part).model_fields(part).items()
        }

    def example_rows_for(self, config: COOL, field: str) -> str:
        part, _, name = field.partition(".")
        part_config = getattr(config, part)
        return stage_of(part_config).example_rows_for(part_config, name)

    def tiny_changes(self, config: COOL, stand_ins: frozenset[str]) -> Mapping[str, Any]:
        of_policy = frozenset(
            field.removeprefix("policy.") for field in stand_ins if field.startswith("policy.")
        )
        changes = stage_of(config.policy).tiny_changes(config.policy, of_policy)
        return {f"policy.{path}": value for path, value in changes.items()}


def _last_reward(config: COOL, places: Sequence[RoundPlace]) -> Model:
    """The reward model of the last round, in the run's folder as it is named now, where a patch was taken."""
    assert config.policy.reward_model is not None
    patched = (model_of(config, place) for place in reversed(places))
    return next(filter(None, patched), config.policy.reward_model)


STAGE = CoolStage()
