"""Candidates of a round: answers of its policies to the same prompts, scored, and paired to be labeled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tuner.config import COOL, Model, PolicyConfig, override
from tuner.data.conditions import read_conditions
from tuner.data.conversation import Prompt
from tuner.data.dataset import Progress
from tuner.data.prompts import PromptSet
from tuner.data.template import Template
from tuner.data.turns import message_of
from tuner.models.atomic_folder import write_atomically
from tuner.models.locate import locate
from tuner.models.tokenizer import read_tokenizer
from tuner.rollout.reward_sources import RewardSource
from tuner.stages.context import Context
from tuner.stages.cool.pairs import AnswerPair, PolicyAnswer, fast_pairs, slow_pairs
from tuner.stages.cool.patterns import Pattern, find_patterns, start_and_end
from tuner.stages.cool.rounds import RoundPlace
from tuner.stages.finished_model import free_memory
from tuner.stages.memory_choice import as_trained
from tuner.stages.rl.entrants import answer, entrant
from tuner.stages.rl.evaluate import find_reward, load_reward
from tuner.stages.rl.prompts import load_policy_prompts
from tuner.training.devices import Devices

_OURS = (
    "id",
    "prompt",
    "messages",
    "answers",
    "system",
    "guideline",
    "condition",
    "gold",
    "weight",
    "scores",
)
"""Keys of a candidate's row that its prompt's row cannot set."""


def write_candidates(config: COOL, context: Context, place: RoundPlace) -> None:
    """Have a round's policies answer some prompts, and write the pairs to be labeled."""
    if place.candidates.is_file():
        return
    policy: Any = context.with_usable_models(as_trained(place.policy))
    devices = Devices.unsharded(policy)
    with context.reading() as progress:
        prompts, chat_template = _prompts(place, policy, progress)
    chosen = _drawn_prompts(config, place, len(prompts))
    texts = _answers(place, policy, devices, prompts.take(chosen), chat_template)
    source = load_reward(policy, devices, find_reward(policy, devices))
    answers = [
        answer
        for name, of_policy in texts.items()
        for answer in _scored(name, of_policy, chosen, prompts, source)
    ]
    pairs, patterns = _pairs(config, place, answers)
    asked = [prompts.prompt(pair.first.prompt) for pair in pairs]
    scores = pair_scores(source, asked, pairs)
    del source
    free_memory()
    if devices.is_main:
        _write(config, place, asked, pairs, scores, patterns)
        context.say_all(_sentences(place, pairs, patterns))
    devices.wait()


def _pairs(
    config: COOL, place: RoundPlace, answers: list[PolicyAnswer]
) -> tuple[list[AnswerPair], list[Pattern]]:
    """The pairs of both paths, none twice, and the patterns of the fast one."""
    settings, seed = config.candidates, config.seed + place.number
    pairs, patterns = slow_pairs(answers, settings, seed), []
    if settings.fast:
        start, recorded = start_and_end(place.policy.answers)
        patterns = find_patterns(start, recorded, settings.patterns)
        rollouts = [
            PolicyAnswer(row["prompt_number"], row["answer"], "last", row["score"])
            for row in recorded
            if row["score"] is not None
        ]
        for pattern in patterns:
            pairs += fast_pairs(pattern, [*answers, *rollouts], settings, seed)
    distinct = {(pair.first.prompt, frozenset([pair.first.text, pair.second.text])): pair for pair in pairs}
    return list(distinct.values()), patterns


def _sentences(place: RoundPlace, pairs: Sequence[AnswerPair], patterns: Sequence[Pattern]) -> list[str]:
    grown = [
        f"round {place.number}: {pattern.share:.0%} of the best-scored answers carry {pattern.name}, "
        f"{pattern.share_before:.0%} of the first ones did"
        for pattern in patterns
    ]
    return [*grown, f"round {place.number}: {len(pairs):,} pairs to be labeled in {place.candidates}"]


def _prompts(place: RoundPlace, policy: PolicyConfig, progress: Progress) -> tuple[PromptSet, str]:
    """The training prompts, and the source of the chat template."""
    tokenizer: Any = read_tokenizer(
        locate(Model(path=str(place.policy.folder)), weights=False).tokenizer_folder,
        trust_remote_code=policy.policy.trust_remote_code,
    )
    prompts = load_policy_prompts(policy, tokenizer, progress=progress).train
    return prompts, Template(policy.prompts.template, tokenizer).source


def _drawn_prompts(config: COOL, place: RoundPlace, count: int) -> np.ndarray:
    """int64: indices of the prompts that are answered, ascending, each as often as it gets answers."""
    settings, random = config.candidates, np.random.default_rng([config.seed, place.number])
    drawn = np.sort(random.choice(count, min(settings.prompts, count), replace=False))
    return np.repeat(drawn, settings.answers)


def _answers(
    place: RoundPlace, policy: PolicyConfig, devices: Devices, prompts: PromptSet, chat_template: str
) -> dict[str, Sequence[str]]:
    """Name of a policy -> its answers: of the starting one, the milestones and the last."""
    # Sampled as in rollouts: greedy answers to a prompt would all be the same.
    changes = {"evaluation.temperature": policy.sampling.temperature, "seed": policy.seed + place.number}
    sampled = override(policy, changes)
    return {
        name: answer(entrant(name, model.path, model, sampled, prompts, chat_template), sampled, devices)[
            0
        ].texts
        for name, model in _policies(place, policy).items()
    }


def _scored(
    name: str, texts: Sequence[str], chosen: np.ndarray, prompts: PromptSet, source: RewardSource
) -> list[PolicyAnswer]:
    """A policy's answers with their scores. chosen: the index of each answer's prompt."""
    scores = source.score([prompts.prompt(int(index)) for index in chosen], texts)
    return [
        PolicyAnswer(int(index), text, name, float(score))
        for index, text, score in zip(chosen, texts, scores, strict=True)
    ]


def pair_scores(
    source: RewardSource, asked: Sequence[Prompt], pairs: Sequence[AnswerPair]
) -> list[list[list[float]]]:
    """Of each pair, for each reward model of an ensemble both answers' scores; otherwise both scores, once."""
    sides = ([pair.first.text for pair in pairs], [pair.second.text for pair in pairs])
    first, second = (source.detailed(asked, texts) for texts in sides)
    by_model = [
        np.atleast_2d(scores.total_A if scores.models_KA is None else scores.models_KA)
        for scores in (first, second)
    ]
    return np.stack(by_model, axis=-1).swapaxes(0, 1).tolist()


def _policies(place: RoundPlace, policy: PolicyConfig) -> dict[str, Model]:
    """Name -> the model of each policy that answers."""
    run, trusted = place.policy, policy.policy.trust_remote_code
    milestones = {name: run.milestone_folder(name) for name in policy.checkpoint.milestones}
    folders = {name: path for name, path in milestones.items() if path.is_dir()} | {"last": run.folder}
    models = {name: Model(path=str(path), trust_remote_code=trusted) for name, path in folders.items()}
    return {"start": policy.policy, **models}


def _write(
    config: COOL,
    place: RoundPlace,
    asked: Sequence[Prompt],
    pairs: Sequence[AnswerPair],
    scores: Sequence[list[list[float]]],
    patterns: Sequence[Pattern],
) -> None:
    """Write the folder of candidates, whole or not at all. asked, scores: of each pair."""
    guidelines = {
        name: wordings.seen[0] for name, wordings in read_conditions(config.reward.conditions).items()
    }
    rows = [
        {"id": f"{place.number}-{number}", **_row(pair, prompt, guidelines), "scores": of_pair}
        for number, (pair, prompt, of_pair) in enumerate(zip(pairs, asked, scores, strict=True), 1)
    ]

    def write(folder: Path) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        (folder / place.candidates.name).write_text(text, encoding="utf-8")
        contents = {"patterns": [pattern.to_dict() for pattern in patterns]}
        (folder / place.patterns.name).write_text(
            json.dumps(contents, indent=1, ensure_ascii=False), encoding="utf-8"
        )

    write_atomically(place.candidates.parent, write)


def _row(pair: AnswerPair, prompt: Prompt, guidelines: Mapping[str, str]) -> dict[str, Any]:
    """The candidate's row, with the fields of its prompt's row, which rules read."""
    sides, condition = (pair.first, pair.second), prompt.condition
    optional = {
        "condition": condition,
        "guideline": None if condition is None else guidelines.get(condition),
        "tools": list(prompt.tools) or None,
    }
    return {
        **{key: value for key, value in prompt.values.items() if key not in _OURS},
        "prompt": [message_of(turn) for turn in prompt.turns],
        "answers": [{"text": side.text, "origin": side.policy} for side in sides],
        **{key: value for key, value in optional.items() if value is not None},
        "pattern": pair.pattern,
    }
