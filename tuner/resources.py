"""Where the files that come with tuner lie: configs and templates at the repository's top level, or in the wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
PREFIX = "tuner:"
"""Paths in configs that start with this name files that come with the package, such as `tuner:tiny`."""


def configs_folder() -> Path:
    """Folder of the named configs."""
    return _shipped("configs")


def chat_templates_folder() -> Path:
    """Folder of the chat templates, `*.jinja`."""
    return _shipped("data_templates") / "chat"


def row_examples_folder() -> Path:
    """Folder with one small file for every accepted row shape."""
    return _shipped("data_templates") / "rows"


def conditions_folder() -> Path:
    """Folder of the ready conditions' wordings, `NAME.LANGUAGE.txt`."""
    return _shipped("data_templates") / "conditions"


def locate(path: str) -> str:
    """`tuner:NAME` as the path of that file or folder in the package; any other path as it is."""
    if not path.startswith(PREFIX):
        return path
    return str(_PACKAGE / "embedded" / path.removeprefix(PREFIX))


def _shipped(name: str) -> Path:
    in_wheel = _PACKAGE / "shipped" / name
    return in_wheel if in_wheel.is_dir() else _PACKAGE.parent / name
