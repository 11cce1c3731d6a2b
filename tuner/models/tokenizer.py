"""Tokenizers: any that transformers loads, and InternLM2's from its bare sentencepiece file."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tuner import config
from tuner.errors import UserError
from tuner.models.locate import first_line, locate

_CHAT_TOKENS = {
    "[UNUSED_TOKEN_141]": "<|plugin|>",
    "[UNUSED_TOKEN_142]": "<|interpreter|>",
    "[UNUSED_TOKEN_143]": "<|action_end|>",
    "[UNUSED_TOKEN_144]": "<|action_start|>",
    "[UNUSED_TOKEN_145]": "<|im_end|>",
    "[UNUSED_TOKEN_146]": "<|im_start|>",
}
"""What InternLM2's chat models call the last six entries of their sentencepiece file, ids 92538 to 92543."""


def load_tokenizer(model: config.Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, an adapter's own where it was saved with it.

    Raises UserError when the model is not found or has no tokenizer that can be read.
    """
    return read_tokenizer(locate(model).tokenizer_folder, trust_remote_code=model.trust_remote_code)


def read_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder (tokenizer.json, or tokenizer.model of sentencepiece)."""
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        raise UserError(
            f"{folder}: no tokenizer.json or tokenizer.model; copy the base model's tokenizer into it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{folder}: its tokenizer cannot be read ({first_line(error)}); restore it"
        ) from error
    return _with_chat_tokens(tokenizer)


def _with_chat_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give the unused entries of InternLM2's bare sentencepiece file their names, ids unchanged."""
    known = tokenizer.get_vocab()
    if "<|im_start|>" in known or not all(name in known for name in _CHAT_TOKENS):
        return tokenizer
    text = tokenizer.backend_tokenizer.to_str()
    for unused, name in _CHAT_TOKENS.items():
        text = text.replace(json.dumps(unused), json.dumps(name))
    tokenizer._tokenizer = Tokenizer.from_str(text)
    tokenizer.add_special_tokens({"additional_special_tokens": list(_CHAT_TOKENS.values())})
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer so that transformers 4 and 5, and tools built on either, read it."""
    source = Path(str(tokenizer.name_or_path or ""), "tokenizer.model")
    tokenizer.save_pretrained(str(folder))
    file = Path(folder, "tokenizer_config.json")
    values = json.loads(file.read_text(encoding="utf-8"))
    if values.get("tokenizer_class") == "TokenizersBackend":  # the name that transformers 5 gave it
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = values.pop("extra_special_tokens", None)
    if isinstance(extra, list):
        values["additional_special_tokens"] = extra
    elif extra is not None:
        values["extra_special_tokens"] = extra
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if source.is_file() and not Path(folder, source.name).exists():
        Path(folder, source.name).write_bytes(source.read_bytes())
