"""Configs of other trainers, written into the test's folder and imported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuner.config import load_config
from tuner.importers.import_file import Imported, import_config
from tuner.printable import printable

CONFIGS = Path(__file__).parent / "configs"
"""Whole configs, one of each trainer."""


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def import_text() -> Callable[..., Imported]:
    """Import a config's text; the written file loads as the config that was reported."""

    def run(text: str, name: str = "theirs.yaml", devices: int = 1) -> Imported:
        Path(name).write_text(text, encoding="utf-8")
        imported = import_config(Path(name), Path("mine.py"), devices)
        loads_as_reported(imported)
        return imported

    return run


def loads_as_reported(imported: Imported) -> Any:
    """The config of the written file, which equals the reported one and has a comment for every decision."""
    Path("mine.py").write_text(imported.text, encoding="utf-8")
    for name, text in imported.templates.items():
        Path(name).write_text(text, encoding="utf-8")
    loaded = load_config("mine.py")
    assert loaded.model_copy(update={"name": None}) == imported.config
    lines = [line.strip() for line in imported.text.splitlines()]
    comments = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    for path, why in imported.report.decided.items():
        assert " ".join(printable(why).split()) in comments, path
    return loaded
