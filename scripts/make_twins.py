"""Write the reward quickstart's data: conditional twins, labeled by rules, and the wordings of their conditions.

    python scripts/make_twins.py

writes `tuner/embedded/twins/train.jsonl`, `test.jsonl` and one `<condition>.txt` per condition, the same bytes
every time. A row is `{"prompt": ..., "chosen": ..., "rejected": ..., "condition": "brief"}`.

*Twins* are two consecutive rows with the same two answers and opposite labels, under two opposite conditions: a model
that ignores the condition ranks exactly one of them correctly. *Unflipped* rows have a right and a wrong answer in the
same manner, under any condition or none, and the right one is always preferred, so that the condition alone is not
enough. The labels of twins are decided by `RULES`.

Test prompts never occur in training: their numbers are reserved pairs (scripts/make_sums.py), and their things are
separate. A condition's file has wordings to train on, then two kinds that are never trained on: `# unseen`, the same
key words in other frames (sentence patterns), and `# novel`, which share no content word with the training wordings.
All conditions share all frames: only the key word distinguishes them.
"""

import argparse
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import twin_texts as texts
from make_sums import EMBEDDED, WORDINGS, draw_problem, is_reserved

OPPOSITES = (("brief", "detailed"), ("polite", "blunt"), ("json", "plain"))
CONDITIONS = tuple(name for pair in OPPOSITES for name in pair)
# Numbers of digits of the two operands -> probability.
NUMBER_DIGITS = {(1, 2): 0.3, (2, 2): 0.7}
LARGER_WORDINGS = (
    "Which is larger, {a} or {b}?",
    "Which number is greater: {a} or {b}?",
    "Tell me the larger one of {a} and {b}.",
    "{a} or {b}, which is more?",
)
JSON_KEYS = (("answer", "details"), ("result", "why"), ("reply", "more"))
TONES = {
    "polite": (texts.POLITE_OPENINGS, texts.POLITE_CLOSINGS),
    "blunt": (texts.BLUNT_OPENINGS, texts.BLUNT_CLOSINGS),
}

Row = dict[str, str]


def num_words(text: str) -> int:
    """Number of words and numbers in a text."""
    return len(re.findall(r"[A-Za-z0-9]+", text))


def is_json(text: str) -> bool:
    """Whether a text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def is_polite(text: str) -> bool:
    """Whether a text contains a word of courtesy."""
    return not texts.COURTESY.isdisjoint(re.findall(r"[a-z]+", text.lower()))


RULES: dict[str, Callable[[str, str], bool]] = {
    "brief": lambda chosen, rejected: 1.5 * num_words(chosen) <= num_words(rejected),
    "detailed": lambda chosen, rejected: num_words(chosen) >= 1.5 * num_words(rejected),
    "polite": lambda chosen, rejected: is_polite(chosen) and not is_polite(rejected),
    "blunt": lambda chosen, rejected: not is_polite(chosen) and is_polite(rejected),
    "json": lambda chosen, rejected: is_json(chosen) and not is_json(rejected),
    "plain": lambda chosen, rejected: not is_json(chosen) and is_json(rejected),
}
"""Condition -> whether it prefers `chosen` to `rejected`."""


@dataclass(frozen=True)
class Content:
    """The content of an answer."""

    statement: str
    detail: str


@dataclass(frozen=True)
class Manner:
    """The style of an answer."""

    detailed: bool
    opening: str = ""
    closing: str = ""
    json_keys: tuple[str, str] | None = None
    """Keys of statement and detail in a JSON object; None: plain text."""

    def write(self, content: Content) -> str:
        """The content as an answer in this manner."""
        statement = _join(self.opening, content.statement)
        rest = _join(content.detail if self.detailed else "", self.closing)
        if self.json_keys is None:
            return _join(statement, rest)
        values = (statement, rest) if rest else (statement,)
        return json.dumps(dict(zip(self.json_keys, values, strict=False)))


@dataclass(frozen=True)
class Question:
    """A prompt, its right answer, and a similar wrong one."""

    prompt: str
    right: Content
    wrong: Content


def draw_question(random_source: random.Random, test: bool) -> Question:
    """A question about a sum, a comparison or a thing; in the test, about those that training never shows."""
    return random_source.choice((_sum, _larger, _thing))(random_source, test)


def draw_manner(random_source: random.Random) -> Manner:
    """A random manner: mostly brief, plain and neutral, since a small model is trained for a short time only."""
    manner = Manner(
        detailed=random_source.random() < 0.1,
        json_keys=random_source.choice(JSON_KEYS) if random_source.random() < 0.05 else None,
    )
    if random_source.random() < 0.9:
        return manner
    return _in_tone(random_source, manner, random_source.choice(tuple(TONES)), random_source.random() < 0.5)


def draw_opposites(random_source: random.Random, condition: str) -> tuple[Manner, Manner]:
    """A manner preferred by `condition` (the first of its pair), and one preferred by its opposite.

    They differ in nothing else.
    """
    manner = draw_manner(random_source)
    if condition == "brief":
        return replace(manner, detailed=False), replace(manner, detailed=True)
    if condition == "json":
        return replace(manner, json_keys=random_source.choice(JSON_KEYS)), replace(manner, json_keys=None)
    opens = random_source.random() < 0.5
    polite, blunt = (_in_tone(random_source, manner, tone, opens) for tone in ("polite", "blunt"))
    return polite, blunt


def draw_twins(random_source: random.Random, test: bool) -> tuple[Row, Row]:
    """Two rows with the same answers and opposite labels."""
    left, right = random_source.choice(OPPOSITES)
    while True:
        question = draw_question(random_source, test)
        first, second = (manner.write(question.right) for manner in draw_opposites(random_source, left))
        # a tone that both answers share can bring their lengths within the rule's factor: draw again
        if RULES[left](first, second) and RULES[right](second, first):
            return (
                {"prompt": question.prompt, "chosen": first, "rejected": second, "condition": left},
                {"prompt": question.prompt, "chosen": second, "rejected": first, "condition": right},
            )


def draw_unflipped(random_source: random.Random, test: bool) -> Row:
    """A row with a right and a wrong answer in the same manner, under any condition or none."""
    question, manner = draw_question(random_source, test), draw_manner(random_source)
    wrong = random_source.choice((_wrong_answer, _other_answer, _no_answer))(random_source, test, question)
    row = {
        "prompt": question.prompt,
        "chosen": manner.write(question.right),
        "rejected": manner.write(wrong),
    }
    condition = random_source.choice((*CONDITIONS, None))
    return row if condition is None else {**row, "condition": condition}


def draw_rows(random_source: random.Random, num_twins: int, num_unflipped: int, test: bool) -> list[Row]:
    """All rows of a file, without duplicates."""
    rows: dict[tuple[str, ...], Row] = {}
    while len(rows) < 2 * num_twins:
        twins = draw_twins(random_source, test)
        rows.update({tuple(row.values()): row for row in twins})
    while len(rows) < 2 * num_twins + num_unflipped:
        row = draw_unflipped(random_source, test)
        rows[tuple(row.values())] = row
    return list(rows.values())


def wordings(condition: str) -> str:
    """The content of a condition's file: training wordings, then those never trained on."""
    keys = texts.KEY_WORDS[condition]
    trained, unseen = (
        [_capitalized(frame.format(key)) for frame in frames for key in keys]
        for frames in (texts.FRAMES, texts.UNSEEN_FRAMES)
    )
    lines = [*trained, "", "# unseen", *unseen, "", "# novel", *texts.NOVEL[condition]]
    return "\n".join(lines) + "\n"


def _wrong_answer(random_source: random.Random, test: bool, question: Question) -> Content:
    return question.wrong


def _other_answer(random_source: random.Random, test: bool, question: Question) -> Content:
    """The right answer to another question."""
    while True:
        other = draw_question(random_source, test)
        if other.right.statement != question.right.statement:
            return other.right


def _no_answer(random_source: random.Random, test: bool, question: Question) -> Content:
    return Content(*random_source.choice(texts.NO_ANSWERS))


def _sum(random_source: random.Random, test: bool) -> Question:
    a, b = _draw_numbers(random_source, test)
    prompt = random_source.choice(WORDINGS).format(a=a, b=b)
    wrong = a + b + random_source.choice((-20, -10, -3, -2, 2, 3, 10, 20))
    return Question(prompt, *(_sum_content(a, b, max(result, 0)) for result in (a + b, wrong)))


def _sum_content(a: int, b: int, result: int) -> Content:
    detail = f"The ones make {a % 10 + b % 10}, and with the tens it comes to {result}."
    return Content(f"{a} + {b} = {result}.", detail)


def _larger(random_source: random.Random, test: bool) -> Question:
    a, b = _draw_numbers(random_source, test)
    while a == b:
        a, b = _draw_numbers(random_source, test)
    prompt = random_source.choice(LARGER_WORDINGS).format(a=a, b=b)
    return Question(prompt, _larger_content(max(a, b), min(a, b)), _larger_content(min(a, b), max(a, b)))


def _larger_content(larger: int, smaller: int) -> Content:
    detail = f"Who counts up from one comes to {smaller} before {larger}."
    return Content(f"{larger} is larger.", detail)


def _thing(random_source: random.Random, test: bool) -> Question:
    (thing, *right), (_, *wrong) = random_source.sample(texts.TEST_THINGS if test else texts.THINGS, 2)
    prompt = random_source.choice(texts.THING_WORDINGS).format(thing=thing)
    return Question(prompt, *(_thing_content(thing, *content) for content in (right, wrong)))


def _thing_content(thing: str, meaning: str, detail: str) -> Content:
    return Content(f"{_capitalized(thing)} is {meaning}.", detail)


def _draw_numbers(random_source: random.Random, test: bool) -> tuple[int, int]:
    while True:
        a, b = draw_problem(random_source, NUMBER_DIGITS)
        if is_reserved(a, b) is test:
            return a, b


def _in_tone(random_source: random.Random, manner: Manner, tone: str, opens: bool) -> Manner:
    """The manner with an opening in this tone, or with a closing."""
    openings, closings = TONES[tone]
    if opens:
        return replace(manner, opening=random_source.choice(openings), closing="")
    return replace(manner, opening="", closing=random_source.choice(closings))


def _capitalized(text: str) -> str:
    return text[0].upper() + text[1:]


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the reward quickstart's data.")
    parser.add_argument("--output", type=Path, default=EMBEDDED / "twins", help="folder to write to")
    parser.add_argument("--train", type=int, nargs=2, default=(1500, 500), metavar=("TWINS", "UNFLIPPED"))
    parser.add_argument("--test", type=int, nargs=2, default=(360, 120), metavar=("TWINS", "UNFLIPPED"))
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    random_source = random.Random(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, sizes, test in (("train", arguments.train, False), ("test", arguments.test, True)):
        rows = draw_rows(random_source, *sizes, test)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (arguments.output / f"{name}.jsonl").write_text(text, encoding="utf-8")
    for condition in CONDITIONS:
        (arguments.output / f"{condition}.txt").write_text(wordings(condition), encoding="utf-8")


if __name__ == "__main__":
    main()
