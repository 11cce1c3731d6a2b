"""Locations of the files shipped with tuner: at the top level of the repository, or inside the wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
PREFIX = "tuner:"
"""Prefix of paths to files shipped in the package, such as `tuner:tiny`."""


def configs_folder() -> Path:
    """Folder of the shipped configs."""
    return _shipped("configs")


def chat_templates_folder() -> Path:
    """Folder of the chat templates, `*.jinja`."""
    return _shipped("data_templates") / "chat"


def row_examples_folder() -> Path:
    """Folder with an example file for each row shape."""
    return _shipped("data_templates") / "rows"


def conditions_folder() -> Path:
    """Folder of the wordings of shipped conditions, `NAME.LANGUAGE.txt`."""
    return _shipped("data_templates") / "conditions"


def locate(path: str) -> str:
    """The path of a shipped file or folder given as `tuner:NAME`; any other path unchanged."""
    if not path.startswith(PREFIX):
        return path
    return str(_PACKAGE / "embedded" / path.removeprefix(PREFIX))


def _shipped(name: str) -> Path:
    in_wheel = _PACKAGE / "shipped" / name
    return in_wheel if in_wheel.is_dir() else _PACKAGE.parent / name
