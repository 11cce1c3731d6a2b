"""LLaMA-Factory's datasets: their names, looked up in dataset_info.json where it is at hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tuner.errors import UserError
from tuner.importers.keys import Block, Keys
from tuner.importers.part import Part
from tuner.importers.python_syntax import read_text
from tuner.importers.recipe import Recipe
from tuner.importers.row_functions import cell, messages, set_row

INFO = "dataset_info.json"
_HIGHEST = 3
"""Folders above the config in which the folder of datasets is looked for: examples/train_lora/x.yaml names `data`."""
_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
"""Columns of a row -> their names by default."""
_TAGS = {"role_tag": "from", "content_tag": "value"}
_ROLE_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
    "observation_tag": "tool",
    "function_tag": "function_call",
}
"""Tags that name roles -> tuner's roles."""


def read_datasets(keys: Keys, file: Path, recipe: Recipe) -> None:
    """The sources of `dataset` and `eval_dataset`."""
    folder_name = keys.text("dataset_dir", "data") or "data"
    online = folder_name == "ONLINE" or folder_name.startswith("REMOTE:")
    if folder_name.startswith("REMOTE:"):
        keys.lose(
            "dataset_dir",
            "a remote dataset_info.json is not fetched; names of datasets are taken for the hub's",
        )
    folder = None if online else _folder(folder_name, file)
    info = None if folder is None else _read_info(folder / INFO)
    names = keys.texts("dataset")
    if not names:
        keys.refuse("dataset", "is missing; the names of datasets were expected")
    place = _Place(folder or Path(folder_name), info, online)
    recipe.files = [_source(name, place, keys, "dataset", recipe) for name in names]
    for name in keys.texts("eval_dataset"):
        recipe.validation_files.append(_source(name, place, keys, "eval_dataset", recipe))
    if info is None and not online:
        recipe.decide(
            "data.files",
            f"no {INFO} is at hand, so that the files are taken to be {folder_name}/NAME.json: correct them, or run "
            f"`tuner import` where {folder_name} is",
        )
    _read_mixture(keys, recipe)


class _Place:
    """Where datasets are: their folder, what its dataset_info.json says, and whether names are the hub's."""

    def __init__(self, folder: Path, info: Block | None, online: bool) -> None:
        self.folder, self.info, self.online = folder, info, online


def _folder(name: str, file: Path) -> Path | None:
    """The folder with dataset_info.json: from the working directory, or beside or above the config."""
    parents = file.resolve().parents
    candidates = [Path(name), *(parent / name for parent in parents[: _HIGHEST + 1]), file.parent]
    return next((folder for folder in candidates if (folder / INFO).is_file()), None)


def _read_info(path: Path) -> Block:
    try:
        values = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); correct it") from error
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply to be read; correct it") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: an object of datasets was expected; correct it")
    return _as_block(values)


def _as_block(value: Any) -> Any:
    return Block({key: _as_block(item) for key, item in value.items()}) if isinstance(value, dict) else value


def _source(name: str, place: _Place, keys: Keys, key: str, recipe: Recipe) -> Part:
    if place.online or Path(name).suffix in (".json", ".jsonl", ".csv", ".parquet", ".txt"):
        return Part("Source", path=name)
    if place.info is None:
        return Part("Source", path=str(place.folder / f"{name}.json"))
    if name not in place.info or not isinstance(place.info[name], Block):
        keys.refuse(key, f"{name!r} is not in {place.folder / INFO}; correct the name")
    entry = Keys(place.info[name], recipe.report, str(place.folder / INFO), f"{INFO}:{name}.")
    source = _located(entry, place, recipe)
    _read_columns(entry, name, source, recipe)
    entry.finish(
        {"folder": "name the folder's files in data.files", "num_samples": "write limit"},
        dict.fromkeys(("ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"), "the hub is preferred"),
    )
    recipe.report.carried = {key for key in recipe.report.carried if not key.startswith(INFO)}
    return source


def _located(entry: Keys, place: _Place, recipe: Recipe) -> Part:
    """The source of an entry: a dataset on the hub, or a file or folder."""
    hub = entry.text("hf_hub_url")
    other = hub or entry.text("ms_hub_url") or entry.text("om_hub_url")
    if other:
        source = Part("Source", path=other, subset=entry.text("subset"), split=entry.text("split"))
        if not hub:
            source.comment = "not on the Hugging Face hub under this name: from ModelScope or Modelers"
            recipe.report.decided[f"data.files {other}"] = source.comment
    else:
        file = entry.text("file_name")
        if not file:
            entry.refuse(
                "file_name",
                "is missing, and scripts and cloud files cannot be read; name files in data.files",
            )
        path = place.folder / file
        source = Part("Source", path=str(path / "*" if path.is_dir() else path))
    source["limit"] = entry.integer("num_samples")
    return source


def _read_columns(entry: Keys, name: str, source: Part, recipe: Recipe) -> None:
    """The row shape: recognized from its keys, or a function that renames them."""
    columns, tags = entry.part("columns"), entry.part("tags")
    sharegpt = entry.text("formatting", "alpaca") in ("sharegpt", "openai")
    entry.boolean("ranking")
    named = {
        key: None if columns is None else columns.text(key)
        for key in (*_COLUMNS, "system", "tools", "history")
    }
    for key in ("chosen", "rejected", "kto_tag"):
        value = None if columns is None else columns.text(key)
        named[key] = value
    for key in ("images", "videos", "audios"):
        if columns is not None and columns.has(key):
            entry.refuse(
                "columns", f"{name} has {key}, and text models alone are trained; take the dataset out"
            )
    if sharegpt:
        row = _conversation_row(named, tags)
    elif recipe.stage == "text":
        column = named["prompt"] or "text"
        row = {} if column == "text" else {"text": cell(column)}
    else:
        row = _alpaca_row(named, columns is not None)
    if row:
        origin = f"The columns that {INFO} names for {re.sub(r'[^ -~]', '_', name)}."
        set_row(recipe, [source], name, origin, row)


def _alpaca_row(named: dict[str, str | None], renamed: bool) -> dict[str, str]:
    """The keys of tuner's shapes -> sources of columns with other names; empty where all are recognized."""
    if not renamed:
        return {}
    wanted = {"instruction": named["prompt"], "input": named["query"], "history": named["history"]}
    wanted |= {"output": named["response"], "system": named["system"], "tools": named["tools"]}
    wanted |= {"chosen": named["chosen"], "rejected": named["rejected"], "label": named["kto_tag"]}
    if named["chosen"]:
        wanted["output"] = None
    if named["kto_tag"]:  # an answer with a label
        wanted = {"prompt": named["prompt"], "completion": named["response"], "label": named["kto_tag"]}
    row = {key: column for key, column in wanted.items() if column}
    recognized = all(
        key == column or (key, column) == ("instruction", "question") for key, column in row.items()
    )
    return {} if recognized else {key: cell(column) for key, column in row.items()}


def _conversation_row(named: dict[str, str | None], tags: Keys | None) -> dict[str, str]:
    column = named["messages"] or "conversations"
    role, content = (
        (tags.text(key) if tags is not None else None) or default for key, default in _TAGS.items()
    )
    roles = {} if tags is None else {tags.text(key): known for key, known in _ROLE_TAGS.items()}
    row = messages(column, role, content, {name: known for name, known in roles.items() if name})
    extra = {"chosen": named["chosen"], "rejected": named["rejected"], "label": named["kto_tag"]}
    extra |= {"system": named["system"], "tools": named["tools"]}
    extra = {key: other for key, other in extra.items() if other}
    if not row and any(key != other for key, other in extra.items()):
        row = {"messages" if role == "role" else "conversations": cell(column)}
    return {**row, **{key: cell(other) for key, other in extra.items()}} if row else {}


def _read_mixture(keys: Keys, recipe: Recipe) -> None:
    """Shares of interleaved datasets."""
    strategy = keys.text("mix_strategy", "concat")
    shares = keys.texts("interleave_probs")
    if strategy != "concat" and len(shares) == len(recipe.files):
        for source, share in zip(recipe.files, shares, strict=True):
            try:
                source["share"] = float(share)
            except ValueError:
                keys.refuse("interleave_probs", f"{share!r} is no number; correct it")
        recipe.decide(
            "data.files", "shares are of tokens, not of rows, and no row is repeated within an epoch"
        )
    elif strategy != "concat":
        keys.lose(
            "mix_strategy",
            f"{strategy} without interleave_probs: all rows are shuffled together; see Source(share=...)",
        )
