"""Axolotl's datasets: sources, types, and the columns that they name."""

from __future__ import annotations

import re
from pathlib import Path

from tuner.importers.keys import Block, Keys
from tuner.importers.part import Part
from tuner.importers.recipe import Recipe
from tuner.importers.row_functions import cell, messages, set_row

_TEMPLATES = {
    "alpaca": "alpaca",
    "chatml": "chatml",
    "gemma": "gemma",
    "llama3": "llama3",
    "mistral_v2v3": "mistral",
    "qwen_25": "qwen",
    "tokenizer_default": "tokenizer",
}
"""chat_template -> tuner's of the same family; others are the model's own."""
_TEXT_TYPES = ("completion", "pretrain")
_NATIVE_TYPES = (
    "alpaca",
    "chat_template",
    "sharegpt",
    "input_output",
    "oasst",
    "chatml",
    "llama3",
    "bradley_terry",
)
_SLICE = re.compile(r"(\w+)\[:(\d+)(%?)\]")
_FILES = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt", ".zst", ".gz")


def read_datasets(keys: Keys, recipe: Recipe) -> None:
    """The sources of `datasets`, `pretraining_dataset` and `test_datasets`, and the chat template."""
    pretraining = keys.parts("pretraining_dataset")
    training = [*keys.parts("datasets"), *pretraining]
    if not training:
        keys.refuse(
            "datasets", "names no dataset that can be read; a list of mappings with a path was expected"
        )
    types = [_type(block) for block in training]
    texts = [kind in _TEXT_TYPES for kind, _ in types]
    if recipe.stage == "sft" and any(texts):
        if not all(texts):
            keys.refuse("datasets", "mixes raw text (completion) and conversations; write a config for each")
        recipe.stage = "text"
    for block, (kind, variant) in zip(training, types, strict=True):
        recipe.files += _sources(block, kind, recipe)
        if variant and kind == "alpaca":
            block.lose(
                "type", f"alpaca:{variant}: the prompt is Stanford Alpaca's; write another as a .jinja file"
            )
    for block in keys.parts("test_datasets"):
        recipe.validation_files += _sources(block, _type(block)[0], recipe)
    if recipe.stage != "text":
        _read_template(keys, training, types, recipe)


def _type(block: Keys) -> tuple[str, str]:
    """A dataset's type and its variant: ("chatml", "intel"); a mapping is ("user_defined", "")."""
    value = block.take("type")
    if isinstance(value, Block):
        return "user_defined", ""
    if not isinstance(value, str):
        return "", ""
    kind, _, variant = re.sub(r"^bradley_terry\.", "", value).replace(":", ".").partition(".")
    return kind, variant


def _sources(block: Keys, kind: str, recipe: Recipe) -> list[Part]:
    path = block.text("path")
    if not path:
        block.refuse("path", "is missing; a dataset, file or folder was expected")
    files = block.texts("data_files")
    revision = block.text("revision")
    if revision:
        block.lose("revision", "datasets are read at their newest revision")
    is_file = path.endswith(_FILES) or path in ("json", "csv", "parquet", "text")
    if is_file or files:
        sources = [Part("Source", path=name) for name in files or [path]]
        if not is_file:
            sources = [Part("Source", path=f"{path}/{name}") for name in files]
            sources[0].comment = "files of a dataset on the hub: download them, and write where they are"
            recipe.report.decided[f"data.files {path}"] = sources[0].comment
    else:
        sources = [Part("Source", path=path, subset=block.text("name"))]
    _read_split(block, sources)
    _read_columns(block, kind, sources, Path(path).stem, recipe)
    return sources


def _read_split(block: Keys, sources: list[Part]) -> None:
    """`train[:500]` as a split and a limit."""
    split = block.text("split")
    if split is None:
        return
    match = _SLICE.fullmatch(split)
    if match and not match[3]:
        split, limit = match[1], int(match[2])
    elif re.fullmatch(r"\w+", split):
        limit = None
    else:
        block.lose("split", f"{split}: a share of a split cannot be named; write limit, a number of rows")
        split, limit = re.split(r"\W", split)[0], None
    for source in sources:
        source["split"] = split
        source["limit"] = limit or None


def _read_columns(block: Keys, kind: str, sources: list[Part], title: str, recipe: Recipe) -> None:
    """The row shape: recognized from its keys, or a function that renames them."""
    row: dict[str, str] = {}
    if kind in _TEXT_TYPES:
        column = block.text("field") or block.text("text_column") or "text"
        row = {} if column == "text" else {"text": cell(column)}
    elif kind == "user_defined":
        row = _user_defined(block)
    else:
        row = _turns(block)
        answers = {
            key: block.text(f"field_{key}") for key in ("chosen", "rejected", "completion", "label", "prompt")
        }
        named = {key: column for key, column in answers.items() if column and column != key}
        if named:
            row = {key: cell(column or key) for key, column in answers.items() if column} | row
        if kind and kind not in _NATIVE_TYPES:
            block.lose(
                "type",
                f"{kind}: rows are recognized by their keys; write it as a function: Source(shape=...)",
            )
    if row:
        set_row(recipe, sources, title, "The columns that the Axolotl config names.", row)


def _turns(block: Keys) -> dict[str, str]:
    mapping = block.part("message_property_mappings")
    role = (mapping.text("role") if mapping else None) or block.text("message_field_role")
    content = (mapping.text("content") if mapping else None) or block.text("message_field_content")
    column = block.text("field_messages", "messages") or "messages"
    roles: dict[str, str] = {}
    written = block.part("roles")
    if written is not None:
        for known in ("user", "assistant", "system", "tool"):
            roles |= dict.fromkeys(written.texts(known), known)
    training = block.texts("roles_to_train")
    if training and training not in (["assistant"], ["gpt"], ["assistant", "gpt"]):
        block.lose("roles_to_train", 'the loss is on assistant turns; a turn\'s own "train" puts others in')
    if block.text("message_field_training", "train") not in ("train", "training", "learn", "loss"):
        block.lose(
            "message_field_training",
            'a turn\'s own field is "train", "learn" or "loss": rename it by Source(shape=...)',
        )
    usual = (
        ("from", "value") if (role or "from") == "from" and column == "conversations" else ("role", "content")
    )
    return messages(column, role or usual[0], content or usual[1], roles)


def _user_defined(block: Keys) -> dict[str, str]:
    """The columns of a type that is a mapping: field_instruction, field_input, field_output, field_system."""
    mapping = block.part("type")
    assert mapping is not None
    fields = {key: mapping.text(f"field_{key}") for key in ("system", "instruction", "input", "output")}
    for key in ("format", "no_input_format", "system_format"):
        text = mapping.text(key)
        if text and text.strip("\n ") not in ("{instruction}", "{instruction} {input}", "{system}"):
            mapping.lose(
                key, "the template writes what stands around a turn; write it as a .jinja file: data.template"
            )
    if mapping.text("system_prompt"):
        mapping.lose("system_prompt", "write it as data.system")
    named = {key: column for key, column in fields.items() if column}
    if not named or all(key == column for key, column in named.items()):
        return {}
    for key in ("instruction", "output"):
        named.setdefault(key, key)
    return {key: cell(column) for key, column in named.items()}


def _read_template(keys: Keys, blocks: list[Keys], types: list[tuple[str, str]], recipe: Recipe) -> None:
    """The chat template: of the config, of its datasets, or that of their types."""
    names = [
        name
        for name in (keys.text("chat_template"), *(block.text("chat_template") for block in blocks))
        if name
    ]
    names += [kind for kind, _ in types if kind in ("chatml", "llama3")]
    if not any(kind in ("chat_template", "sharegpt") for kind, _ in types):
        names += [kind for kind, _ in types if kind == "alpaca" and recipe.stage == "sft"][:1]
    jinja = keys.text("chat_template_jinja") or next(
        (text for block in blocks if (text := block.text("chat_template_jinja"))), None
    )
    name = names[0] if names else "tokenizer_default"
    if jinja and (jinja.endswith(".jinja") or name in ("jinja", "tokenizer_default")):
        recipe.data["template"] = jinja
        if not jinja.endswith(".jinja"):
            recipe.templates["template.jinja"] = jinja
            recipe.data["template"] = "template.jinja"
        return
    if name not in _TEMPLATES:
        recipe.decide("data.template", f"{name}: the model's own template; `tuner data` shows what it writes")
    elif "alpaca" in [kind for kind, _ in types] and name != "alpaca" and recipe.stage == "sft":
        recipe.decide(
            "data.template", "for the datasets of type alpaca, too, which had Stanford Alpaca's prompt"
        )
    recipe.data["template"] = _TEMPLATES.get(name, "tokenizer")
