"""Row shapes that a user registers."""

import functools

import pytest

from tuner.data.conversation import Document
from tuner.data.row_shapes import register_shape, registered_fingerprints
from tuner.errors import UserError

pytestmark = pytest.mark.usefixtures("_own_registrations")


def read_note(row: dict[str, str], origin: str) -> Document:
    return Document(row["note"], origin=origin)


def test_a_fingerprint_changes_with_the_keys() -> None:
    register_shape("conversation", "note", read_note, ("note",))
    before = registered_fingerprints()
    register_shape("conversation", "note", read_note, ("memo",))
    assert before.keys() == registered_fingerprints().keys() == {"conversation/note"}
    assert registered_fingerprints() != before


def test_a_reader_without_source_is_refused() -> None:
    for reader in (functools.partial(read_note), len):
        with pytest.raises(UserError, match=r"row shape 'note': .* has no source"):
            register_shape("conversation", "note", reader, ("note",))  # pyright: ignore[reportArgumentType]
    names: dict[str, object] = {}
    exec("def typed(row, origin): ...", names)
    with pytest.raises(UserError, match="has no source"):
        register_shape("conversation", "note", names["typed"], ("note",))  # pyright: ignore[reportArgumentType]
    assert registered_fingerprints() == {}
