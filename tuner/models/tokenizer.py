"""Tokenizers: any that transformers loads, and InternLM2's from its sentencepiece file alone."""

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tuner import config
from tuner.data.encoding import backend
from tuner.errors import UserError
from tuner.models.folder_files import first_line
from tuner.models.internlm2 import MODEL_TYPE
from tuner.models.internlm2_tokenizer import InternLM2Tokenizer
from tuner.models.locate import locate
from tuner.models.model_file import FILE as MODEL_FILE
from tuner.models.model_file import read_model_file, read_transformers_config

_ONLY_IN_TRANSFORMERS_5 = ("TokenizersBackend", InternLM2Tokenizer.__name__)
"""Values of `tokenizer_class` that transformers 4 does not know."""


def load_tokenizer(model: config.Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; of an adapter, the one saved with it where there is one.

    Raises UserError when the model is missing or has no tokenizer that can be read.
    """
    return read_tokenizer(
        locate(model, weights=False).tokenizer_folder, trust_remote_code=model.trust_remote_code
    )


def read_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, from tokenizer.json or sentencepiece's tokenizer.model.

    Raises UserError when there is none, or it cannot be read.
    """
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        raise UserError(
            f"{folder}: no tokenizer.json or tokenizer.model; copy the base model's tokenizer into it"
        )
    # InternLM2's own code is for transformers 4
    runs_code = trust_remote_code and not _is_internlm2(folder)
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=runs_code)
    except Exception as error:  # the files are the user's: whatever a library raises here is about them
        if Path(folder, MODEL_FILE).is_file():  # transformers reads it, too: it may be that one
            read_transformers_config(folder, trust_remote_code)
        raise UserError(
            f"{folder}: its tokenizer cannot be read ({first_line(error)}); restore it"
        ) from error


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer in a form that both transformers 4 and 5 read."""
    source = Path(str(tokenizer.name_or_path or ""), "tokenizer.model")
    # whoever reads tokenizer.json without transformers would cut or pad every text by what it says
    backend(tokenizer)  # type: ignore[arg-type]
    tokenizer.save_pretrained(str(folder))
    file = Path(folder, "tokenizer_config.json")
    values = json.loads(file.read_text(encoding="utf-8"))
    if values.get("tokenizer_class") in _ONLY_IN_TRANSFORMERS_5:
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = values.pop("extra_special_tokens", None)
    # transformers 4 expects a dict under this name, and has another one for a list
    if isinstance(extra, list):
        values["additional_special_tokens"] = extra
    elif extra is not None:
        values["extra_special_tokens"] = extra
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    # transformers may write tokenizer.json alone, and converters for InternLM2 read the sentencepiece file
    if source.is_file() and not Path(folder, source.name).exists():
        Path(folder, source.name).write_bytes(source.read_bytes())


def _is_internlm2(folder: Path) -> bool:
    return Path(folder, MODEL_FILE).is_file() and read_model_file(folder).model_type == MODEL_TYPE
