"""The docs site builds without a warning, fetches nothing from elsewhere, and says the same in Chinese."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.end_to_end.test_readme import TRANSLATIONS, blocks, links

pytest.importorskip("material", reason="the site needs mkdocs-material: pip install '.[docs]'")


def original(page: Path) -> Path:
    return page.with_name(page.name.replace(".zh.md", ".md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_it_builds_in_both_languages(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        name = f"{original(page).stem}.html"
        built = site / ("zh" if page.name.endswith(".zh.md") else "") / name
        assert "```" not in built.read_text(encoding="utf-8"), (
            f"{page.name} has a fence that mkdocs does not read"
        )
    assert "<h1" in (site / "repository" / "ARCHITECTURE.html").read_text(encoding="utf-8")


def test_lines_of_chinese_are_joined_without_a_space(site: Path) -> None:
    pages = [*(ROOT / "docs").glob("*.zh.md")]
    wrapped = re.compile(r"[\u4e00-\u9fff，。；：、]\n[\u4e00-\u9fff]")
    assert any(wrapped.search(page.read_text(encoding="utf-8")) for page in pages)
    for page in pages:
        built = site / "zh" / f"{original(page).stem}.html"
        assert not wrapped.search(built.read_text(encoding="utf-8")), page.name


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pattern = r"<(?:script|img|iframe)[^>]+src=\"?(?:https?:)?//|<link[^>]+rel=\"?(?:stylesheet|preconnect)\"?[^>]+//"
    for page in site.rglob("*.html"):
        assert not re.search(pattern, page.read_text(encoding="utf-8")), page.name


def code(page: Path) -> list[str]:
    """The code of a page, without its comments, which are translated."""
    text = "".join(blocks(page, "[a-z ]+"))
    return [line for line in (re.sub(r"\s*# .*$", "", line) for line in text.splitlines()) if line.strip()]


def outline(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#+(?= )", text, re.MULTILINE)


def cells(page: Path) -> list[list[str]]:
    """Numbers in the rows of its tables."""
    rows = re.findall(r"^\|(.*)\|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [sorted(re.findall(r"\d[\d.,]*\d|\d", row.replace("，", ","))) for row in rows]


def written_by_scripts(page: Path) -> list[str]:
    """What stands between the marker comments of scripts, which write it into both pages."""
    return re.findall(
        r"^<!-- .*?^<!-- .*?\bend\b.*?-->$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


@pytest.mark.parametrize("page", TRANSLATIONS, ids=lambda page: page.name)
def test_a_translation_has_what_its_original_has(page: Path) -> None:
    english = original(page)
    assert code(page) == code(english)
    assert outline(page) == outline(english)
    assert cells(page) == cells(english)
    assert written_by_scripts(page) == written_by_scripts(english)
    targets = [sorted(original(target).name for target, _ in links(each)) for each in (page, english)]
    assert targets[0] == targets[1]
    linked = {target for target, _ in links(page)} - {english}
    assert not linked & {original(translation) for translation in TRANSLATIONS}, "links to a page in English"
