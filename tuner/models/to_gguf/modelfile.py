"""Ollama's Modelfile: the GGUF file, the chat template as Go's text/template, and the texts that end an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tuner.models.to_gguf.chat_format import chat_format
from tuner.models.to_gguf.vocabulary import begins_with_bos, further_ends

NO_TEMPLATE = (
    "# No TEMPLATE: this model's chat template cannot be written as one of Ollama's, which then reads the one in the\n"
    "# GGUF file as far as it knows it; check an answer before you use it.\n"
)


def modelfile(tokenizer: Any, folder: Path, model: str, adapter: str | None = None) -> str:
    """The text of a Modelfile. folder: the model's, for its end tokens. model, adapter: GGUF files, as Ollama finds
    them."""
    lines = [f"FROM {model}"] + ([f"ADAPTER {adapter}"] if adapter else [])
    if (form := chat_format(tokenizer)) is not None:
        lines.append(f'TEMPLATE """{form.for_ollama(begins_with_bos(tokenizer))}"""')
    elif tokenizer.chat_template:
        lines.append(NO_TEMPLATE.rstrip())
    ends = [tokenizer.eos_token_id, *further_ends(tokenizer, folder)]
    for token in ends:
        if token is not None:
            lines.append(
                f"PARAMETER stop {json.dumps(tokenizer.convert_ids_to_tokens(token), ensure_ascii=False)}"
            )
    return "\n".join(lines) + "\n"
