"""Every command and every piece of Python in README.md and docs/*.md runs, made short by a table of rules.

Commands run in the order of the page, in one empty folder. A command that no rule knows fails the test.
"""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tuner as tuner_package
from tests.conftest import ROOT
from tests.end_to_end.conftest import Done
from tuner.config import PPO, SFT, StageConfig, load_config, override
from tuner.errors import UserError

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
TARGETS = set(re.findall(r"^([a-z_-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
ROWS = '{"prompt": "What is 2 + 3?", "chosen": "5.", "rejected": "6.", "condition": "brief"}\n'
"""What stands in a file of rows that a page scores."""


def short(config: StageConfig) -> tuple[str, ...]:
    """Overrides that make a run of a stage short."""
    own: tuple[str, ...] = ()
    if isinstance(config, SFT):
        own = ("evaluation.max_new_tokens=4",)
    if isinstance(config, PPO):
        own = ("prompts_per_step=4", "sampling.max_new_tokens=4", "mini_batches=1", "critic_warmup=1")
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
    """Whether its models can be loaded here: real ones are not."""
    models = [getattr(config, name).path for name in ("model", "policy", "reward") if hasattr(config, name)]
    return all(path.startswith("tuner:") or (folder / path).exists() for path in models)


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
        case ["tuner", ("train" | "data" | "check") as verb, name, *rest]:
            options = [word for word in rest if word.startswith("-")]
            config = override(
                load_config(folder / name if (folder / name).is_file() else name), changes(rest)
            )
            if not is_at_hand(config, folder):
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
        case ["tuner", "configs" | "copy" | "show" | "merge" | "eval" | "export", *_]:
            return words[1:]
    raise AssertionError(f"no rule for: {shlex.join(words)}")


def changes(words: list[str]) -> list[str]:
    return [word for word in words if re.match(r"[a-z_.0-9]+=", word)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page: Path, tuner: Callable[..., Done], tmp_path: Path) -> None:
    found = commands(page)
    assert found or page.name != "README.md"
    for words in found:
        arguments = runnable(words, tmp_path)
        if arguments is not None:
            done = tuner(*arguments)
            assert done.code == 0, f"{shlex.join(words)}: {done.err}"


@pytest.fixture
def _short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    train = tuner_package.train

    def train_shortly(config: StageConfig, **settings: Any) -> Any:
        return train(override(config, list(short(config))), **settings)

    monkeypatch.setattr(tuner_package, "train", train_shortly, raising=False)


@pytest.mark.usefixtures("_short_training")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        names: dict[str, Any] = {}
        exec(compile(block, str(page), "exec"), names)
        config = names.get("config")
        if isinstance(config, StageConfig) and config.name is None:
            (tmp_path / "page.py").write_text(block)
            assert load_config("page.py").name == "page"


def test_a_config_that_is_shown_whole_is_the_one_that_is_shipped() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(
        r"`configs/(\w+)\.py`, whole:\n\n```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    )
    assert shown
    for name, block in shown:
        names: dict[str, Any] = {}
        exec(block, names)
        assert names["config"].model_copy(update={"name": name}) == load_config(name)


def test_every_config_and_file_that_is_named_exists() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    table = re.findall(r"^\| (`.*?) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = {name for row in table for name in re.findall(r"`(\w+)`", row)}
    for name in named & {file.stem for file in (ROOT / "configs").glob("*.py")} | {
        name
        for name in named
        if name.endswith(("_qlora", "_lora", "_full", "_pretrain", "_sft", "_reward", "_dpo", "_ppo"))
    }:
        load_config(name)
    assert {file.stem for file in (ROOT / "configs").glob("*.py")} <= named, (
        "a config that the README does not name"
    )


@pytest.mark.parametrize(
    "line", ["rm -rf runs", "tuner destroy runs/x", "make no-such-target", "tuner chat runs/x"]
)
def test_what_no_rule_knows_fails(line: str, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, UserError)):
        runnable(shlex.split(line), tmp_path)
