"""The wheel stands alone: built, installed elsewhere, and run from an empty folder without the repository."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make dist` fills: a source distribution and a wheel."""
    pytest.importorskip("hatchling", reason="building a wheel without a network needs hatchling at hand")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (file,) = distributions.glob("tuner-*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run(
        [*PIP, "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)], check=True
    )
    return folder


def files_of(folder: str, pattern: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern)}


def test_it_carries_all_that_tuner_reads(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    shipped = files_of("configs", "*.py") | files_of("data_templates", "chat/*.jinja")
    shipped |= files_of("data_templates", "rows/*.jsonl")
    assert len(shipped) >= 25
    assert {f"tuner/shipped/{file}" for file in shipped} <= inside
    tracked = subprocess.run(["git", "ls-files", "tuner"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:
        assert set(tracked.stdout.split()) <= inside
    for file in ("tiny/model.safetensors", "tiny/tokenizer.json", "tiny/NOTICE", "sums/train.jsonl"):
        assert f"tuner/embedded/{file}" in inside
    (metadata,) = {name.partition("/")[0] for name in inside if ".dist-info/" in name}
    assert {
        f"{metadata}/licenses/LICENSE",
        f"{metadata}/licenses/NOTICE",
        f"{metadata}/entry_points.txt",
    } <= inside
    assert not [name for name in inside if name.startswith(("tests/", "benchmarks/", "scripts/"))]
    assert wheel.stat().st_size < 12 * 2**20


def test_an_index_would_take_both(distributions: Path) -> None:
    pytest.importorskip("twine", reason="checking what an index would refuse needs twine")
    files = sorted(map(str, distributions.iterdir()))
    assert len(files) == 2
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout


def test_the_source_distribution_builds_the_same_wheel(
    distributions: Path, wheel: Path, tmp_path: Path
) -> None:
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=source,
        check=True,
    )
    (again,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        contents = [{name: archive.read(name) for name in archive.namelist()} for archive in (one, other)]
    assert contents[0] == contents[1]


def test_it_runs_without_the_repository(installed: Path, tmp_path: Path) -> None:
    """One process for all: the verbs a newcomer types first, and a step of training."""
    code = (
        "import sys, tuner\n"
        "from tuner.cli.main import main\n"
        "for arguments in (['configs'], ['show', 'quickstart_sft'], ['check', 'quickstart_sft'],\n"
        "                  ['check', 'internlm2_7b_pretrain', '--tiny'], ['copy', 'quickstart_sft', 'mine.py'],\n"
        "                  ['train', 'mine.py', 'max_steps=1', 'evaluation.rows=2']):\n"
        "    sys.argv = ['tuner', *arguments]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as exit:\n"
        "        assert not exit.code, (arguments, exit.code)\n"
        "print(tuner.__file__)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(installed)}
    # -P: the working directory is not searched; the repository's own editable install comes later on the path
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert Path(lines[-1]).is_relative_to(installed)
    assert sum(line.startswith("quickstart_sft ") for line in lines) == 1
    assert lines.count("ready to train") == 2
    results = json.loads((tmp_path / "runs/mine/results.json").read_text())
    assert results["before"]["loss"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.py", "runs"]
