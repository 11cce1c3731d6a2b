"""XTuner 0.2's datasets: sources, map functions, packing."""

from __future__ import annotations

import re
from typing import Any

from tuner.errors import UserError
from tuner.importers.keys import Block, Keys
from tuner.importers.part import Function, Part
from tuner.importers.recipe import Recipe
from tuner.importers.row_functions import cell, set_row

NATIVE = {
    "alpaca_map_fn": "",
    "code_alpaca_map_fn": "coder",
    "intel_orca_dpo_map_fn": "",
    "medical_map_fn": "medical",
    "openai_map_fn": "",
    "orpo_dpo_mix_40k_map_fn": "",
    "pretrain_map_fn": "",
    "tiny_codes_map_fn": "coder",
    "wizardlm_map_fn": "",
}
"""Map functions whose rows tuner reads by their keys -> the name of the system prompt that they add."""
CONVERTED = {
    "alpaca_zh_map_fn": ("", {"instruction": "instruction_zh", "input": "input_zh", "output": "output_zh"}),
    "arxiv_map_fn": ("arxiv_gentile", {"prompt": "abstract", "completion": "title"}),
    "crime_kg_assitant_map_fn": ("lawyer", {"prompt": "input", "completion": "output"}),
    "default_map_fn": ("", {"prompt": "input", "completion": "output"}),
    "law_reference_map_fn": ("lawyer", {"prompt": "question", "completion": "answer"}),
    "openorca_map_fn": ("", {"system": "system_prompt", "prompt": "question", "completion": "response"}),
    "stack_exchange_map_fn": ("", {"prompt": "question", "completion": "response"}),
}
"""Map functions of rows with other keys -> (name of the system prompt that they add, tuner's keys -> columns)."""
_COMPUTED = {
    "colors_map_fn": (
        "colorist",
        {"prompt": 'row["description"].partition(":")[2].strip()', "completion": cell("color")},
    ),
    "sql_map_fn": (
        "sql",
        {"prompt": 'row["context"] + "\\n" + row["question"]', "completion": cell("answer")},
    ),
}
"""Map functions that put columns together -> (name of the system prompt that they add, tuner's keys -> source)."""
_OASST1 = '''
def oasst1(row: dict) -> dict:
    """OpenAssistant's `### Human: ...### Assistant: ...` as messages; a last turn without an answer is left out."""
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [turn.strip().partition(":") for turn in row["text"].split("###")]
    messages = [{"role": roles[who], "content": text.strip()} for who, _, text in turns if who in roles]
    return {"messages": messages[: len(messages) // 2 * 2]}
'''
_HF_FILES = ("json", "csv", "parquet", "text", "arrow")
"""Builders of `load_dataset` that read the files of `data_files`."""
_LOADERS = ("load_dataset", "load", "load_from_disk", "load_jsonl_dataset")
_REFUSED = {
    "LLaVADataset": "trains on images",
    "MOSSSFTDataset": "reads MOSS's plugin files",
    "load_intern_repo_tokenized_dataset": "reads InternEvo's tokens",
    "load_intern_repo_untokenized_dataset": "reads InternEvo's files",
}


def last_name(value: Any) -> str:
    """The last part of a dotted name: of a symbol, or of the text that XTuner writes for it into a run's folder."""
    return value.rpartition(".")[2] if isinstance(value, str) else ""


def type_name(keys: Keys) -> str:
    """The name of a block's `type`: `load` of MsDataset.load, `from_pretrained` of AutoTokenizer.from_pretrained."""
    return last_name(keys.take("type"))


def read_datasets(keys: Keys, recipe: Recipe) -> list[Keys]:
    """The blocks of the training sets, whose sources are added to the recipe."""
    name = type_name(keys)
    if name == "ConcatDataset":
        blocks = keys.parts("datasets")
    elif name == "build_packed_dataset":
        keys.ignore("packed_samples_num", "packing is planned anew in every epoch")
        inner = keys.part("dataset_cfg")
        blocks = [] if inner is None else [inner]
        recipe.data["max_length"] = keys.integer("max_length", recipe.data.get("max_length"))
    else:
        _read_dataset(keys, name, recipe)
        return [keys]
    read: list[Keys] = []
    for block in blocks:
        read += read_datasets(block, recipe)
    return read


def _read_dataset(keys: Keys, name: str, recipe: Recipe) -> None:
    if name in _REFUSED:
        keys.refuse(
            "type", f"{name} {_REFUSED[name]}, which cannot be carried; see docs/data.md for what tuner reads"
        )
    if name not in ("process_hf_dataset", "process_ms_dataset", "build_preference_dataset"):
        keys.refuse(
            "type", f"{name or 'it'} is no dataset that is known; see docs/from_xtuner.md for those that are"
        )
    if not keys.boolean("do_dataset_tokenization", True):
        keys.refuse("do_dataset_tokenization", "its rows are tokens, and tuner reads texts; name the texts")
    if keys.has("tokenizer"):
        keys.ignore("tokenizer", "the model's own")
    inner = keys.part("dataset")
    if inner is None:
        keys.refuse("dataset", "is missing; a source of rows was expected")
    sources = _sources(inner, recipe, name == "process_ms_dataset")
    map_fn = last_name(keys.take("dataset_map_fn"))
    split, limit = keys.text("split"), keys.integer("max_dataset_length")
    for source in sources:
        if split:
            source["split"] = split
        source["limit"] = limit
    _convert(keys, map_fn, sources, recipe)
    recipe.files += sources
    if keys.take("rename_maps"):
        keys.lose("rename_maps", "rename the columns in a function: Source(shape=...)")


def _sources(keys: Keys, recipe: Recipe, modelscope: bool) -> list[Part]:
    """The sources of `load_dataset` and its like."""
    name = type_name(keys)
    if name not in _LOADERS and name != "Dataset":
        keys.refuse("type", f"{name or 'it'} is no loader that is known; name the files by load_dataset")
    path = keys.text("path") or keys.text("dataset_path") or keys.text("dataset_name")
    data_files = keys.take("data_files")
    files = [file for file in _files(data_files) if isinstance(file, str)]
    if data_files is not None and not files:
        keys.lose("data_files", "holds no names of files; write them into data.files")
    if path in _HF_FILES or name == "load_jsonl_dataset":
        if not files:
            keys.refuse("data_files", "names no files; write their paths")
        return [Part("Source", path=file) for file in files]
    if not path:
        keys.refuse("path", "is missing; the name of a dataset or a folder was expected")
    source = Part("Source", path=path, subset=keys.text("name"), split=keys.text("split"))
    if files:
        keys.lose(
            "data_files",
            f"files of a dataset on the hub cannot be chosen; download them and name them: {files[:3]}",
        )
    if modelscope or name == "load":
        source.comment = "from ModelScope: the name on the hub may differ"
        recipe.report.decided[f"data.files {path}"] = source.comment
    return [source]


def _files(value: Any) -> list[Any]:
    if isinstance(value, Block):
        return [file for files in value.values() for file in _files(files)]
    return list(value) if isinstance(value, list | tuple) else [value] if value is not None else []


def _convert(keys: Keys, map_fn: str, sources: list[Part], recipe: Recipe) -> None:
    """The row shape of the sources, by the map function."""
    system = ""
    if map_fn == "oasst1_map_fn":
        name = Function(recipe.function_name("oasst1", _OASST1))
        for source in sources:
            source["shape"] = name
    elif map_fn in CONVERTED or map_fn in _COMPUTED:
        system, columns = CONVERTED.get(map_fn, ("", {}))
        row = {key: cell(column) for key, column in columns.items()}
        if not row:
            system, row = _COMPUTED[map_fn]
        set_row(recipe, sources, map_fn.removesuffix("_map_fn"), f"As XTuner's {map_fn}.", row)
    elif map_fn in NATIVE:
        system = NATIVE[map_fn]
    elif map_fn:
        keys.lose(
            "dataset_map_fn",
            f"{map_fn}: rows are recognized by their keys; write it as a function: Source(shape=...)",
        )
    if map_fn == "pretrain_map_fn":
        recipe.stage = "text"
    if system:
        keys.lose(
            "dataset_map_fn",
            f"{map_fn} also adds the system prompt SYSTEM_TEMPLATE.{system}; write its text as data.system",
        )


def same_in_all(blocks: list[Keys], key: str) -> Any:
    """A key's value, which all datasets must share. Raises UserError where they differ."""
    values = [block.take(key) for block in blocks]
    if any(value != values[0] for value in values):
        raise UserError(
            f"{blocks[0].where(key)}: {key} differs between the datasets of a config; write one for each"
        )
    return values[0] if values else None


def template_name(value: Any) -> str:
    """`internlm2_chat` of PROMPT_TEMPLATE.internlm2_chat, or of the text that stands for it."""
    match = re.search(r"PROMPT_TEMPLATE\.(\w+)$", value) if isinstance(value, str) else None
    return match[1] if match else value if isinstance(value, str) else ""
