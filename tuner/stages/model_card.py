"""A run's model card: what the model is, from what and how it was trained, its figures, and how to load it.

Written from folders here, without a network. What a user may publish is the user's to decide: the card says what the
folders say of licenses, and where they say nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.config import Model, StageConfig
from tuner.config.config_table import table
from tuner.errors import UserError
from tuner.models.base_record import BaseReference
from tuner.models.locate import Location, locate
from tuner.printable import safe
from tuner.stages.registry import stage_of
from tuner.stages.run import open_run
from tuner.stages.run_models import is_run, run_folder_of

CURVES = "curves.png"
CARD = "README.md"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LICENSE = re.compile(r"""^license:\s*(["']?)([\w.+-]+)\1\s*$""", re.MULTILINE)


@dataclass(frozen=True)
class Form:
    """What a run's model is handed over as, where that is not the folder that the run itself wrote."""

    summary: str
    """What it is, before "trained by"."""
    library: str | None
    """The library's name, as hubs know it; None: left out."""
    loading: str
    """How it is loaded, in Markdown."""


@dataclass(frozen=True)
class _Facts:
    name: str
    form: Form | None
    config: StageConfig
    location: Location
    results: Mapping[str, Any]
    sources: Sequence[Mapping[str, Any]]
    versions: Mapping[str, Any]
    has_curves: bool

    @property
    def is_adapter(self) -> bool:
        return self.location.adapter_folder is not None

    @property
    def is_reward_model(self) -> bool:
        return self.location.has_score

    @property
    def stage(self) -> str:
        return str(getattr(self.config, "stage", type(self.config).__name__))

    @property
    def base(self) -> BaseReference:
        return self.location.reference


def model_card(run: str | Path, form: Form | None = None) -> str:
    """The card of a run, or of a checkpoint, as Markdown with the metadata that hubs read.

    form: of what the card lies beside; None: the model in the run's folder. Raises UserError where there is no run.
    """
    folder = run_folder_of(run)
    if not is_run(folder):
        raise UserError(f"{run}: a model card is made from a run's folder, and this is none; name the run")
    opened = open_run(folder)
    is_checkpoint = folder != Path(run)
    report: Any = (opened.read_json("data") or {}).get("report") or []
    # a policy's prompts and its replay have a report each
    reports = report if isinstance(report, list) else [report]
    facts = _Facts(
        name=folder.resolve().name + (f", {Path(run).name}" if is_checkpoint else ""),
        form=form,
        config=opened.config,
        location=locate(Model(path=str(run)), weights=False),
        results=(None if is_checkpoint else opened.results) or {},
        sources=[source for part in reports for source in part["sources"]],
        versions=opened.read_json("versions") or {},
        has_curves=(opened.folder / CURVES).is_file(),
    )
    parts = [_metadata(facts), f"# {_plain(facts.name)}", _summary(facts), *_sections(facts)]
    return "\n\n".join(parts) + "\n"


def _metadata(facts: _Facts) -> str:
    """The front matter that hubs read. JSON is YAML: no value can break out of it."""
    datasets = [str(source["path"]) for source in facts.sources if _is_hub_name(str(source["path"]))]
    values = {
        "base_model": facts.base.path if _is_hub_name(facts.base.path) else None,
        "datasets": list(dict.fromkeys(datasets)) or None,
        "license": base_license(facts.location.base_folder),
        "library_name": _form(facts).library,
        "pipeline_tag": "text-classification" if facts.is_reward_model else "text-generation",
        "tags": ["tuner", facts.stage],
    }
    lines = [f"{name}: {json.dumps(value)}" for name, value in values.items() if value is not None]
    return "\n".join(["---", *lines, "---"])


def _summary(facts: _Facts) -> str:
    version = _plain(str(facts.versions.get("tuner", "")))
    return f"{_form(facts).summary}, trained by tuner {version} ({_plain(facts.stage)})."


def _form(facts: _Facts) -> Form:
    if facts.form is not None:
        return facts.form
    if not facts.is_adapter:
        return complete_form(facts.is_reward_model)
    loading = _SCORING if facts.is_reward_model else chatting("AutoPeftModelForCausalLM", "peft")
    return Form(f"An adapter on {_code(facts.base.path)}", "peft", loading)


def complete_form(is_reward_model: bool) -> Form:
    """The form of a folder with all weights."""
    if is_reward_model:
        return Form("A complete reward model", "transformers", _SCORING)
    return Form("A complete language model", "transformers", chatting("AutoModelForCausalLM"))


def _sections(facts: _Facts) -> Iterator[str]:
    license_name = base_license(facts.location.base_folder)
    said = f"its license is {_code(license_name)}" if license_name else "its folder does not say its license"
    revision = f", commit {_code(facts.base.revision)}" if facts.base.revision else ""
    held = f", held in {facts.base.quantization}" if facts.base.quantization else ""
    start = stage_of(facts.config).trained_model(facts.config).model.path
    yield f"## Base\n\nTrained from {_code(start)}{revision}{held}; {said}."
    yield (
        "## Data\n\n"
        + _rows(
            ["rows of", "used as", "rows", "kept"],
            [_source_row(source) for source in facts.sources],
        )
        + "\n\nThe licenses of the data are those of their sources; the run does not record them."
    )
    lines = stage_of(facts.config).result_lines(facts.results)
    measured = [(name, value) for measures in lines.values() for name, value in measures.items()]
    names = list(dict.fromkeys(name for name, value in measured if value is not None))
    figures = [[label, *(measures.get(name) for name in names)] for label, measures in lines.items()]
    yield "## Figures\n\nOn held-out rows.\n\n" + _rows(["", *names], figures if names else [])
    if facts.has_curves:
        yield f"## Curves\n\n![Curves of the training]({CURVES})"
    changed = [[row.path, row.text] for row in table(facts.config) if row.origin != "default"]
    yield "## Config\n\nFields that differ from the defaults.\n\n" + _rows(["field", "value"], changed)
    yield f"## How to load it\n\n{_form(facts).loading}"
    versions = ", ".join(f"{name} {value}" for name, value in facts.versions.items() if name in _LIBRARIES)
    yield f"## Versions\n\n{_plain(versions)}."


_PURPOSES = {"files": "training", "validation_files": "validation", "test_files": "test"}


def _source_row(source: Mapping[str, Any]) -> list[Any]:
    purpose = str(source.get("purpose"))
    return [source.get("path"), _PURPOSES.get(purpose, purpose), source.get("rows"), source.get("kept")]


_LIBRARIES = ("python", "tuner", "torch", "transformers", "peft", "trl")


_SCORING = (
    "```bash\ntuner score THIS_FOLDER rows.jsonl\n```\n\nFor transformers and vLLM, `tuner export` it with "
    "`--layout llama`."
)


def chatting(kind: str, library: str = "transformers") -> str:
    """How a language model's folder is loaded by a class of a library, in Markdown."""
    names = {"transformers": ["AutoTokenizer", "pipeline"]}
    names.setdefault(library, []).append(kind)
    load = "\n".join(f"from {module} import {', '.join(sorted(names[module]))}" for module in sorted(names))
    return (
        f'```python\n{load}\n\nmodel = {kind}.from_pretrained("THIS_FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n'
        'answer = pipeline("text-generation", model=model, tokenizer=tokenizer)\n'
        'print(answer([{"role": "user", "content": "Hello"}]))\n```\n\n```bash\ntuner chat THIS_FOLDER -m "Hello"\n```'
    )


def base_license(folder: Path) -> str | None:
    """The license that a model's own card states, as hubs name it; None where its folder has no such card."""
    card = folder / CARD
    if not card.is_file():
        return None
    _, _, rest = card.read_text(encoding="utf-8", errors="replace").partition("---")
    stated = _LICENSE.search(rest.partition("\n---")[0])
    return stated[2] if stated else None


def _is_hub_name(path: str) -> bool:
    return bool(_HUB_NAME.fullmatch(path)) and not Path(path).exists() and not path.startswith("runs/")


def _rows(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; "none" without rows."""
    if not rows:
        return "None."
    lines = [
        list(map(_plain, names)),
        ["---"] * len(names),
        *([_cell(value) for value in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return (
        f"{value:.4f}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else _code(value)
    )


def _code(text: object) -> str:
    """Text as code, which is nothing but text in Markdown, whatever it contains."""
    shown = safe(str(text)).replace("\n", " ").replace("|", "&#124;").replace("`", "&#96;")
    return f"<code>{shown}</code>"


def _plain(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", text.replace("\n", " "))
