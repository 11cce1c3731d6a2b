"""Row shapes that are read as preferences: pairs and ranked lists, as published sets write them."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from typing import Any, cast

from tuner.data.answers import (
    PROMPTS,
    Ranking,
    common_prompt,
    incomparable,
    is_number,
    read_answers,
    read_prompt,
    read_side,
    read_text_prompt,
    to_preference,
    untyped_messages,
)
from tuner.data.conversation import Turn
from tuner.data.row_files import Row
from tuner.data.row_shapes import Reader, Shape, registered_shapes
from tuner.data.turns import (
    Cell,
    Values,
    expect_list,
    expect_mapping,
    expect_text,
    has,
    is_object,
    read_question,
    refuse,
    untyped,
)

_PAIRS = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)
"""Keys of a pair's scores in published sets; equal scores are a tie."""
_ANSWERS = ("answers", "responses", "completions", "generations")
_LIST_SCORES = ("scores", "ratings")
_FINE_GRAINED = (
    "are ranked by UltraFeedback's fine-grained scores: its overall_score is 10 in some where 1 was meant"
)
_SAFER_DIFFERS = (
    'name another answer the safer one than the better one; Source(shape="safe_rlhf_safer") ranks by safety'
)
_JOINED_BY = ("prompt", "system", "condition", "weight", "tools")
_WINNERS = {"model_a": (0.0, 1.0), "model_b": (1.0, 0.0)}
_TIES = ("tie", "tie (bothbad)", "tie (inconsistent)", "both_bad")
_VOTES = ("winner_model_a", "winner_model_b", "winner_tie")
_HELPSTEER_TURN = re.compile(r"\s*<extra_id_1>(User|Assistant)\s*")
"""What HelpSteer writes between the turns of a prompt that has several."""


class RankingShape(Shape):
    """A shape of preferences: `rank` reads (row, origin) as a Ranking, from which `read` makes a Preference."""

    def __init__(
        self,
        rank: Callable[[Values, str], Ranking],
        *keys: tuple[str, ...],
        lists: tuple[str, ...] = (),
        joined: tuple[str, ...] = (),
    ):
        self.rank = rank
        self.joined = joined
        """Keys of the answer and its score, where a row has one answer; see join_answers."""
        super().__init__(
            lambda row, origin: to_preference(row, rank(row, origin), origin), *keys, lists=lists
        )


def preference_reader(shape: str | None) -> Reader:
    """A reader of preference rows; see Reader."""
    return Reader(shape, {**registered_shapes("preference"), **SHAPES})


def join_answers(rows: Iterable[Row], reader: Reader) -> Iterator[tuple[Row, int]]:
    """(row, number of rows it was put together from): rows of one answer each (HelpSteer2) are joined by their prompt.

    All rows of a source are joined, wherever they stand, and have the origin of the first. Other shapes stay as they
    are.
    """
    groups: dict[str, list[Row]] = {}
    joined: tuple[str, ...] = ()
    for row in rows:
        shape = reader.shape_of(row.values, row.origin)
        if not (isinstance(shape, RankingShape) and shape.joined and shape.matches(row.values)):
            yield row, 1
            continue
        shape.rank(row.values, row.origin)  # refuses it by its own line
        joined = shape.joined
        others = {key: row.values.get(key) for key in _JOINED_BY}
        groups.setdefault(json.dumps(others, sort_keys=True, default=str), []).append(row)
    for group in groups.values():
        first = group[0]
        lists = {key: [row.values[key] for row in group] for key in joined}
        yield first._replace(values={**first.values, **lists}), len(group)


def pair_keys(row: Values) -> tuple[str, str]:
    """The keys of a pair's answers, better and worse."""
    return next((pair for pair in _PAIRS if all(has(row, key) for key in pair)), _PAIRS[0])


def _rank_pair(row: Values, origin: str) -> Ranking:
    """chosen and rejected: texts or messages, of the answer or of the whole conversation, prompt included.

    Lists of texts are several answers that are equally good (RewardBench 2).
    """
    better, worse = pair_keys(row)
    prompt = read_prompt(row, origin)
    chosen, rejected = (read_answers(row[key], key, prompt, origin) for key in (better, worse))
    if prompt is None:
        prompt, (first, second) = common_prompt(chosen[0], rejected[0], origin)
        chosen, rejected = [first], [second]
    place = 0 if _is_tied(row, origin) else 1
    return Ranking(prompt, [*chosen, *rejected], [0] * len(chosen) + [place] * len(rejected))


def _is_tied(row: Values, origin: str) -> bool:
    """Whether a pair's scores, or distilabel's status, say that neither is better."""
    tied = row.get("status") == "tie"
    for chosen, rejected in _SCORES:
        better, worse = untyped(row.get(chosen)), untyped(row.get(rejected))
        if is_number(better) and is_number(worse) and better < worse:
            incomparable(
                origin,
                f'"{chosen}" {better:g} is less than "{rejected}" {worse:g}, which contradicts the pair; swap the '
                "answers, or take the row out",
            )
        tied = tied or (better is not None and better == worse)
    return tied


def _rank_ranked(row: Values, origin: str) -> Ranking:
    """Several answers with "scores" (higher is better) or "ranks" (1 is the best), beside the answers or in each."""
    prompt = read_prompt(row, origin)
    if prompt is None:
        refuse(origin, f"no prompt; write one of {', '.join(PROMPTS)}")
    key = next(key for key in _ANSWERS if has(row, key))
    answers = expect_list(row[key], f'"{key}"', origin)
    objects: list[Values] = [answer if is_object(answer) else {} for answer in answers]
    sides = [read_side(_answer_value(answer), key, prompt, origin) for answer in answers]
    ranks = untyped(row.get("ranks")) or [answer.get("rank") for answer in objects]
    scores, remarks = _read_scores(row, objects)
    values, sign = (scores, -1.0) if ranks == [None] * len(answers) else (ranks, 1.0)
    values = expect_list(values, '"ranks" or "scores"', origin)
    places = [sign * value for value in values if is_number(value)]
    if not len(places) == len(values) == len(answers):
        refuse(origin, f'"ranks" or "scores" must be a list of {len(answers)} numbers, one for each answer')
    if sign > 0 and isinstance(scores, list):
        _refuse_contradiction(places, cast("list[Any]", scores), origin)
    return Ranking(prompt, sides, places, remarks if sign < 0 else ())


def _read_scores(row: Values, answers: list[Values]) -> tuple[Any, tuple[str, ...]]:
    """The answers' scores, of the row or of each answer, and remarks on them."""
    if scores := next((untyped(row[key]) for key in _LIST_SCORES if has(row, key)), None):
        return scores, ()
    fine_grained = [_fine_grained_score(answer) for answer in answers]
    if None not in fine_grained and any(has(answer, "overall_score") for answer in answers):
        return fine_grained, (_FINE_GRAINED,)
    return [answer.get("score", answer.get("overall_score")) for answer in answers], ()


def _fine_grained_score(answer: Values) -> float | None:
    """UltraFeedback's mean rating of an answer's aspects; the set's first version has only the ratings."""
    score = answer.get("fine-grained_score")
    if is_number(score):
        return score
    annotations = answer.get("annotations")
    aspects = annotations.values() if is_object(annotations) else ()
    ratings = [str(aspect.get("Rating")) for aspect in aspects if is_object(aspect)]
    numbers = [int(rating) for rating in ratings if re.fullmatch(r"[1-5]", rating)]  # some are "N/A"
    return sum(numbers) / len(numbers) if numbers else None


def _refuse_contradiction(ranks: list[float], scores: list[Any], origin: str) -> None:
    """Raise IncomparableError where an answer has the better rank and the lower score than another."""
    if len(scores) != len(ranks) or not all(map(is_number, scores)):
        return
    for (rank, score), (other_rank, other_score) in combinations(zip(ranks, scores, strict=True), 2):
        if (rank - other_rank) * (score - other_score) > 0:
            incomparable(
                origin,
                f"rank {min(rank, other_rank):g} (1 is the best) has a lower score than rank "
                f"{max(rank, other_rank):g}: ranks and scores contradict each other; leave one of them out, or take "
                "the row out",
            )


def _answer_value(answer: Any) -> Any:
    """The text or messages of an answer; it may be in an object, beside its score."""
    if is_object(answer) and "role" not in answer and "from" not in answer:
        return next((answer[key] for key in ("answer", "response", "content", "text") if key in answer), None)
    return answer


# The shapes of single sets


def _rank_shp(row: Values, origin: str) -> Ranking:
    """Stanford Human Preferences: labels=1 prefers answer A."""
    label = _choice(row, "labels", "1 where A is better and 0 where B is", origin)
    prompt = read_text_prompt(row["history"], "history", origin)
    sides = [read_side(row[f"human_ref_{side}"], f"human_ref_{side}", prompt, origin) for side in "AB"]
    score_a, score_b = (untyped(row.get(f"score_{side}")) for side in "AB")
    if is_number(score_a) and is_number(score_b) and (score_a - score_b) * (label - 0.5) < 0:
        incomparable(
            origin,
            f'"labels" {label} contradicts "score_A" {score_a:g} and "score_B" {score_b:g}; take the row out',
        )
    return Ranking(prompt, sides, [1 - label, label])


def _rank_safe_rlhf(row: Values, origin: str) -> Ranking:
    """PKU-SafeRLHF by helpfulness."""
    ranking = _rank_by_id(row, "better_response_id", origin)
    differs = has(row, "safer_response_id") and untyped(row["safer_response_id"]) != untyped(
        row["better_response_id"]
    )
    return ranking._replace(remarks=(_SAFER_DIFFERS,) if differs else ())


def _rank_safe_rlhf_safer(row: Values, origin: str) -> Ranking:
    """PKU-SafeRLHF by harmlessness."""
    return _rank_by_id(row, "safer_response_id", origin)


def _rank_by_id(row: Values, key: str, origin: str) -> Ranking:
    better = _choice(row, key, "the number of a response, 0 or 1", origin)
    prompt = read_text_prompt(row["prompt"], "prompt", origin)
    sides = [read_side(row[name], name, prompt, origin) for name in ("response_0", "response_1")]
    return Ranking(prompt, sides, [better, 1 - better])


def _rank_helpsteer2(row: Values, origin: str) -> Ranking:
    """HelpSteer and HelpSteer2: answers scored by their helpfulness; one, or those that `join_answers` put together."""
    is_joined = isinstance(row["response"], list)
    responses: list[Any] = row["response"] if is_joined else [row["response"]]
    scores: Any = row["helpfulness"] if is_joined else [row["helpfulness"]]
    numbers = [
        _number(score, "helpfulness", origin) for score in expect_list(scores, '"helpfulness"', origin)
    ]
    if len(numbers) != len(responses):
        refuse(
            origin,
            f'"helpfulness" has {len(numbers)} numbers for {len(responses)} responses; write one for each',
        )
    prompt = _helpsteer_prompt(row["prompt"], origin)
    sides = [read_side(text, "response", prompt, origin) for text in responses]
    return Ranking(prompt, sides, [-number for number in numbers])


def _rank_helpsteer3(row: Values, origin: str) -> Ranking:
    """HelpSteer3, and the preferences of HelpSteer2: from -3, the first is much better, to 3, the second is."""
    first = "response1" if has(row, "response1") else "response_1"
    key = "overall_preference" if has(row, "overall_preference") else "preference_strength"
    strength = _number(row[key], key, origin)
    context = untyped_messages(row["context"] if has(row, "context") else row["prompt"])
    is_text = isinstance(context, str)
    prompt = _helpsteer_prompt(context, origin) if is_text else read_prompt({"prompt": context}, origin)
    sides = [read_side(row[name], name, prompt, origin) for name in (first, first.replace("1", "2"))]
    return Ranking(prompt or (), sides, [strength, -strength])


def _helpsteer_prompt(value: Any, origin: str) -> tuple[Turn, ...]:
    first, *parts = _HELPSTEER_TURN.split(expect_text(value, '"prompt"', origin))
    roles = (role.lower() for role in parts[::2])
    return (Turn("user", first), *map(Turn, roles, parts[1::2]))


def _rank_arena(row: Values, origin: str) -> Ranking:
    """Chatbot Arena and MT-Bench's human judgments: two conversations with the same questions."""
    places = _winner(row["winner"], origin)
    turns = untyped(row.get("turn"))
    sides = [
        _until_answer(read_side(row[key], key, None, origin), turns)
        for key in ("conversation_a", "conversation_b")
    ]
    prompt, answers = common_prompt(sides[0], sides[1], origin)
    return Ranking(prompt, answers, places)


def _until_answer(turns: tuple[Turn, ...], number: Any) -> tuple[Turn, ...]:
    """A conversation up to its answer of that number: MT-Bench also judges the first of two."""
    ends = [index + 1 for index, turn in enumerate(turns) if turn.role == "assistant"]
    return turns[: ends[number - 1]] if isinstance(number, int) and 1 <= number <= len(ends) else turns


def _rank_arena_texts(row: Values, origin: str) -> Ranking:
    """Chatbot Arena as on Kaggle: the texts of all turns as a list, and three columns for the winner."""
    prompts, first, second = (_texts(row, key, origin) for key in ("prompt", "response_a", "response_b"))
    if not len(prompts) == len(first) == len(second) > 0:
        refuse(origin, '"prompt", "response_a" and "response_b" must have a text for each turn')
    votes = [key for key in _VOTES if untyped(row.get(key)) == 1]
    if len(votes) != 1:
        refuse(origin, f"one of {', '.join(_VOTES)} must be 1")
    sides = [
        tuple(
            turn
            for texts in zip(prompts, side, strict=True)
            for turn in map(Turn, ("user", "assistant"), texts)
        )
        for side in (first, second)
    ]
    prompt, answers = common_prompt(sides[0], sides[1], origin)
    return Ranking(prompt, answers, _winner(votes[0].removeprefix("winner_"), origin))


def _texts(row: Values, key: str, origin: str) -> list[str]:
    """A list of texts, or that list as JSON text; null stands for an empty one."""
    value = untyped(Cell(row[key])) if isinstance(row[key], str) else row[key]
    values = expect_list(value, f'"{key}"', origin)
    return ["" if text is None else expect_text(text, f'"{key}"', origin) for text in values]


def _winner(value: Any, origin: str) -> list[float]:
    if not isinstance(value, str) or value not in (*_WINNERS, *_TIES):
        refuse(origin, f'"winner" is model_a, model_b or {", ".join(_TIES)}, not {value!r:.60}')
    return list(_WINNERS.get(value, (0.0, 0.0)))


def _rank_tldr(row: Values, origin: str) -> Ranking:
    """OpenAI's comparisons of summaries; the prompt is the paper's (arXiv 2009.01325, appendix B.2)."""
    info = expect_mapping(row["info"], '"info"', origin)
    summaries = expect_list(row["summaries"], '"summaries"', origin)
    if len(summaries) != 2:
        refuse(origin, f'"summaries" has {len(summaries)} summaries; two are compared')
    choice = _choice(row, "choice", "the number of a summary, 0 or 1", origin)
    key = "post" if has(info, "post") else "article"
    lines = {
        "SUBREDDIT: r/": info.get("subreddit"),
        "TITLE: ": info.get("title"),
        f"{key.upper()}: ": info.get(key),
    }
    text = "\n\n".join(f"{name}{value}" for name, value in lines.items() if isinstance(value, str) and value)
    prompt = (Turn("user", f"{text}\n\nTL;DR:" if has(info, key) else ""),)
    texts = [expect_mapping(summary, "a summary", origin).get("text") for summary in summaries]
    sides = [(Turn("assistant", expect_text(text, "a summary's text", origin).strip()),) for text in texts]
    return Ranking(prompt, sides, [choice, 1 - choice])


def _rank_swift(row: Values, origin: str) -> Ranking:
    """ms-swift: the better answer ends the messages, or is the response; the worse one stands beside them."""
    rejected = "rejected_response" if has(row, "rejected_response") else "rejected_messages"
    if has(row, "query"):
        prompt = read_question({**row, "instruction": row["query"]}, origin)
    else:
        prompt = read_prompt({"prompt": row["messages"]}, origin) or ()
    if has(row, "response"):
        better = read_answers(row["response"], "response", prompt, origin)
    else:
        if not prompt or prompt[-1].role != "assistant":
            refuse(origin, '"messages" does not end with the better answer, the assistant\'s; write it')
        prompt, better = prompt[:-1], [prompt[-1:]]
    worse = read_answers(row[rejected], rejected, prompt, origin)
    return Ranking(prompt, [*better, *worse], [0] * len(better) + [1] * len(worse))


def _rank_output_pair(row: Values, origin: str) -> Ranking:
    """LLaMA-Factory's first pairs: the better and the worse output of an instruction in a list."""
    prompt = read_question(row, origin)
    answers = read_answers(row["output"], "output", prompt, origin)
    if len(answers) != 2:
        refuse(origin, f'"output" has {len(answers)} answers; write the better one and the worse one')
    return Ranking(prompt, answers, [0, 1])


def _choice(row: Values, key: str, meaning: str, origin: str) -> int:
    """The 0 or 1 under a key."""
    value = untyped(row[key])
    if value not in (0, 1):
        refuse(origin, f'"{key}" is {meaning}, not {value!r:.60}')
    return int(value)


def _number(value: Any, key: str, origin: str) -> float:
    value = untyped(value)
    if not is_number(value):
        refuse(origin, f'"{key}" is a number, not {value!r:.60}')
    return value


SHAPES: dict[str, RankingShape] = {
    "shp": RankingShape(_rank_shp, ("history", "human_ref_A", "human_ref_B", "labels")),
    "safe_rlhf": RankingShape(_rank_safe_rlhf, ("prompt", "response_0", "response_1", "better_response_id")),
    "safe_rlhf_safer": RankingShape(
        _rank_safe_rlhf_safer, ("prompt", "response_0", "response_1", "safer_response_id")
    ),
    "helpsteer2": RankingShape(
        _rank_helpsteer2, ("prompt", "response", "helpfulness"), joined=("response", "helpfulness")
    ),
    "helpsteer3": RankingShape(
        _rank_helpsteer3,
        ("context", "response1", "response2", "overall_preference"),
        ("prompt", "response_1", "response_2", "preference_strength"),
    ),
    "arena": RankingShape(_rank_arena, ("conversation_a", "conversation_b", "winner")),
    "arena_texts": RankingShape(_rank_arena_texts, ("prompt", "response_a", "response_b", "winner_model_a")),
    "tldr": RankingShape(_rank_tldr, ("info", "summaries", "choice")),
    "pair": RankingShape(_rank_pair, *_PAIRS),
    "swift": RankingShape(
        _rank_swift,
        ("messages", "rejected_response"),
        ("messages", "rejected_messages"),
        ("query", "response", "rejected_response"),
    ),
    "output_pair": RankingShape(_rank_output_pair, ("instruction", "output"), lists=("output",)),
    "ranked": RankingShape(_rank_ranked, *((key,) for key in _ANSWERS)),
}
"""In the order of recognition: the more specific keys first."""
