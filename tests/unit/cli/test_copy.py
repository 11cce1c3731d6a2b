"""`tuner copy`: copies a shipped config and what it imports, and overwrites nothing."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tuner.cli.copy import copy
from tuner.config import load_config
from tuner.errors import UserError
from tuner.resources import configs_folder

app = typer.Typer()
app.command()(copy)


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _copy(*arguments: str) -> str:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False).output


@pytest.mark.parametrize(
    ("to", "path"),
    [
        ((), "quickstart_sft.py"),
        (("mine.py",), "mine.py"),
        (("mine",), "mine.py"),
        (("new/folder/",), "new/folder/quickstart_sft.py"),
        ((".",), "quickstart_sft.py"),
    ],
)
def test_the_copy_is_identical(to: tuple[str, ...], path: str) -> None:
    assert _copy("quickstart_sft", *to) == f"{path}\n"
    assert Path(path).read_bytes() == (configs_folder() / "quickstart_sft.py").read_bytes()


def test_nothing_is_overwritten() -> None:
    Path("quickstart_sft.py").write_text("mine")
    with pytest.raises(UserError, match="not overwritten"):
        _copy("quickstart_sft")
    assert Path("quickstart_sft.py").read_text() == "mine"


def test_a_misspelled_name_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match="did you mean quickstart_sft"):
        _copy("quickstart_stf")
    with pytest.raises(UserError, match="tuner configs"):
        _copy("zzz")


def test_an_unwritable_destination_is_reported() -> None:
    Path("file.py").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        _copy("quickstart_sft", "file.py/inside.py")


@pytest.fixture
def _shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three configs, each importing the one before."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "first.py").write_text((configs_folder() / "quickstart_sft.py").read_text())
    (folder / "second.py").write_text(
        "from first import config\nconfig = config.model_copy(update={'seed': 2})\n"
    )
    (folder / "third.py").write_text(
        "import second\nconfig = second.config.model_copy(update={'name': None})\n"
    )
    monkeypatch.setattr("tuner.resources.configs_folder", lambda: folder)


@pytest.mark.usefixtures("_shipped")
def test_imported_configs_are_copied_too() -> None:
    assert _copy("third", "mine/") == "mine/second.py\nmine/first.py\nmine/third.py\n"
    assert load_config("mine/third.py").seed == 2


@pytest.mark.usefixtures("_shipped")
def test_a_different_file_with_an_imported_configs_name_is_an_error() -> None:
    Path("mine").mkdir()
    Path("mine/first.py").write_text("something else")
    with pytest.raises(UserError, match=r"builds on first\.py"):
        _copy("third", "mine/")
    assert not Path("mine/third.py").exists()
