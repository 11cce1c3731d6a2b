"""Built-in tasks over long prompts, generated from a seed: facts in a haystack of idle sentences, and a question.

`needle` hides one fact (Kamradt, 2023), `multikey` several of one form, of which one is asked for, and `trace` a chain
of variables (both after RULER, arXiv 2404.06654). They say whether a model can look something up at a distance, and
little else: scores on needles do not predict those on tasks of use (HELMET, arXiv 2410.02694).
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tuner.errors import UserError

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LANGUAGES = ("en", "zh")
KEYS_OF_MULTIKEY = 4
HOPS = 2
"""Of a chain of `trace`: assignments after the one of a number."""


@dataclass(frozen=True)
class Wording:
    """The texts of one language."""

    haystack: Sequence[str]
    """Idle sentences, drawn at random as often as the length needs."""
    keys: Sequence[str]
    fact: str
    """With a key and its value."""
    question: str
    """With the key."""
    variable_question: str
    """With the name of a variable."""
    introduction: str
    joint: str
    """Between sentences."""


@dataclass(frozen=True)
class Facts:
    """What is hidden in a haystack, and what is asked of it."""

    sentences: Sequence[str]
    """The first stands at the row's depth."""
    question: str
    answer: str
    ordered: bool = False
    """Whether the other sentences follow the first, in their order; else they stand anywhere."""


@dataclass(frozen=True)
class ContextRow:
    """A prompt of a task, and the answer it has."""

    prompt: str
    answer: str
    length: int
    """Tokens that the prompt was to have, its chat template included; it has a few less."""
    depth: float
    """Where the fact stands: 0 at the beginning of the haystack, 1 at its end."""
    language: str


def draw_value(drawn: random.Random) -> str:
    """A number of four digits."""
    return str(drawn.randrange(1000, 10_000))


def distinct_names(drawn: random.Random, count: int) -> list[str]:
    """Names of three letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(drawn.choices(string.ascii_uppercase, k=3))] = None
    return list(names)


def needle(drawn: random.Random, words: Wording) -> Facts:
    """One fact."""
    return _keyed_facts(drawn, words, 1)


def multikey(drawn: random.Random, words: Wording) -> Facts:
    """Several facts of one form, which differ in their keys and values."""
    return _keyed_facts(drawn, words, KEYS_OF_MULTIKEY)


def trace(drawn: random.Random, words: Wording) -> Facts:
    """A chain of variables, each of which takes the value of the one before, beside another chain."""
    names = distinct_names(drawn, 2 * (HOPS + 1))
    sentences: list[str] = []
    values = [draw_value(drawn), draw_value(drawn)]
    chains = names[: HOPS + 1], names[HOPS + 1 :]
    for place in range(HOPS + 1):
        for chain, value in zip(chains, values, strict=True):
            source = f"VAR {chain[place - 1]}" if place else value
            sentences.append(f"VAR {chain[place]} = {source}.")
    return Facts(sentences, words.variable_question.format(name=chains[0][-1]), values[0], ordered=True)


TASKS: dict[str, Callable[[random.Random, Wording], Facts]] = {
    "needle": needle,
    "multikey": multikey,
    "trace": trace,
}
"""Name of a task -> what it hides and asks."""


def refuse_unknown_tasks(names: Sequence[str]) -> None:
    """Raise UserError for a name that is no task's."""
    if unknown := sorted(set(names) - set(TASKS)):
        raise UserError(
            f"--tasks: no task named {', '.join(map(repr, unknown))}; there are {', '.join(sorted(TASKS))}"
        )


def context_rows(
    task: str,
    count_tokens: Callable[[str], int],
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    count: int = 4,
    seed: int = 0,
) -> Iterator[ContextRow]:
    """`count` rows of every length and depth, in turn in each language; each a function of its own place and the seed.

    count_tokens: of a whole prompt, its chat template included. Raises UserError for a length that has no room.
    """
    for length in lengths:
        for depth in depths:
            for index in range(count):
                language = LANGUAGES[index % len(LANGUAGES)]
                # a text seeds alike in every process; hash() of it would not
                drawn = random.Random(f"{seed} {task} {length} {depth} {index}")
                facts = TASKS[task](drawn, WORDINGS[language])
                prompt = fill(facts, WORDINGS[language], count_tokens, length, depth, drawn)
                yield ContextRow(prompt, facts.answer, length, depth, language)


def fill(
    facts: Facts,
    words: Wording,
    count_tokens: Callable[[str], int],
    length: int,
    depth: float,
    drawn: random.Random,
) -> str:
    """A prompt of at most `length` tokens with the facts in a haystack as long as will fit."""
    empty = count_tokens(_prompt([], facts, words, depth, random.Random(0)))
    if empty > length:
        raise UserError(
            f"--lengths {length}: the facts and the question alone are {empty} tokens; write a longer one"
        )
    sizes = {text: count_tokens(words.joint.join([text] * 9)) / 9 for text in words.haystack}
    haystack: list[str] = []
    room = float(length - empty)
    while (text := drawn.choice(words.haystack)) and sizes[text] <= room:
        haystack.append(text)
        room -= sizes[text]
    placing = drawn.random()
    # sentences next to others can have another number of tokens than in a row of their own
    while count_tokens(prompt := _prompt(haystack, facts, words, depth, random.Random(placing))) > length:
        haystack.pop()
    return prompt


def _prompt(
    haystack: Sequence[str], facts: Facts, words: Wording, depth: float, placing: random.Random
) -> str:
    first, *others = facts.sentences
    begin = round(depth * len(haystack))
    lowest = begin if facts.ordered else 0
    places = [placing.randint(lowest, len(haystack)) for _ in others]
    if facts.ordered:
        places.sort()
    placed = zip((begin, *places), itertools.count(), (first, *others))
    texts = list(haystack)
    # from the end on, so that the places before stay what they are; of equal places the later fact first
    for place, _, text in sorted(placed, reverse=True):
        texts.insert(place, text)
    return f"{words.introduction}\n\n{words.joint.join(texts)}\n\n{facts.question}"


def _keyed_facts(drawn: random.Random, words: Wording, count: int) -> Facts:
    keys = drawn.sample(words.keys, count)
    values = [draw_value(drawn) for _ in keys]
    sentences = [words.fact.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
    return Facts(sentences, words.question.format(key=keys[0]), values[0])


WORDINGS = {
    "en": Wording(
        haystack=(
            "The grass by the river is green.",
            "A cat sleeps on the warm stone.",
            "The baker opens his shop at dawn.",
            "Rain falls softly on the old roof.",
            "The children walk home from school.",
            "A boat crosses the quiet lake.",
            "The wind turns the leaves over.",
            "He reads a letter by the window.",
            "The market is full of people today.",
            "She puts the bread on the table.",
            "Birds gather on the garden wall.",
            "The road leads over the hill.",
        ),
        keys=(
            *("apple", "bell", "candle", "door", "eagle", "feather", "goat", "hammer", "island", "jewel"),
            *("kettle", "lamp", "mirror", "needle", "orchard", "pearl", "rabbit", "sword", "tower", "wheel"),
        ),
        fact="The number of the {key} is {value}.",
        question="What is the number of the {key}?",
        variable_question="What is the value of VAR {name}?",
        introduction="Read this text and answer the question below it.",
        joint=" ",
    ),
    "zh": Wording(
        haystack=(
            "河边的草是绿色的。",
            "猫在石头上睡觉。",
            "面包店清晨开门。",
            "雨落在旧屋顶上。",
            "孩子们放学回家。",
            "小船渡过湖面。",
            "风吹动树叶。",
            "他在窗边读信。",
            "今天集市上人很多。",
            "她把面包放在桌上。",
            "鸟儿停在墙上。",
            "道路翻过山丘。",
        ),
        keys=(
            *("苹果", "钟", "蜡烛", "门", "鹰", "羽毛", "山羊", "锤子", "岛", "宝石"),
            *("水壶", "灯", "镜子", "针", "果园", "珍珠", "兔子", "剑", "塔", "轮子"),
        ),
        fact="{key}的号码是{value}。",
        question="{key}的号码是多少？",
        variable_question="VAR {name} 的值是多少？",
        introduction="请阅读下文，并回答文后的问题。",
        joint="",
    ),
}
"""Language -> its texts."""
