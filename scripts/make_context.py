"""Rows that teach the embedded model to look things up, for scripts/measure_context.py.

Conversations over a text with facts in it, several questions each, in English and Chinese: facts by key, and chains of
variables. Texts, keys and values are others than those of `tuner eval --tasks`. Passages of scripture stand between
them, so that language is not forgotten and loss by position can be measured, and the sums of the quickstart.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tiny_corpus import scripture

from tuner.evaluation.context_tasks import HOPS, WORDINGS, Wording, distinct_names, draw_value

KEYS = {
    "en": (
        *(
            "anchor",
            "barrel",
            "crown",
            "drum",
            "engine",
            "flute",
            "glove",
            "harp",
            "iron",
            "jar",
            "knife",
            "ladder",
        ),
        *(
            "mill",
            "nest",
            "oven",
            "plough",
            "quill",
            "ring",
            "saddle",
            "tent",
            "urn",
            "vine",
            "wagon",
            "yoke",
        ),
    ),
    "zh": (
        "船锚",
        "木桶",
        "王冠",
        "鼓",
        "笛子",
        "手套",
        "琴",
        "铁",
        "罐子",
        "刀",
        "梯子",
        "磨坊",
        "鸟巢",
        "炉子",
        "犁",
        "笔",
    ),
}
ZH_HAYSTACK = (
    "山上有一座小庙。",
    "老人坐在树下喝茶。",
    "马车慢慢走过桥。",
    "学生在灯下写字。",
    "海边的沙子很白。",
    "农夫收完了稻子。",
    "夜里星星很亮。",
    "姐姐在院子里种花。",
    "客人带来了一封信。",
    "冬天的河水结了冰。",
)
Questions = list[tuple[str, str]]
"""Each with its answer."""
QUESTIONS = 8
"""Of a row at most: many answers to learn from one reading."""
PASSAGE = "Read on."


def haystacks(corpus: Path) -> dict[str, tuple[Sequence[str], Sequence[str]]]:
    """Language -> sentences of training, and held out, of each language."""
    verses = [verse for verse in scripture(corpus) if 20 < len(verse) < 200]
    cut = len(verses) * 9 // 10
    return {"en": (verses[:cut], verses[cut:]), "zh": (ZH_HAYSTACK, ZH_HAYSTACK)}


def task_row(
    drawn: random.Random, sentences: Sequence[str], language: str, length: int, size: Callable[[str], int]
) -> dict[str, object]:
    """A conversation of about `length` tokens, never more, with its questions in random order."""
    words = WORDINGS[language]
    facts, asked = (
        _chains(drawn, words)
        if drawn.random() < 0.4
        else _keyed(drawn, words, language, min(8, length // 70))
    )
    drawn.shuffle(asked)
    asked, texts = asked[:QUESTIONS], list[str]()
    while (
        room := length
        - 40
        - sum(map(size, facts))
        - sum(size(f"{question} {answer}") + 20 for question, answer in asked)
    ) < 0:
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
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def passage_row(
    drawn: random.Random, verses: Sequence[str], length: int, size: Callable[[str], int]
) -> dict[str, object]:
    """Consecutive verses of about `length` tokens as an answer."""
    start, texts, room = drawn.randrange(len(verses)), [], length - 40
    while (cost := size(text := verses[(start + len(texts)) % len(verses)]) + 1) <= room:
        texts.append(text)
        room -= cost
    turns = [{"role": "user", "content": PASSAGE}, {"role": "assistant", "content": "\n".join(texts)}]
    return {"messages": turns}


def write_rows(file: Path, rows: Iterator[dict[str, object]]) -> None:
    """Write a JSONL file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _keyed(drawn: random.Random, words: Wording, language: str, most: int) -> tuple[list[str], Questions]:
    """Facts by key, and the question and answer of each."""
    keys = drawn.sample(KEYS[language], drawn.randint(1, most))
    values = [draw_value(drawn) for _ in keys]
    pairs = list(zip(keys, values, strict=True))
    facts = [words.fact.format(key=key, value=value) for key, value in pairs]
    return facts, [(words.question.format(key=key), fact) for key, fact in zip(keys, facts, strict=True)]


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
