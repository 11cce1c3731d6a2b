"""A finished PPO run's policy on its test prompts, alone and against other policies that answer the same ones."""

from __future__ import annotations

import gc
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from tuner.config import PPO, Model
from tuner.data.dataset import load_data
from tuner.data.encoding import encode
from tuner.data.prompts import PromptSet
from tuner.data.subset import spread
from tuner.data.template import Template
from tuner.display.progress import progress_bar, reading_bar
from tuner.errors import UserError
from tuner.evaluation.judged import Answers, Judge, Judged, Rule, answer_held_out, load_rule
from tuner.evaluation.position_loss import HeldOutReplay, RangeLoss
from tuner.evaluation.win_rate import Contestant, PolicyCard, compare, judge_all
from tuner.models.chat import end_ids
from tuner.models.load import load_model
from tuner.models.locate import Location, locate
from tuner.models.roles import Roles
from tuner.models.scorer import RewardInputs
from tuner.models.tokenizer import read_tokenizer
from tuner.stages.rows import load_rows
from tuner.training.devices import Devices
from tuner.training.run_folder import Run


def compare_policies(folder: Path, config: PPO, model: Path, against: Sequence[str] = ()) -> PolicyCard:
    """Have the policy in `model`, of the run in `folder`, and others answer the config's test prompts, and judge them.

    against: runs, model folders or hub names. Each is asked in its own chat template, or the run's where it has none,
    with the run's sampling; reward model, conditions and rule are the run's. One model is held at a time. Raises
    UserError where one is missing or no policy, and when there are no test prompts, before anything is answered.
    """
    devices = Devices(config)
    rule = _load_rule(folder, config)
    reward = _locate_reward(config)
    prompts, talk = _test_prompts(folder, config, model)
    others = list(dict.fromkeys(against))
    names = _names(folder, others)
    trained = Model(path=str(model), trust_remote_code=config.policy.trust_remote_code)
    models = [trained, *(Model(path=path) for path in others)]
    own, *entered = [
        _enter(name, path, one, config, prompts, talk)
        for name, path, one in zip(names, [str(folder), *others], models, strict=True)
    ]
    answers, ranges = _answer(own, config, devices, with_replay=True)
    everyone = [answers, *(_answer(one, config, devices)[0] for one in entered)]
    judged = _judge(config, devices, reward, prompts, rule, everyone)
    first, *rest = [
        Contestant(one.name, one.path, said, found)
        for one, said, found in zip([own, *entered], everyone, judged, strict=True)
    ]
    return compare(first, rest, ranges)


@dataclass(frozen=True)
class _Entrant:
    """A policy that is going to answer."""

    name: str
    path: str
    model: Model
    precision: Literal["bf16", "fp32"]
    prompts: PromptSet
    """With the policy's own tokens."""
    end_ids: Collection[int]


def _load_rule(folder: Path, config: PPO) -> Rule | None:
    """The config's rule; from the run's own copy of its file where that has gone."""
    named = config.evaluation.rule
    file, _, function = str(named).rpartition(":")
    copies = (Run(folder).kept("functions") or {}).get("copies", {})
    if named is not None and not Path(file).is_file() and file in copies:
        named = f"{folder / copies[file]}:{function}"
    return load_rule(named)


def _test_prompts(folder: Path, config: PPO, model: Path) -> tuple[PromptSet, str]:
    """The prompts, as many of them as the run itself measured, and the text of the chat template."""
    tokenizer = read_tokenizer(
        locate(Model(path=str(model)), weights=False).tokenizer_folder,
        trust_remote_code=config.policy.trust_remote_code,
    )
    with reading_bar() as progress:
        prompts = load_rows(config, tokenizer, progress=progress).test
    if prompts is None:
        raise UserError(f"{folder}: its config holds out no test prompts; name some with --files")
    return spread(prompts, config.evaluation.rows), Template(config.prompts.template, tokenizer).source


def _locate_reward(config: PPO) -> Location:
    location = locate(config.reward, weights=False)
    if not location.has_score:
        raise UserError(f"{config.reward.path}: this is no reward model any more; restore it, or train again")
    return location


def _names(folder: Path, others: Sequence[str]) -> list[str]:
    """What policies are called: a folder by its last part, unless another is called the same."""
    paths = [str(folder), *others]
    short = [Path(path).resolve().name if Path(path).is_dir() else path for path in paths]
    return [
        name if short.count(name) == 1 or not place else path
        for place, (name, path) in enumerate(zip(short, paths, strict=True))
    ]


def _enter(name: str, path: str, model: Model, config: PPO, prompts: PromptSet, talk: str) -> _Entrant:
    """Find a policy, and put the prompts into its own words. talk: the template of one that has none."""
    location = locate(model, weights=False)
    if location.has_score:
        raise UserError(
            f"{path}: a reward model answers nothing; --against takes a policy: an SFT, DPO or PPO run, a folder "
            "with a language model, or a hub name"
        )
    tokenizer = read_tokenizer(location.tokenizer_folder, trust_remote_code=model.trust_remote_code)
    try:
        tokenizer.chat_template = getattr(tokenizer, "chat_template", None) or talk
        template = Template("tokenizer", tokenizer)
        texts = [template.prompt_text(prompts.prompt(index).asked()) for index in range(len(prompts))]
        ends = end_ids(template, tokenizer)
    except UserError as error:
        raise UserError(f"{path}: cannot be asked these prompts: {error}") from error
    ids = encode(tokenizer, texts)
    asked = replace(
        prompts,
        tokens_T=np.array([token for one in ids for token in one], dtype=np.int32),
        offsets=np.cumsum([0, *map(len, ids)], dtype=np.int64),
    )
    # adapters as they were trained, complete models all alike
    precision = config.precision if location.adapter_folder is None else location.precision
    return _Entrant(name, path, model, precision, asked, ends)


def _answer(
    one: _Entrant, config: PPO, devices: Devices, *, with_replay: bool = False
) -> tuple[Answers, list[RangeLoss]]:
    """A policy's answers, and its loss on the held-out replay rows; its model is gone when this returns."""
    loaded = load_model(one.model, precision=one.precision, device=devices.device, train=False)
    autocast = partial(
        torch.autocast, devices.device.type, dtype=torch.bfloat16, enabled=one.precision == "bf16"
    )
    policy = Roles.of("policy", loaded, autocast)
    with progress_bar(f"{one.name} answers", len(one.prompts)) as advance:
        answers = answer_held_out(one.prompts, policy, one.end_ids, config, devices)
        advance(len(one.prompts))
    ranges = _replay_loss(config, policy, devices) if with_replay else []
    del loaded, policy
    _free()
    return answers, ranges


def _replay_loss(config: PPO, policy: Roles, devices: Devices) -> list[RangeLoss]:
    rows = None if config.replay is None else load_data(config.replay.data, policy.tokenizer).test
    rows = spread(rows, config.evaluation.rows)
    return HeldOutReplay(rows, policy, devices, config.tokens_per_pass).measure()


def _judge(
    config: PPO,
    devices: Devices,
    location: Location,
    prompts: PromptSet,
    rule: Rule | None,
    answers: Sequence[Answers],
) -> list[Judged]:
    """What the run's reward model and rule say of them."""
    loaded = load_model(
        config.reward, precision=config.precision, device=devices.device, train=False, head="score"
    )
    sequences = RewardInputs.of(config.reward, location, loaded)
    judge = Judge(prompts, config, sequences, devices, rule)
    with progress_bar("Judging answers", sum(len(one.texts) for one in answers)) as advance:
        judged = judge_all(judge, Roles.of("reward", loaded, devices.autocast), answers)
        advance(sum(len(one.texts) for one in answers))
    _check_numbers(config, judged)
    return judged


def _check_numbers(config: PPO, judged: Sequence[Judged]) -> None:
    for one in judged:
        if not np.isfinite(one.scores_A).all():
            place = int(np.flatnonzero(~np.isfinite(one.scores_A))[0])
            raise UserError(
                f"{one.prompts.origin(place)}: {config.reward.path} gives {one.scores_A[place]} for an answer, which "
                "is no score; train the reward model again"
            )


def _free() -> None:
    """Give back what a model held before the next is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
