"""How a policy does on what it is not trained on: held-out prompts, and held-out rows of the replay set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tuner.config import PolicyEvaluation
from tuner.evaluation.judge import Judge, Judged, answer_held_out
from tuner.evaluation.position_loss import HeldOutReplay, RangeLoss, by_position, mean_loss
from tuner.rollout.engine import Engine
from tuner.training.watchers import Sample


@dataclass(frozen=True)
class PolicyMeasure:
    """One look at a policy."""

    means: dict[str, float]
    """Mean `gold` and `score`, and both by condition: `gold/polite`."""
    ranges: Sequence[RangeLoss]
    """Loss of the held-out replay rows, by position."""

    @property
    def replay_loss(self) -> float | None:
        """Nats per learned token of the held-out replay rows; None without any."""
        return mean_loss(self.ranges)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PolicyMeasure:
        """The reverse of `to_dict`, also after JSON."""
        return cls(_numbers(values["means"]), [RangeLoss(**_numbers(one)) for one in values["ranges"]])

    def __str__(self) -> str:
        told = [f"{name} {value:.4f}" for name, value in self.means.items() if "/" not in name]
        told += [] if self.replay_loss is None else [f"replay loss {self.replay_loss:.4f}"]
        return ", ".join(told) or "no test prompts to measure"


class HeldOutPolicy:
    """Measures the policy of a run; every rank takes a share, all get the result.

    judge: None without held-out prompts.
    """

    def __init__(
        self,
        judge: Judge | None,
        replay: HeldOutReplay,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        evaluation: PolicyEvaluation,
    ) -> None:
        self._judge, self._replay, self._engine = judge, replay, engine
        self._tokenizer, self._evaluation = tokenizer, evaluation
        self._judged: Judged | None = None
        self.rollout_samples: Sequence[Sample] = ()
        """Answers of the last rollout, shown where no prompt is held out."""
        self.last: PolicyMeasure | None = None
        """The last measurement; None before the first."""

    def look(self) -> PolicyMeasure:
        """Everything there is to measure."""
        self._judged = None
        if (judge := self._judge) is not None:
            temperature = self._evaluation.temperature
            answers = answer_held_out(judge.prompts, self._engine, self._tokenizer, temperature)
            self._judged = judge.judge(answers.texts)
        means = {} if self._judged is None else self._judged.means()
        self.last = PolicyMeasure(means, self._replay.measure())
        return self.last

    def measure(self) -> dict[str, float]:
        """The same as numbers by name, for the loop."""
        measure = self.look()
        loss = measure.replay_loss
        return measure.means if loss is None else {**measure.means, "replay_loss": loss}

    def samples(self) -> list[Sample]:
        """The first held-out prompts with the answers measured last; without any, some of the rollout."""
        judged = self._judged
        if judged is None:
            return list(self.rollout_samples)
        count = min(self._evaluation.samples, len(judged.answers))
        return [self._sample(judged, index) for index in range(count)]

    def _sample(self, judged: Judged, index: int) -> Sample:
        prompt = judged.prompts.prompt(index)
        text = self._tokenizer.decode(judged.prompts.tokens(index).tolist())
        gold = None if judged.golds_A is None else float(judged.golds_A[index])
        return Sample(text, judged.answers[index], prompt.reference or "", gold, prompt.condition)


def policy_results(before: PolicyMeasure, after: PolicyMeasure) -> dict[str, Any]:
    """What results.json holds of two measurements: gold and score, over all prompts and by condition, and the loss of
    the replay set, over all positions and by position."""
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
    """As they were before JSON, which has no word for NaN."""
    return {name: math.nan if value is None else value for name, value in values.items()}
