"""How a policy does on what it is not trained on: held-out prompts, and held-out rows of the replay set."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tuner.evaluation.judged import Judge, Judged, answer_held_out
from tuner.evaluation.position_loss import HeldOutReplay, RangeLoss, mean_loss
from tuner.models.roles import Roles
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
    """Measures the policy of a run; every rank takes a share, all get the result."""

    def __init__(
        self,
        judge: Judge | None,
        replay: HeldOutReplay,
        roles: Roles,
        end_ids: Collection[int],
        samples: int,
    ) -> None:
        self._judge, self._replay, self._roles = judge, replay, roles
        self._end_ids, self._samples = end_ids, samples
        self._judged: Judged | None = None
        self.answered: Sequence[Sample] = ()
        """Answers of the last rollout, shown where no prompt is held out."""
        self.last: PolicyMeasure | None = None
        """What was found last; None before the first look."""

    def look(self) -> PolicyMeasure:
        """Everything there is to measure."""
        self._judged = None
        if (judge := self._judge) is not None:
            said = answer_held_out(judge.prompts, self._roles, self._end_ids, judge.config, judge.devices)
            self._judged = judge.judge(self._roles, said.texts)
        means = {} if self._judged is None else self._judged.means()
        self.last = PolicyMeasure(means, self._replay.measure())
        return self.last

    def measure(self) -> dict[str, float]:
        """The same as numbers by name, for the loop."""
        found = self.look()
        loss = found.replay_loss
        return found.means if loss is None else {**found.means, "replay_loss": loss}

    def samples(self) -> list[Sample]:
        """The first held-out prompts with the answers that were measured last; without any, some of the rollout."""
        judged = self._judged
        if judged is None:
            return list(self.answered)
        count = min(self._samples, len(judged.answers))
        return [self._sample(judged, index) for index in range(count)]

    def _sample(self, judged: Judged, index: int) -> Sample:
        prompt = judged.prompts.prompt(index)
        asked = self._roles.tokenizer.decode(judged.prompts.tokens(index).tolist())
        gold = None if judged.golds_A is None else float(judged.golds_A[index])
        return Sample(asked, judged.answers[index], prompt.reference or "", gold, prompt.condition)


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """As they were before JSON, which has no word for NaN."""
    return {name: math.nan if value is None else value for name, value in values.items()}
