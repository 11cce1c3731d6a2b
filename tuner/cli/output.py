"""Files that commands write."""

from pathlib import Path

from tuner.errors import UserError


def write_file(file: Path, content: bytes | str) -> None:
    """Write a file, text as UTF-8. Raises UserError when it cannot be written."""
    try:
        file.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}); choose another place") from error
