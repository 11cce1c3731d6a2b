"""What the figures of its steps say of a policy: sentences as it happens, each once a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

KL_LIMITS = (1.0, 10.0)
"""Mean KL from the reference, in nats per token, that is said when first exceeded. Useful policies stay well below the
first; at the second, answers have nothing in common with the reference's."""
ENDED_AT_FIRST, ENDED_FALL = 0.5, 0.25
"""Answers no longer end where the share that does falls below this part of its best, if that was at least the first."""
STILL_STEPS, STILL_KL = 5, 1e-6
"""Steps that trained the policy, after which one that moved less than this (nats per token, k3) has not moved."""
FLAT_STEPS = 3
"""Steps in a row in which the policy's gradient is 0."""

Figures = Mapping[str, float | None]


@dataclass
class Health:
    """What is known of a policy so far; kept with the run's state, so that a resumed run says nothing twice."""

    most_ended: float = 0.0
    """The largest share of a step's answers that ended so far."""
    trained_steps: int = 0
    """Steps before this one that trained the policy."""
    flat_steps: int = 0
    """Steps in a row, up to the last, in which the policy's gradient was 0."""
    reported: list[str] = field(default_factory=list[str])
    """Names of the sentences that were reported."""

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Health:
        """From JSON values; {} at the start of a run."""
        return cls(**state)

    def to_state(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def judge(self, figures: Figures, trained: bool, grad_norm: float) -> list[str]:
        """New sentences on a step.

        figures: as the step logs them. trained: whether it trained the policy; grad_norm: of the policy's last update.
        """
        new = [sentence for name, sentence in self._signs(figures) if self._is_new(name)]
        self.most_ended = max(self.most_ended, figures.get("ended") or 0.0)
        if trained:
            self.trained_steps += 1
            self.flat_steps = self.flat_steps + 1 if grad_norm == 0 else 0
        if self.flat_steps == FLAT_STEPS and self._is_new("flat"):
            new.append(
                f"the policy's gradient was 0 in the last {FLAT_STEPS} steps, so it does not move: the answers to a "
                "prompt all get the same score; give prompts that are neither always nor never answered right"
            )
        return new

    def _signs(self, figures: Figures) -> list[tuple[str, str]]:
        """(name, sentence) of all that a step's figures show."""
        signs: list[tuple[str, str]] = []
        kl, kl_k3, ended = (figures.get(name) for name in ("kl", "kl_k3", "ended"))
        passed = [limit for limit in KL_LIMITS if kl is not None and kl > limit]
        if passed:
            advice = "the policy leaves what it was trained from; lower optimizer.lr, raise kl, or set max_kl to stop"
            signs.append((f"kl {passed[-1]:g}", f"KL from the reference is {kl:.1f} nats a token: {advice}"))
        if ended is not None and self._no_longer_end(ended):
            share = f"{ended:.0%} of the answers end within max_new_tokens, where {self.most_ended:.0%} did before"
            signs.append(("ended", f"{share}: see missing_end_penalty, or lower optimizer.lr"))
        if kl_k3 is not None and self.trained_steps >= STILL_STEPS and abs(kl_k3) < STILL_KL:
            moved = f"KL {kl_k3:.1e} nats a token after {self.trained_steps} steps"
            signs.append(
                ("still", f"the policy has hardly moved ({moved}): raise optimizer.lr, or look at the scores")
            )
        return signs

    def _no_longer_end(self, ended: float) -> bool:
        return self.most_ended >= ENDED_AT_FIRST and ended < ENDED_FALL * self.most_ended

    def _is_new(self, name: str) -> bool:
        if name in self.reported:
            return False
        self.reported.append(name)
        return True
