"""The reinforcement learning stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tuner.algorithms.algorithm import algorithm_of
from tuner.config import LoRA, Model, PolicyConfig
from tuner.data.batch import pack_all
from tuner.data.dataset import Dataset, Progress
from tuner.data.examples import Examples
from tuner.data.prompts import PromptSet
from tuner.models.memory import MemoryPlan
from tuner.stages.check import CheckReport
from tuner.stages.context import Context
from tuner.stages.memory_budget import Options
from tuner.stages.model_folder import TrainedModel
from tuner.stages.rl.check import check_policy, policy_memory_options, policy_memory_plans
from tuner.stages.rl.evaluate import evaluate
from tuner.stages.rl.figures import figures
from tuner.stages.rl.loop import reinforce
from tuner.stages.rl.prompts import load_policy_prompts, plan_run
from tuner.stages.rl.reward_source import scorer_of
from tuner.stages.run import Run
from tuner.stages.stage import Evaluation, Preview, Stage
from tuner.stages.trust import code_named_by
from tuner.training.figures import StageFigures


class RLStage(Stage[PolicyConfig]):
    """Prompts, answered by the policy; losses by the algorithm that the config's class names."""

    rows_field = "prompts"
    example_rows = {"prompts": "prompt.jsonl", "replay": "messages.jsonl"}  # noqa: RUF012 (a constant)
    memory_fields = ("tokens_per_pass", "sampling.cache_gib")
    has_page = True
    compares_policies = True

    def figures(self, config: PolicyConfig) -> StageFigures:
        algorithm = algorithm_of(config)
        return figures(
            config.stage,  # type: ignore[attr-defined]  # a literal of each subclass
            critic="critic" in algorithm.roles,
            scorer=scorer_of(config),
            ratio_unit=algorithm.ratio_unit,
        )

    def tokenizer_model(self, config: PolicyConfig) -> Model:
        return config.policy

    def load_rows(
        self, config: PolicyConfig, tokenizer: Any, *, progress: Progress | None = None
    ) -> Dataset[PromptSet]:
        return load_policy_prompts(config, tokenizer, progress=progress)

    def tokens_after(self, config: PolicyConfig) -> int:
        return config.sampling.max_new_tokens

    def preview(self, config: PolicyConfig, rows: Dataset[PromptSet], num_passes: int) -> Preview:
        """The prompts of the first step, packed as they would be without their answers."""
        chosen = plan_run(config, rows).step(0)
        groups = pack_all(rows.train.lengths[chosen], config.tokens_per_pass)[:num_passes]
        prompts = rows.train
        return Preview(
            prompts.examples(),
            [chosen[group].tolist() for group in groups],
            lambda index: prompts.condition(index) or "",
        )

    def examples(self, rows: Dataset[PromptSet]) -> Examples:
        return rows.train.examples()

    def check(self, config: PolicyConfig, stand_ins: frozenset[str] = frozenset()) -> CheckReport:
        return check_policy(config, stand_ins)

    def memory_plans(self, config: PolicyConfig) -> Callable[[PolicyConfig], MemoryPlan]:
        return policy_memory_plans(config)

    def memory_options(self, config: PolicyConfig, processes: int) -> Options:
        return policy_memory_options(config, processes)

    def train(self, config: PolicyConfig, context: Context) -> None:
        reinforce(config, context)

    def trained_model(self, config: PolicyConfig) -> TrainedModel:
        return TrainedModel(config.policy, config.adapter, config.prompts.template)

    def weights_of_model(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The policy's: of several sets of weights, each name in a checkpoint begins with that of its set."""
        prefix = "policy."
        policy = {
            name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)
        }
        return policy or weights

    def evaluate(self, run: Run, config: PolicyConfig, against: Sequence[str] = ()) -> Evaluation:
        return evaluate(run, config, against)

    def result_lines(self, results: Mapping[str, Any]) -> Mapping[str, Mapping[str, float | None]]:
        """Of the test prompts' answers and the replay set's held-out rows."""
        measured = {
            name: results[key]
            for key, name in (("score", "score"), ("gold", "gold"), ("replay", "replay loss"))
            if key in results
        }
        return {
            when: {name: values[when] for name, values in measured.items()} for when in ("before", "after")
        }

    def closing_lines(self, run: Run) -> Mapping[str, str]:
        config = run.config
        policy = config.policy.path  # type: ignore[attr-defined]
        trust = " --trust" if code_named_by(config) else ""
        return {"next": f"tuner chat {run.folder}, tuner eval {run.folder} --against {policy}{trust}"}

    def model_fields(self, config: PolicyConfig) -> Mapping[str, Model]:
        models = {"policy": config.policy, "reference": config.reference, "reward": config.reward_model}
        further = {f"further_rewards.{index}": model for index, model in enumerate(config.further_rewards)}
        return {name: model for name, model in models.items() if model is not None} | further

    def example_rows_for(self, config: PolicyConfig, field: str) -> str:
        raw_text = field == "replay" and config.replay is not None and config.replay.template is None
        return "text.jsonl" if raw_text else self.example_rows[field]

    def tiny_changes(self, config: PolicyConfig, stand_ins: frozenset[str]) -> Mapping[str, Any]:
        """A LoRA adapter, where the run that the small model replaces would have brought the policy's."""
        needs_adapter = "policy" in stand_ins and config.adapter is None and config.roles == "shared"
        return {"adapter": LoRA()} if needs_adapter else {}


STAGE = RLStage()
