"""Labels by a rule: a function of the user's that scores answers."""

from __future__ import annotations

from collections.abc import Mapping

from tuner.config.feedback_config import RuleFeedback
from tuner.errors import UserError
from tuner.feedback.candidates import Candidate, Decision
from tuner.feedback.labelers import Advance, Labeling, decision_counts, no_advance, unlabeled
from tuner.feedback.store import LabelStore
from tuner.rollout.rules import load_rule, score_answer


class RuleLabeler:
    """Of each pair, the answer with the higher score is better; equal scores are a tie.

    Raises UserError where the function is missing or does not take an answer and a row.
    """

    def __init__(self, config: RuleFeedback) -> None:
        self._field = f"feedback {config.function!r}"
        rule = load_rule(config.function, "feedback")
        if rule is None:  # a config keeps functions as texts
            raise UserError(f"{self._field}: is no function; write file.py:name")
        self._rule, self._annotator = rule, config.annotator

    @property
    def annotator(self) -> str:
        return self._annotator

    def label(
        self, candidates: Mapping[str, Candidate], store: LabelStore, advance: Advance = no_advance
    ) -> Labeling:
        """See Labeler. Raises UserError with `file:line` where the rule raises or returns no finite number."""
        store.add(candidates.values())
        for candidate in unlabeled(candidates, store, self.annotator):
            store.record(self.annotator, candidate.id, self._decision(candidate))
            advance(1)
        counts = decision_counts(candidates, store, self.annotator)
        decided = counts["first"] + counts["second"]
        return Labeling(
            self.annotator,
            {"pairs": len(candidates), "decided": decided, "ties": counts["tie"]},
            (f"{self.annotator}: {decided:,} of {len(candidates):,} pairs decided, {counts['tie']:,} ties",),
        )

    def _decision(self, candidate: Candidate) -> Decision:
        row = {**candidate.row, "condition": candidate.condition}
        first, second = (
            score_answer(self._rule, self._field, answer, row, candidate.origin)
            for answer in candidate.answers
        )
        return "tie" if first == second else "first" if first > second else "second"
