"""A policy measured on held-out prompts and on held-out rows of the replay set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tuner.config import PolicyEvaluation
from tuner.evaluation.judge import Judge, JudgedAnswers, answer_held_out
from tuner.evaluation.position_loss import HeldOutReplay, RangeLoss, by_position, mean_loss
from tuner.rollout.engine import Engine
from tuner.training.watchers import Sample


@dataclass(frozen=True)
class PolicyMeasurement:
    """A policy's figures at one step."""

    means: dict[str, float]
    """Mean `gold` and `score`, and both by condition: `gold/polite`."""
    ranges: Sequence[RangeLoss]
    """Loss of the held-out replay rows, by position."""

    @property
    def replay_loss(self) -> float | None:
        """Nats per token that the loss is taken on, over the held-out replay rows; None without any."""
        return mean_loss(self.ranges)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PolicyMeasurement:
        """The reverse of `to_dict`, also after JSON."""
        return cls(_numbers(values["means"]), [RangeLoss(**_numbers(part)) for part in values["ranges"]])

    def __str__(self) -> str:
        figures = [f"{name} {value:.4f}" for name, value in self.means.items() if "/" not in name]
        figures += [] if self.replay_loss is None else [f"replay loss {self.replay_loss:.4f}"]
        return ", ".join(figures) or "no test prompts to measure"


class HeldOutPolicy:
    """Measures the policy of a run; every rank takes a share, all get the result.

    judge: None without held-out prompts. max_new_tokens: of an answer to one of these.
    """

    def __init__(
        self,
        judge: Judge | None,
        replay: HeldOutReplay,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        evaluation: PolicyEvaluation,
        max_new_tokens: int,
    ) -> None:
        self._judge, self._replay, self._engine = judge, replay, engine
        self._tokenizer, self._evaluation, self._max_new_tokens = tokenizer, evaluation, max_new_tokens
        self._judged: JudgedAnswers | None = None
        self.rollout_samples: Sequence[Sample] = ()
        """Answers of the last rollout, shown where no prompt is held out."""
        self.last: PolicyMeasurement | None = None
        """The last measurement; None before the first."""

    @property
    def tokens(self) -> int:
        """Tokens of a measurement, at most: of the prompts, their answers and the replay rows. Steps of training sample
        answers, too, so that decoding costs both the same."""
        lengths = [] if self._judge is None else self._judge.prompts.lengths
        return int(sum(lengths)) + len(lengths) * self._max_new_tokens + self._replay.tokens

    def measure(self) -> PolicyMeasurement:
        """Sample answers to the held-out prompts, judge them, and take the loss of the held-out replay rows."""
        self._judged = None
        if (judge := self._judge) is not None:
            temperature = self._evaluation.temperature
            answers = answer_held_out(judge.prompts, self._engine, self._tokenizer, temperature)
            self._judged = judge.judge(answers.texts)
        means = {} if self._judged is None else self._judged.means()
        self.last = PolicyMeasurement(means, self._replay.losses_by_position())
        return self.last

    def metrics(self) -> dict[str, float]:
        """A new measurement as numbers by name, for the loop."""
        measurement = self.measure()
        loss = measurement.replay_loss
        return measurement.means if loss is None else {**measurement.means, "replay_loss": loss}

    def samples(self) -> list[Sample]:
        """The first held-out prompts with their last measured answers; without such prompts, `rollout_samples`."""
        judged = self._judged
        if judged is None:
            return list(self.rollout_samples)
        count = min(self._evaluation.samples, len(judged.answers))
        return [self._sample(judged, index) for index in range(count)]

    def _sample(self, judged: JudgedAnswers, index: int) -> Sample:
        prompt = judged.prompts.prompt(index)
        text = str(self._tokenizer.decode(judged.prompts.tokens(index).tolist()))
        gold = None if judged.golds_A is None else float(judged.golds_A[index])
        return Sample(text, judged.answers[index], prompt.reference or "", gold, prompt.condition)


def policy_results(before: PolicyMeasurement, after: PolicyMeasurement) -> dict[str, Any]:
    """Two measurements side by side, as results.json holds them: gold and score, over all prompts and by condition;
    and the loss of the replay set, over all positions and by position."""
    results: dict[str, Any] = {"conditions": {}}
    for name, value in after.means.items():
        kind, _, condition = name.partition("/")
        group = results["conditions"].setdefault(condition, {}) if condition else results
        group[kind] = {"before": before.means[name], "after": value}
    if after.ranges:
        results["replay"] = {"before": before.replay_loss, "after": after.replay_loss}
        results["positions"] = by_position(before.ranges, after.ranges)
    return results


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with NaN for None: JSON cannot write NaN, so that it was written as null."""
    return {name: math.nan if value is None else value for name, value in values.items()}
