"""Rows that teach the embedded model to look things up, for scripts/measure_context.py.

Bare texts, each harder than the one before: a few letters over and over, then words and numbers, then facts,
each time in another order. And the tasks' own conversations over a text with facts in it, several
questions each, in English and Chinese: facts by key, and chains of variables. Texts, keys and values are others than
those of `tuner eval --tasks`. Passages of scripture stand between them, so that language is not forgotten and loss by
position can be measured.
"""

import itertools
import json
import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tiny_corpus import scripture

from tuner.evaluation.context_tasks import HOPS, WORDINGS, Wording, distinct_names, draw_value

LETTERS = string.digits + string.ascii_uppercase
"""Few, so that copying is all there is to learn from a row."""
CHINESE = range(0x4E00, 0x9F00)
"""Characters of Chinese keys."""
ZH_PARTS = (
    ("老人", "学生", "农夫", "姐姐", "客人", "船夫", "木匠", "哥哥", "邻居", "先生"),
    ("在山上", "在树下", "在海边", "在院子里", "在灯下", "在桥上", "在村口", "在庙里"),
    ("喝茶", "写字", "种花", "看星星", "收稻子", "等一封信", "修马车", "唱歌", "画画", "做饭"),
)
"""A sentence has one of each."""
Keys = dict[str, tuple[str, ...]]
"""Language -> keys of facts."""
CHAINED = " VAR {key} = {value}."
FORMS = {
    " {key} is {value}.": 0.25,
    " {key} {value}": 0.15,
    " The number of the {key} is {value}.": 0.15,
    "{key}是{value}。": 0.1,
    "{key}的号码是{value}。": 0.15,
    CHAINED: 0.2,
}
"""Form of a fact -> its share of the recitals."""
Questions = list[tuple[str, str]]
"""Each with its answer."""
QUESTIONS = 24
"""Of a row at most: many answers to learn from one reading."""
ROOM_FOR_CHAINS = 250
"""Tokens that a row with two chains of variables and a few questions has at least."""
PASSAGE = "Read on."


def haystacks(corpus: Path) -> dict[str, tuple[Sequence[str], Sequence[str]]]:
    """Language -> sentences of training, and held out, of each language."""
    verses = [verse for document in scripture(corpus) for verse in re.split(r"(?<=[.?])\s", document)]
    verses = [verse for verse in verses if 20 < len(verse) < 200]
    chinese, cut = ["".join(parts) + "。" for parts in itertools.product(*ZH_PARTS)], len(verses) * 9 // 10
    return {"en": (verses[:cut], verses[cut:]), "zh": (chinese, chinese)}


def lexicon(corpus: Path) -> Keys:
    """Language -> keys of facts, without those of the tasks."""
    words = {word.lower() for verse in scripture(corpus) for word in verse.split() if word.isalpha()}
    drawn, characters = random.Random("keys"), [chr(code) for code in CHINESE]
    chinese = {"".join(drawn.choices(characters, k=drawn.randint(1, 2))) for _ in range(len(words))}
    return {
        "en": tuple(sorted(words - set(WORDINGS["en"].keys))),
        "zh": tuple(sorted(chinese - set(WORDINGS["zh"].keys))),
    }


def echo(drawn: random.Random, _keys: Keys, length: int, _size: Callable[[str], int]) -> str:
    """A few letters and digits, no two alike, over and over: about `length` of them."""
    text = "".join(drawn.sample(LETTERS, drawn.randint(4, 12)))
    return text * max(2, length // len(text))


def medley(drawn: random.Random, keys: Keys, length: int, size: Callable[[str], int]) -> str:
    """A few words, numbers, names and characters over and over, in about `length` tokens."""
    text = "".join(_item(drawn, keys) for _ in range(drawn.randint(2, 8)))
    return text * max(2, length // size(text))


def recital(drawn: random.Random, keys: Keys, length: int, size: Callable[[str], int]) -> str:
    """Facts of one form over and over, each time in another order, in about `length` tokens."""
    facts = _facts(drawn, keys, drawn.randint(2, 6))
    times = max(2, round(length / size("".join(facts))))
    return "".join("".join(drawn.sample(facts, len(facts))) for _ in range(times))


def task_row(
    drawn: random.Random,
    sentences: Sequence[str],
    keys: Sequence[str],
    language: str,
    length: int,
    size: Callable[[str], int],
) -> dict[str, object]:
    """A conversation of about `length` tokens, from 512 on never more, with its questions in random order."""
    words = WORDINGS[language]
    facts, asked = (
        _chains(drawn, words)
        if length >= ROOM_FOR_CHAINS and drawn.random() < 0.4
        else _keyed(drawn, words, keys, min(QUESTIONS, max(1, length // 50)))
    )
    drawn.shuffle(asked)
    asked, texts = asked[:QUESTIONS], list[str]()
    while (
        room := length
        - 40
        - sum(map(size, facts))
        - sum(size(f"{question} {answer}") + 20 for question, answer in asked)
    ) < 0 and len(asked) > 1:
        asked.pop()
    while (cost := size(text := drawn.choice(sentences)) + 1) <= room:
        texts.append(text)
        room -= cost
    places = sorted(drawn.randint(0, len(texts)) for _ in facts)
    for place, fact in reversed(list(zip(places, facts, strict=True))):
        texts.insert(place, fact)
    (first, answer), *others = asked
    turns = [("user", f"{words.introduction}\n\n{words.joint.join(texts)}\n\n{first}"), ("assistant", answer)]
    for question, answer in others:
        turns += [("user", question), ("assistant", answer)]
    return _conversation(turns)


def bare_row(text: str, bare: bool) -> dict[str, object]:
    """A text as a row; bare: of no conversation, else as an assistant's words to no question."""
    return {"text": text} if bare else _conversation([("assistant", text)])


def passage_row(
    drawn: random.Random, verses: Sequence[str], length: int, size: Callable[[str], int]
) -> dict[str, object]:
    """Consecutive verses of about `length` tokens as an answer."""
    start, texts, room = drawn.randrange(len(verses)), [], length - 40
    while (cost := size(text := verses[(start + len(texts)) % len(verses)]) + 1) <= room:
        texts.append(text)
        room -= cost
    return _conversation([("user", PASSAGE), ("assistant", "\n".join(texts))])


def write_rows(file: Path, rows: Iterator[dict[str, object]]) -> None:
    """Write a JSONL file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _conversation(turns: Sequence[tuple[str, str]]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _item(drawn: random.Random, keys: Keys) -> str:
    kind = drawn.random()
    if kind < 0.35:
        return f" {drawn.choice(keys['en'])}"
    if kind < 0.55:
        return drawn.choice(keys["zh"])
    return f" {drawn.randrange(10, 10_000)}" if kind < 0.8 else f" {distinct_names(drawn, 1)[0]}"


def _facts(drawn: random.Random, keys: Keys, count: int) -> list[str]:
    (form,) = drawn.choices(list(FORMS), FORMS.values())
    if form == CHAINED:
        names = distinct_names(drawn, count)
        sources = (draw_value(drawn) if drawn.random() < 0.5 else f"VAR {drawn.choice(names)}" for _ in names)
        return [form.format(key=name, value=source) for name, source in zip(names, sources, strict=True)]
    chosen = (drawn.choice(keys["en" if form.isascii() else "zh"]) for _ in range(count))
    return [form.format(key=key, value=draw_value(drawn)) for key in chosen]


def _keyed(
    drawn: random.Random, words: Wording, keys: Sequence[str], most: int
) -> tuple[list[str], Questions]:
    """Facts by key, and the question and answer of each."""
    chosen = drawn.sample(keys, drawn.randint(1, most))
    facts = [words.fact.format(key=key, value=draw_value(drawn)) for key in chosen]
    return facts, [(words.question.format(key=key), fact) for key, fact in zip(chosen, facts, strict=True)]


def _chains(drawn: random.Random, words: Wording) -> tuple[list[str], Questions]:
    """Two chains of variables, and a question for each variable; the answer goes back along its chain, fact by fact."""
    names = distinct_names(drawn, 2 * (HOPS + 1))
    chains: list[list[str]] = []
    questions: Questions = []
    for chain in (names[: HOPS + 1], names[HOPS + 1 :]):
        sources = [draw_value(drawn), *(f"VAR {name}" for name in chain)]
        facts = [f"VAR {name} = {source}." for name, source in zip(chain, sources, strict=False)]
        chains.append(facts)
        for place, name in enumerate(chain):
            steps = " ".join(reversed(facts[: place + 1]))
            questions.append((words.variable_question.format(name=name), steps))
    # each chain in its order, the two in turn, as in the task
    return [fact for pair in zip(*chains, strict=True) for fact in pair], questions
