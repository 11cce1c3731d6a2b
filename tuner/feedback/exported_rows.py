"""Rows that Argilla and Label Studio export, brought to one shape.

Argilla 2: `records.to_list(flatten=True)`, and `records.to_json`, which leaves out the status of a response.
Argilla 1: `FeedbackRecord`s as JSON, and the rows of `format_as("datasets")`.
Label Studio: the exports JSON and JSON_MIN of a labeling config with a Pairwise or Choices tag.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from tuner.data.row_files import Row
from tuner.data.turns import is_json, is_object, key_names
from tuner.errors import UserError

ID = "candidate"
"""Key of a candidate's id in the metadata of a record (Argilla) or the data of a task (Label Studio)."""
_CHOICES = ("left", "right", "first", "second", "tie", "equal", "unsure", "skip")
"""Words of a Choices tag in the export JSON_MIN, where tags stand among the data as plain text: words that data seldom
are."""

Status = Literal["submitted", "discarded", "draft", "unknown"]
"""What an annotator did with a response; "unknown": the export does not say, so that it may be a draft."""


@dataclass(frozen=True, slots=True)
class Response:
    """What an annotator of another tool said of a row."""

    annotator: str
    values: tuple[Any, ...]
    """Of the questions or tags, in order, as the tool writes them."""
    status: Status = "submitted"
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ExportedRow:
    """A row of another tool's export."""

    id: str | None
    """The candidate's, where the row carries it."""
    texts: Mapping[str, str]
    """Field -> text, the answers among them."""
    responses: tuple[Response, ...]
    origin: str


def read_exported_row(row: Row) -> ExportedRow:
    """Raises UserError with `file:line` for a row of neither tool."""
    values, origin = row.values, row.origin
    if is_object(values.get("data")) and isinstance(
        values.get("annotations", values.get("completions")), list
    ):
        return _label_studio(values, origin)
    if "annotation_id" in values and "annotator" in values:
        return _label_studio_minimal(values, origin)
    if is_object(values.get("fields")):
        return _argilla(values, origin)
    if any(key.endswith(".responses") for key in values):
        return _argilla_flat(values, origin)
    if any(map(_is_responses, values.values())):
        return _argilla_dataset(values, origin)
    raise UserError(
        f"{origin}: a row with {key_names(values)} is none of Argilla's or Label Studio's; docs/labeling.md says how "
        "to export them"
    )


# Label Studio


def _label_studio(values: Mapping[str, Any], origin: str) -> ExportedRow:
    """A task with its annotations. Predictions are a model's, and are left out."""
    data = values["data"]
    annotations = values.get("annotations", values.get("completions"))
    responses = tuple(map(_annotation, filter(is_object, annotations)))
    return ExportedRow(_id(data), _texts(data), responses, origin)


def _annotation(annotation: Mapping[str, Any]) -> Response:
    results = [result for result in _list(annotation.get("result")) if is_object(result)]
    values = [_tag_value(result.get("value")) for result in results]
    return Response(
        f"label-studio:{_name(annotation.get('completed_by'))}",
        tuple(value for value in values if value is not None),
        "discarded" if annotation.get("was_cancelled") or annotation.get("skipped") else "submitted",
        seconds=_seconds(annotation.get("lead_time")),
    )


def _label_studio_minimal(values: Mapping[str, Any], origin: str) -> ExportedRow:
    """A row for each annotation, its tags beside the data. What was skipped is not exported."""
    tags = [_tag_value(part) for value in values.values() for part in _list(value) if is_object(part)]
    # a field may be named left or right: its text is an answer
    choices = [
        value
        for key, value in values.items()
        if isinstance(value, str)
        and value.strip().casefold() in _CHOICES
        and key.casefold() not in _CHOICES[:4]
    ]
    response = Response(
        f"label-studio:{_name(values['annotator'])}",
        (*tags, *choices),
        seconds=_seconds(values.get("lead_time")),
    )
    return ExportedRow(_id(values), _texts(values), (response,), origin)


def _tag_value(value: Any) -> Any:
    """The choice or the text of a tag's value, which has a key of its type; None for other tags."""
    if not is_object(value):
        return None
    content = next((value[key] for key in ("selected", "choices", "text") if key in value), None)
    return content[0] if isinstance(content, list) and len(content) == 1 else content


def _name(user: Any) -> str:
    """A user as a number, an email address, or an object with both."""
    return str(user.get("email") or user.get("id")) if is_object(user) else str(user)


# Argilla


def _argilla(values: Mapping[str, Any], origin: str) -> ExportedRow:
    """A record whose fields and responses are nested: of version 2 by question, of version 1 by annotator."""
    fields, written = values["fields"], values.get("responses")
    by_user: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
    if is_object(written):
        for answers in written.values():
            for answer in filter(is_object, _list(answers)):
                by_user[_user(answer)].append((answer.get("value"), answer.get("status")))
    for answer in filter(is_object, _list(written)):
        questions = answer.get("values")
        for question in questions.values() if is_object(questions) else ():
            value = question.get("value") if is_object(question) else question
            by_user[_user(answer)].append((value, answer.get("status")))
        by_user[_user(answer)].append((None, answer.get("status")))  # discarded without a value
    if is_object(written) and values.get("status") == "completed" and len(by_user) == 1:
        # Of a single response the record's status tells: only what was submitted completes a record.
        by_user = {user: [(value, "submitted") for value, _ in answers] for user, answers in by_user.items()}
    metadata = values.get("metadata")
    return _argilla_row(metadata, (values.get("id"), values.get("external_id")), fields, by_user, origin)


def _argilla_flat(values: Mapping[str, Any], origin: str) -> ExportedRow:
    """A record of version 2 in one level: QUESTION.responses, and the users and statuses beside it."""
    by_user: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
    for key, answers in values.items():
        if key.endswith(".responses"):
            users, statuses = _list(values.get(f"{key}.users")), _list(values.get(f"{key}.status"))
            for index, answer in enumerate(_list(answers)):
                user = str(users[index]) if index < len(users) else "unknown"
                by_user[user].append((answer, statuses[index] if index < len(statuses) else None))
    return _argilla_row(values, (values.get("id"),), values, by_user, origin)


def _argilla_dataset(values: Mapping[str, Any], origin: str) -> ExportedRow:
    """A row of version 1's `format_as("datasets")`: fields and questions side by side, metadata as JSON text."""
    by_user: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
    for answers in filter(_is_responses, values.values()):
        for answer in answers:
            by_user[_user(answer)].append((answer.get("value"), answer.get("status")))
    written = values.get("metadata")
    metadata = json.loads(written) if isinstance(written, str) and is_json(written) else written
    return _argilla_row(metadata, (values.get("external_id"),), values, by_user, origin)


def _argilla_row(
    metadata: Any,
    ids: Sequence[Any],
    fields: Mapping[str, Any],
    by_user: Mapping[str, list[tuple[Any, Any]]],
    origin: str,
) -> ExportedRow:
    """by_user: annotator -> (value, status) of each question."""
    own = _id(metadata) if is_object(metadata) else None
    responses = tuple(
        Response(
            f"argilla:{user}",
            tuple(_ranked(value) for value, _ in answers if value is not None),
            _status({status for _, status in answers}),
        )
        for user, answers in by_user.items()
    )
    others = (str(identity) for identity in ids if identity is not None)
    return ExportedRow(own or next(others, None), _texts(fields), responses, origin)


def _status(statuses: set[Any]) -> Status:
    """The status of a response from those of its questions."""
    if "discarded" in statuses:
        return "discarded"
    if "draft" in statuses:
        return "draft"
    return "submitted" if statuses == {"submitted"} else "unknown"


def _ranked(value: Any) -> Any:
    """The option that a ranking of version 1 puts first, or "tie"; other values as they are.

    Version 2 exports a ranking without its ranks, so that a tie cannot be told: such a list is no verdict.
    """
    if is_object(value) and {"rank", "value"} <= value.keys():  # as datasets writes a list of objects
        value = [
            {"rank": rank, "value": option}
            for rank, option in zip(_list(value["rank"]), _list(value["value"]), strict=False)
        ]
    ranks = [(part.get("rank"), part.get("value")) for part in _list(value) if is_object(part)]
    if len(ranks) != 2:
        return value
    (first, option), (second, other) = ranks
    if not isinstance(first, int) or not isinstance(second, int):
        return value
    return "tie" if first == second else option if first < second else other


def _user(answer: Mapping[str, Any]) -> str:
    return str(answer.get("user_id") or "unknown")


def _is_responses(value: Any) -> bool:
    """Whether a column of a row is a question's: a list of {"user_id", "value", "status"}."""
    return bool(_list(value)) and all(
        is_object(part) and {"user_id", "value"} <= part.keys() for part in value
    )


# all


def _id(values: Mapping[str, Any]) -> str | None:
    identity = values.get(ID)
    return None if identity is None else str(identity)


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: value for key, value in values.items() if isinstance(value, str)}


def _list(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []


def _seconds(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value < 1e9 else 0.0
