"""XTuner 0.2's prompt templates: those of tuner that write the same, or a Jinja file that does."""

from __future__ import annotations

from collections.abc import Mapping

COUNTERPARTS = {
    "gemma": "gemma",
    "internlm2_chat": "internlm2",
    "llama3_chat": "llama3",
    "minicpm3": "chatml",
    "mistral": "mistral",
    "mixtral": "mistral",
    "qwen_chat": "qwen",
}
"""Name in PROMPT_TEMPLATE -> tuner's template of the same family."""
DIFFERENT = {
    "gemma": "a system turn opens the first user turn",
    "mistral": "as Mistral publishes it, without XTuner's spaces and its turn of the system's own",
    "mixtral": "as Mistral publishes it, without XTuner's spaces and its turn of the system's own",
}
"""Of these, what tuner writes differently."""
MARKERS: dict[str, dict[str, str | bool]] = {
    "baichuan2_chat": {
        "SYSTEM": "{system}\n",
        "INSTRUCTION": "<reserved_106>{input}<reserved_107>",
        "SEP": "\n",
    },
    "baichuan_chat": {
        "SYSTEM": "{system}\n",
        "INSTRUCTION": "<reserved_102>{input}<reserved_103>",
        "SEP": "\n",
    },
    "chatglm3": {
        "SYSTEM": "<|system|>\n{system}",
        "INSTRUCTION": "<|user|>\n{input}<|assistant|>\n",
        "SEP": "\n",
    },
    "deepseek_moe": {
        "SYSTEM": "[INST] {system} [/INST]\n",
        "INSTRUCTION": "[INST] {input} [/INST]",
        "SEP": "\n",
    },
    "default": {
        "SYSTEM": "<|System|>:{system}\n",
        "INSTRUCTION": "<|User|>:{input}\n<|Bot|>:",
        "SEP": "\n",
    },
    "internlm_chat": {
        "SYSTEM": "<|System|>:{system}\n",
        "INSTRUCTION": "<|User|>:{input}<eoh>\n<|Bot|>:",
        "SUFFIX": "<eoa>",
        "SUFFIX_AS_EOS": True,
        "SEP": "\n",
    },
    "minicpm": {"INSTRUCTION": "<用户> {input} <AI>", "SEP": "\n"},
    "phi3_chat": {
        "SYSTEM": "<|system|>\n{system}<|end|>\n",
        "INSTRUCTION": "<|user|>\n{input}<|end|>\n<|assistant|>\n",
        "SUFFIX": "<|end|>",
        "SUFFIX_AS_EOS": True,
        "SEP": "\n",
    },
    "zephyr": {
        "SYSTEM": "<|system|>\n{system}\n",
        "INSTRUCTION": "<|user|>\n{input}\n<|assistant|>\n",
        "SEP": "\n",
    },
}
"""The markers of templates without a counterpart, as XTuner writes them around turns (xtuner/utils/templates.py)."""
_KNOWN = {"SYSTEM", "INSTRUCTION", "SUFFIX", "SUFFIX_AS_EOS", "SEP", "STOP_WORDS"}


def jinja_template(name: str, markers: Mapping[str, object]) -> str | None:
    """A Jinja template that writes turns between such markers; None where they hold more than a text's place."""
    texts = {key: markers.get(key, "") for key in ("SYSTEM", "INSTRUCTION", "SUFFIX", "SEP")}
    system, instruction = str(texts["SYSTEM"]) or "{system}", str(texts["INSTRUCTION"])
    readable = all(isinstance(text, str) for text in texts.values()) and set(markers) <= _KNOWN
    if not readable or not _holds_only(system, "{system}") or not _holds_only(instruction, "{input}"):
        return None
    end = "" if markers.get("SUFFIX_AS_EOS") else " + eos_token"
    return f"""\
{{#- XTuner's PROMPT_TEMPLATE.{name}. BOS stands first, once; no place for tools. -#}}
{{%- if tools %}}{{{{ raise_exception('it has no place for tools') }}}}{{% endif %}}
{{{{- text_bos }}}}
{{%- for message in messages %}}
    {{%- if message.role == 'assistant' and not message.tool_calls %}}
        {{%- generation %}}{{{{ message.content + {texts["SUFFIX"]!r}{end} }}}}{{% endgeneration %}}
        {{{{- {texts["SEP"]!r} }}}}
    {{%- elif message.role == 'user' %}}
        {{{{- {_around(instruction, "{input}")} }}}}
    {{%- elif message.role == 'system' %}}
        {{{{- {_around(system, "{system}")} }}}}
    {{%- else %}}
        {{{{- raise_exception('its turns are system, user and assistant, without tool calls') }}}}
    {{%- endif %}}
{{%- endfor %}}
"""


def _holds_only(text: str, place: str) -> bool:
    return text.count(place) == 1 and not {"{", "}"} & set(text.replace(place, ""))


def _around(text: str, place: str) -> str:
    before, _, after = text.partition(place)
    return f"{before!r} + message.content + {after!r}"
