"""Labels of other tools: their rows are matched with candidates, and stored once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from tuner.data.row_files import JSON_LINES, read_text_file
from tuner.errors import UserError
from tuner.feedback.candidates import Candidate
from tuner.feedback.exported_rows import ExportedRow, Response, read_exported_row
from tuner.feedback.store import LabelStore, Verdict

_FORMATS = (*JSON_LINES, ".json")
_LEFT, _RIGHT = ("left", "first", "1", "a"), ("right", "second", "2", "b")
"""Words for the answer in the field whose name comes first in the alphabet, and for the other."""
_OTHERS: dict[str, Verdict] = {"tie": "tie", "equal": "tie", "unsure": "unsure", "skip": "skip"}
_SHOWN = 3
"""Rows that are shown of each kind that was left out."""


@dataclass
class Import:
    """What became of the rows of a file."""

    file: Path
    annotators: set[str] = field(default_factory=set[str])
    stored: int = 0
    already: int = 0
    """Labels that were stored before."""
    changed: int = 0
    """Labels that differ from what the same annotator had said, which stands."""
    drafts: int = 0
    unknown: int = 0
    """Responses that may be drafts: the export does not say which were submitted."""
    without_response: int = 0
    """Rows nobody has labeled."""
    unmatched: list[str] = field(default_factory=list[str])
    """`file:line: reason` of rows that are no candidate's."""
    unreadable: list[str] = field(default_factory=list[str])
    """`file:line: reason` of responses that say nothing of which answer is better, or different things."""

    def sentences(self) -> list[str]:
        """What is to be said of it."""
        people = f"{len(self.annotators):,} annotators"
        sentences = [
            f"{self.file}: {self.stored:,} labels of {people} stored, {self.already:,} stood already"
        ]
        counts = {
            "labels differ from what the same annotator had said before, which stands": self.changed,
            "drafts were left out": self.drafts,
            "responses were left out that may be drafts, since `to_json` of Argilla 2 leaves out what was submitted: "
            "export `records.to_list(flatten=True)` instead": self.unknown,
            "rows have no response": self.without_response,
        }
        sentences += [f"{self.file}: {count:,} {what}" for what, count in counts.items() if count]
        for what, reasons in (
            ("rows match no candidate", self.unmatched),
            ("responses do not say which answer is better, or say different things", self.unreadable),
        ):
            if reasons:
                shown = "; ".join(reasons[:_SHOWN]) + ("; ..." if len(reasons) > _SHOWN else "")
                sentences.append(f"{self.file}: {len(reasons):,} {what}: {shown}")
        return sentences


def import_labels(file: Path, candidates: Mapping[str, Candidate], store: LabelStore) -> Import:
    """Store the labels of an export of Argilla or Label Studio, all or none.

    Raises UserError where the file cannot be read, and where none of its rows is a candidate's.
    """
    if not file.is_file() or file.suffix not in _FORMATS:
        raise UserError(
            f"{file}: no file of {', '.join(_FORMATS)}; name an export of Argilla or Label Studio"
        )
    store.add(candidates.values())
    matcher = _Matcher(candidates)
    result = Import(file)
    with store.transaction():
        for row in map(read_exported_row, read_text_file(file)):
            match = matcher.match(row)
            if isinstance(match, str):
                result.unmatched.append(f"{row.origin}: {match}")
                continue
            if not row.responses:
                result.without_response += 1
            for response in row.responses:
                _store(response, match, row.origin, store, result)
    if result.unmatched and not (result.stored or result.already or result.changed):
        raise UserError(
            f"{file}: none of its labels is of a candidate ({result.unmatched[0]}); name the candidates that it is of"
        )
    return result


@dataclass(frozen=True, slots=True)
class _Match:
    candidate: Candidate
    places: Mapping[str, int]
    """Name of a field -> index of the answer in it, in the alphabet's order of names."""


def _store(response: Response, match: _Match, origin: str, store: LabelStore, result: Import) -> None:
    if response.status in ("draft", "unknown"):
        result.drafts += response.status == "draft"
        result.unknown += response.status == "unknown"
        return
    verdict = _response_verdict(response, match)
    if verdict is None:
        result.unreadable.append(f"{origin}: {list(response.values)!r:.100} of {response.annotator}")
        return
    texts = (value for value in response.values if isinstance(value, str))
    comment = next((text for text in texts if _verdict(text, match.places) is None), "")
    item = match.candidate.id
    result.annotators.add(response.annotator)
    if store.record(response.annotator, item, verdict, comment, policy="import", seconds=response.seconds):
        result.stored += 1
    elif store.verdict(response.annotator, item) == verdict:
        result.already += 1
    else:
        result.changed += 1


def _response_verdict(response: Response, match: _Match) -> Verdict | None:
    """What all values that say something say; None where they differ, or none does."""
    if response.status == "discarded":
        return "skip"
    verdicts: set[Verdict] = {
        verdict for value in response.values if (verdict := _verdict(value, match.places))
    }
    return verdicts.pop() if len(verdicts) == 1 else None


def _verdict(value: Any, places: Mapping[str, int]) -> Verdict | None:
    """What a value says, by the row's order of answers: the name of an answer's field, a place, or a word.

    A number is a rating, of which nobody says what it rates.
    """
    if not isinstance(value, str):
        return None
    word = value.strip().casefold()
    by_name = {name.casefold(): place for name, place in places.items()}
    if word in by_name:
        return ("first", "second")[by_name[word]]
    for words, place in zip((_LEFT, _RIGHT), places.values(), strict=True):
        if word in words:
            return ("first", "second")[place]
    return _OTHERS.get(word)


class _Matcher:
    """Finds the candidate of a row by its texts; an id that the row carries tells candidates of equal answers apart."""

    def __init__(self, candidates: Mapping[str, Candidate]) -> None:
        self._by_id = candidates
        self._by_answers: dict[frozenset[str], list[Candidate]] = defaultdict(list)
        for candidate in candidates.values():
            answers = frozenset(map(_words, candidate.answers))
            if len(answers) == 2:  # otherwise they differ in white space alone, and cannot be told apart
                self._by_answers[answers].append(candidate)

    def match(self, row: ExportedRow) -> _Match | str:
        """The candidate, or why there is none."""
        texts = {name: _words(text) for name, text in row.texts.items()}
        matches = [
            _Match(candidate, dict(sorted(zip((one, other), _places(candidate, texts[one]), strict=True))))
            for one, other in combinations(texts, 2)
            for candidate in self._by_answers.get(frozenset((texts[one], texts[other])), ())
        ]
        if row.id in self._by_id:
            matches = [match for match in matches if match.candidate.id == row.id]
            if not matches:
                return f"its texts are not those of candidate {row.id!r}"
        if len(matches) > 1:
            matches = [match for match in matches if _last_words(match.candidate) in texts.values()]
        if len(matches) == 1:
            return matches[0]
        return "it fits several candidates" if matches else "its texts are no candidate's"


def _places(candidate: Candidate, text: str) -> tuple[int, int]:
    """The index of the answer that is this text, and that of the other."""
    index = int(_words(candidate.answers[0]) != text)
    return index, 1 - index


def _last_words(candidate: Candidate) -> str:
    return _words(candidate.prompt[-1].content)


def _words(text: str) -> str:
    """A text without its white space, which tools change."""
    return " ".join(text.split())
