"""A small byte-level tokenizer with the special tokens of every family, and rows written to files."""

import json
import os
import pydoc_data.topics
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

FAMILY_TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<|action_start|>", "<|action_end|>", "<|plugin|>", "<|interpreter|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"),
    *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)
CHINESE = "请给我介绍五个上海的景点：外滩、豫园、东方明珠。学而时习之，不亦说乎？"


def make_tokenizer(special=FAMILY_TOKENS, adds_bos=True, vocab_size=700):
    """A BPE trained on Python's own documentation; it puts <s> before text as Llama's and InternLM2's do."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [pydoc_data.topics.topics[name] for name in ("assert", "if", "while", "lambda", "yield", "with")]
    tokenizer.train_from_iterator([*corpus, CHINESE], trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def bare_tokenizer():
    """One that knows no chat tokens."""
    return make_tokenizer(special=())


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test sees another's cache."""
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write(tmp_path):
    """write("x.jsonl", row, row, ...) -> the path; a str is written as a line as it stands."""

    def write_file(name: str, *rows) -> str:
        path = Path(tmp_path) / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write_file


def chat(*contents: str, **row) -> dict:
    """A row of alternating user and assistant messages."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)], **row}
