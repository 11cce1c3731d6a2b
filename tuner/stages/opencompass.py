"""A config for OpenCompass: a run's model, and those it was trained from, on OpenCompass's own datasets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tuner.data.template import Template
from tuner.errors import UserError
from tuner.models.chat import end_ids
from tuner.models.locate import Location, locate
from tuner.models.tokenizer import read_tokenizer
from tuner.stages.lineage import Generation, lineage

_DATASET = re.compile(r"(\w+)(?:\.(\w+))?", re.ASCII)
_HEAD = """\
# Written by `tuner eval {path} --opencompass`. Run it with `opencompass FILE`, in OpenCompass's own environment.
# OpenCompass runs Python code that a model folder brings along.
from mmengine.config import read_base

with read_base():
"""
_DATASETS = """
datasets = sum((value for name, value in locals().items() if name.endswith("_datasets")), [])
"""


def opencompass_config(
    path: str,
    datasets: Sequence[str],
    against: Sequence[str] = (),
    *,
    alone: bool = False,
    trust: bool = False,
) -> str:
    """The text of the config.

    datasets: "gsm8k" stands for OpenCompass's `gsm8k/gsm8k_gen.py`, "gsm8k.gsm8k_gen_1d7fe4" for this file. alone: the
    model without those it was trained from. Raises UserError for another name, and for a model that OpenCompass would
    load otherwise than it was trained.
    """
    members = lineage(path, trust=trust)[-1 if alone else 0 :]
    members += [lineage(other, trust=trust)[-1] for other in against]
    imports = "".join(f"    from {_module(name)} import *\n" for name in datasets)
    models = ",\n".join(f"    {_model(member, members[-1 - len(against)])}" for member in members)
    return f"{_HEAD.format(path=ascii(path)[1:-1])}{imports}{_DATASETS}models = [\n{models},\n]\n"


def _module(name: str) -> str:
    match = _DATASET.fullmatch(name)
    if match is None:
        raise UserError(
            f"{name}: no dataset of OpenCompass; name a folder of its configs/datasets (gsm8k), or a file in one "
            "(gsm8k.gsm8k_gen)"
        )
    folder, file = match[1], match[2] or f"{match[1]}_gen"
    return f"opencompass.configs.datasets.{folder}.{file}"


def _model(member: Generation, run: Generation) -> str:
    """A model's entry. run: whose chat template one without its own is prompted in."""
    location = locate(member.model, weights=False)
    _refuse_other_base(member, location)
    trust, templated = member.model.trust_remote_code, location
    if not _tokenizer(location, trust).chat_template:
        templated = locate(run.model, weights=False)
    tokenizer = _tokenizer(templated, trust)
    has_template = bool(tokenizer.chat_template)
    values: dict[str, Any] = {
        "type": f"opencompass.models.{'HuggingFacewithChatTemplate' if has_template else 'HuggingFaceBaseModel'}",
        "abbr": member.name,
        "path": str(location.base_folder.resolve()),
        "tokenizer_path": str(templated.tokenizer_folder.resolve()),
        "model_kwargs": {
            "torch_dtype": {"bf16": "torch.bfloat16", "fp32": "torch.float32"}[member.precision]
        },
        "max_out_len": 1024,
        "batch_size": 8,
        "run_cfg": {"num_gpus": 1},
    }
    if location.adapter_folder is not None:
        values["peft_path"] = str(location.adapter_folder.resolve())
    if has_template:
        ends = end_ids(Template("tokenizer", tokenizer), tokenizer)
        # OpenCompass knows the tokenizer's and the base's end tokens only
        values["stop_words"] = sorted(str(tokenizer.decode([end])) for end in ends)
    # ascii: a name may hold anything, and the file is a program
    return f"dict({', '.join(f'{name}={value!a}' for name, value in values.items())})"


def _tokenizer(location: Location, trust: bool) -> Any:
    tokenizer: Any = read_tokenizer(location.tokenizer_folder, trust_remote_code=trust)
    return tokenizer


def _refuse_other_base(member: Generation, location: Location) -> None:
    """UserError where the base is changed when tuner loads it: OpenCompass takes it as it stands in its folder."""
    base = location.reference
    changes = {"quantization": base.quantization, "rope": base.rope, "embedding_rows": base.embedding_rows}
    changed = [name for name, value in changes.items() if value is not None]
    if changed:
        raise UserError(
            f"{member.name}: tuner loads its base with {' and '.join(changed)}, as the run was trained, and "
            "OpenCompass does not; `tuner merge` the run, and name the merged folder"
        )
