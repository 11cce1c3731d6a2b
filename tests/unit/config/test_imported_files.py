"""Of a user's file, the modules of the user's own that it runs with, and nothing that is installed."""

import sys
from pathlib import Path

import pytest

from tuner.config import SFT, Chat, Evaluation, Model
from tuner.config.imported_files import imported_files
from tuner.training.code_fingerprint import code_fingerprints


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A file with modules beside it, of which some import others, and a package."""
    texts = {
        "rules.py": "import json\nimport torch\nimport tuner\nfrom units import METERS\nimport tools.words as w\n"
        "def score(answer, row):\n    import late\n    return 1.0\n",
        "units.py": "from missing import nothing\nimport rules\nMETERS = 1\n",
        "late.py": "import importlib\n",
        "unused.py": "raise RuntimeError('it is not run')\n",
        "tools/__init__.py": "raise RuntimeError('it is not run')\n",
        "tools/words.py": "from . import letters\nfrom .deeper import lines\n",
        "tools/letters.py": "this is no Python\n",
        "tools/deeper/lines.py": "from .. import numbers\n",
        "tools/numbers.py": "",
        "tools/unused.py": "",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_modules_of_ones_own_are_found_and_none_is_run(project: Path) -> None:
    before = set(sys.modules)
    found = [str(file.relative_to(project.resolve())) for file in imported_files(project / "rules.py")]
    assert found == [
        "late.py",
        "tools/__init__.py",
        "tools/deeper/lines.py",
        "tools/letters.py",
        "tools/numbers.py",
        "tools/words.py",
        "units.py",
    ]
    assert not {"rules", "units", "late", "tools"} & (set(sys.modules) - before)


def test_a_module_elsewhere_on_pythons_path_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    (tmp_path / "here/rules.py").write_text("import shared_words_of_a_test\n")
    module = tmp_path / "there/shared_words_of_a_test.py"
    module.write_text("")
    assert imported_files(tmp_path / "here/rules.py") == []
    monkeypatch.syspath_prepend(tmp_path / "there")
    assert imported_files(tmp_path / "here/rules.py") == [module.resolve()]


def test_a_run_is_bound_to_the_modules_that_its_functions_import(project: Path) -> None:
    (project / "tools/letters.py").write_text("A = 1\n")
    config = SFT(
        model=Model(path="model"),
        data=Chat(files=("a.jsonl",), test_files=("b.jsonl",), template="chatml"),
        evaluation=Evaluation(score=f"{project / 'rules.py'}:score"),
    )
    before = code_fingerprints(config)
    assert next(iter(before)) == project / "rules.py"
    assert len(before) == 8
    (project / "units.py").write_text("from missing import nothing\nimport rules\nMETERS = 2  # changed\n")
    changed = {file for file, fingerprint in code_fingerprints(config).items() if before[file] != fingerprint}
    assert changed == {(project / "units.py").resolve()}


def test_what_only_the_config_builds_on_is_no_code_of_a_function(tmp_path: Path) -> None:
    """Its fields are compared one by one, and some may change when a run goes on."""
    (tmp_path / "base.py").write_text("config = 1\n")
    (tmp_path / "words.py").write_text("GOOD = 'good'\n")
    file = tmp_path / "mine.py"
    text = "from base import config as base\nimport words\nconfig = (base, words)\n"
    text += "def score(answer, row):\n    return {}\n"
    data = Chat(files=("a.jsonl",), test_files=("b.jsonl",), template="chatml")
    config = SFT(model=Model(path="model"), data=data, evaluation=Evaluation(score=f"{file}:score"))
    file.write_text(text.format("1.0"))
    assert list(code_fingerprints(config)) == [file]
    file.write_text(text.format("float(words.GOOD in answer)"))
    assert list(code_fingerprints(config)) == [file, (tmp_path / "words.py").resolve()]
