"""Every command and every Python block of README.md, CONTRIBUTING.md and docs/*.md runs, shortened by a table of rules.

The pages share one folder, README first, so that a run which several of them train is trained once; but each page
trains what it uses, so that it can be followed alone. A command that no rule knows fails the test. What cannot run here
stands in a `text` block.
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tuner as tuner_package
from tests.conftest import ROOT
from tests.end_to_end.conftest import Done
from tuner.config import COOL, PPO, SFT, Model, PolicyConfig, StageConfig, load_config, override
from tuner.errors import UserError

README = ROOT / "README.md"
TRANSLATIONS = sorted([ROOT / "README.zh.md", *ROOT.glob("docs/*.zh.md")])
"""Pages with the code of another, whose code runs there."""
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted({*ROOT.glob("docs/*.md")} - {*TRANSLATIONS})]
FOLLOWED = [page for page in PAGES if page.name != "handing_over.md"]
"""Without the page whose blocks are shell scripts: test_handing_over.py follows it."""
TARGETS = set(re.findall(r"^([a-z_-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
ROWS = '{"prompt": "What is 2 + 3?", "chosen": "5.", "rejected": "6.", "condition": "brief"}\n'
"""Content of a file of rows that a page scores."""
TASK = '{"prompt": "What is 2 + 3?", "answer": "5"}\n'
"""Content of a file of a task's rows."""
CANDIDATES = '{"prompt": "What is 2 + 3?", "answers": ["5.", "6."], "condition": "brief"}\n'
"""Content of a file of pairs that a page has labeled."""
EXPORT = json.dumps(
    {
        "fields": {"left": "6.", "right": "5."},
        "responses": {"better": [{"value": "right", "user_id": "1"}]},
    }
)
"""Content of an export of Argilla with a label of that pair."""


def short(config: StageConfig) -> tuple[str, ...]:
    """Overrides that make a run of a stage short."""
    own: tuple[str, ...] = ()
    if isinstance(config, SFT):
        own = ("evaluation.max_new_tokens=4",)
    if isinstance(config, PolicyConfig):
        own = ("prompts_per_step=4", "sampling.max_new_tokens=4", "mini_batches=1")
        own += ("critic_warmup=1",) if isinstance(config, PPO) else ("answers_per_prompt=2",)
    return ("max_steps=2", "evaluation.rows=2", *own)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(
        rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def commands(page: Path) -> list[list[str]]:
    """The commands of its bash blocks, split as a shell does, without comments and prompts."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    split = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [words for words in split if words]


def is_at_hand(config: StageConfig, folder: Path) -> bool:
    """Whether its models can be loaded here: those of the hub cannot."""
    parts = (getattr(config, name, None) for name in ("model", "policy", "reward"))
    paths = [part.path for part in parts if isinstance(part, Model)]
    return all(path.startswith("tuner:") or (folder / path).exists() for path in paths)


def runnable(words: list[str], folder: Path) -> list[str] | None:
    """The `tuner` arguments to run for a command, None where looking at it is enough; AssertionError by no rule."""
    match words:
        case ["make", *targets]:
            assert targets
            assert set(targets) <= TARGETS, f"the Makefile has no {set(targets) - TARGETS}"
            return None
        case ["pip", "install", *what]:
            assert "constraints.txt" not in what or (ROOT / "constraints.txt").is_file()
            extras = [extra for word in what for extra in re.findall(r"\.\[(.*)\]", word)]
            project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
            assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)
            return None
        case ["git", "clone", *_] | ["cd", *_]:
            return None
        case ["python", "benchmarks/gpu/run.py", *options]:  # tests/gpu/test_script.py runs it
            from benchmarks.gpu.catalog import CASES
            from benchmarks.gpu.run import parsed

            assert set(parsed(options).only or ()) <= CASES.keys()
            return None
        case ["tuner", "train", "--stop", _]:  # the runs of these pages have ended
            return ["train", "--help"]
        case ["tuner", ("train" | "data" | "check") as verb, name, *rest]:
            options = [word for word in rest if word.startswith("-")]
            config = override(
                load_config(folder / name if (folder / name).is_file() else name), changes(rest)
            )
            if isinstance(config, COOL) or not is_at_hand(config, folder):  # rounds take minutes
                return [
                    "check",
                    name,
                    *changes(rest),
                    "--tiny",
                    *(word for word in options if word == "--json"),
                ]
            return [verb, name, *rest, *(short(config) if verb == "train" else ())]
        case ["tuner", "chat", _, *rest]:
            assert rest, "a page cannot type: use -m"
            return [*words[1:], "--max-new-tokens", "4"]
        case ["tuner", "score", _, rows, *_]:
            (folder / rows).write_text(ROWS, encoding="utf-8")
            return words[1:]
        case ["tuner", "label", target, *_]:
            rows = folder / target
            if target.startswith("runs/"):
                rows = rows / "round_1" / "candidates" / "candidates.jsonl"
                rows.parent.mkdir(parents=True, exist_ok=True)
            rows.write_text(CANDIDATES, encoding="utf-8")
            if "--import" in words:
                (folder / words[words.index("--import") + 1]).write_text(EXPORT, encoding="utf-8")
            serves = not {"--report", "--export", "--import"} & set(words)  # until it is interrupted
            return [*words[1:], *(["--report"] if serves else [])]
        case ["tuner", "import", file, *_]:
            shutil.copy(ROOT / "tests" / "unit" / "importers" / "configs" / file, folder)
            return words[1:]
        # until it is interrupted, with vLLM where named
        case ["tuner", ("serve" | "serve-rollouts") as verb, *_]:
            return [verb, "--help"]
        case ["tuner", "eval", _, "--tasks", tasks]:
            (folder / tasks).write_text(TASK, encoding="utf-8")
            return [*words[1:], "--max-new-tokens", "4"]
        case ["tuner", "eval", "runs/quickstart_cool", *_]:
            return ["eval", "--help"]
        case ["tuner", "configs" | "copy" | "show" | "merge" | "eval" | "export" | "card" | "push", *_]:
            return words[1:]
    raise AssertionError(f"no rule for: {shlex.join(words)}")


def changes(words: list[str]) -> list[str]:
    return [word for word in words if re.match(r"[a-z_.0-9]+=", word)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all pages are followed."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "candidates.jsonl").write_text(CANDIDATES, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def already_run() -> set[tuple[str, ...]]:
    """Commands that an earlier page has run in that folder."""
    return set()


@pytest.mark.parametrize("page", FOLLOWED, ids=lambda page: page.name)
def test_commands_run(
    page: Path, tuner: Callable[..., Done], folder: Path, already_run: set[tuple[str, ...]]
) -> None:
    lines = commands(page)
    assert lines or page != README
    for words in lines:
        if tuple(words) in already_run:
            continue
        arguments = runnable(words, folder)
        if arguments is not None:
            done = tuner(*arguments, cwd=folder)
            assert done.code == 0, f"{shlex.join(words)}: {done.err}"
        already_run.add(tuple(words))


@pytest.fixture
def _short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    train = tuner_package.train

    def train_shortly(config: StageConfig, **settings: Any) -> Any:
        return train(override(config, list(short(config))), **settings)

    monkeypatch.setattr(tuner_package, "train", train_shortly, raising=False)


@pytest.mark.usefixtures("_short_training", "_own_registrations")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for block in blocks(page, "python"):
        names: dict[str, Any] = {}
        exec(compile(block, str(page), "exec"), names)
        config = names.get("config")
        if isinstance(config, StageConfig) and config.name is None:
            (folder / "page.py").write_text(block)
            assert load_config("page.py").name == "page"


def test_a_config_that_is_shown_whole_is_the_one_that_is_shipped() -> None:
    text = README.read_text(encoding="utf-8")
    shown = re.findall(
        r"`configs/(\w+)\.py`, whole:\n\n```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    )
    assert shown
    for name, block in shown:
        names: dict[str, Any] = {}
        exec(block, names)
        assert names["config"].model_copy(update={"name": name}) == load_config(name)


def test_every_config_has_its_line_and_every_line_its_config() -> None:
    text = (ROOT / "docs" / "configs.md").read_text(encoding="utf-8")
    shipped = text.partition("## Shipped configs")[2].partition("\n## ")[0]
    named = [
        name
        for row in re.findall(r"^\| (`.*?) \|", shipped, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    ]
    assert sorted(named) == sorted(file.stem for file in (ROOT / "configs").glob("*.py"))


def links(page: Path) -> list[tuple[Path, str]]:
    """(file, anchor) of every link to a file of the repository; the anchor is empty where there is none."""
    targets = re.findall(r"\]\(([^):]+)\)", page.read_text(encoding="utf-8"))
    pairs = [target.partition("#")[::2] for target in targets]
    return [((page.parent / file).resolve() if file else page, anchor) for file, anchor in pairs]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *TRANSLATIONS], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {target.name}#{anchor}"


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = {README}, [README]
    while waiting:
        pages = {target for target, _ in links(waiting.pop()) if target.suffix == ".md"} - reached
        reached |= pages
        waiting += pages
    assert set(PAGES) <= reached


@pytest.mark.parametrize(
    "line", ["rm -rf runs", "tuner destroy runs/x", "make no-such-target", "tuner chat runs/x"]
)
def test_what_no_rule_knows_fails(line: str, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, UserError)):
        runnable(shlex.split(line), tmp_path)
