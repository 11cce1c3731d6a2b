"""Evaluation of a finished run's policy on its test prompts, alone and against other policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group

from tuner.config import Model, PolicyConfig
from tuner.data.load_examples import load_examples
from tuner.data.prompts import PromptSet
from tuner.data.subset import stratified_subset
from tuner.data.template import Template
from tuner.display.over_optimization_page import over_optimization_html, over_optimization_terminal
from tuner.display.progress import progress_bar, reading_bar
from tuner.display.win_page import policy_html, policy_terminal
from tuner.errors import UserError
from tuner.evaluation.judge import Answers, Judge, JudgedAnswers
from tuner.evaluation.over_optimization.form import (
    FormEffect,
    effect_results,
    favored_phrases,
    form_effects,
)
from tuner.evaluation.over_optimization.report import over_optimization
from tuner.evaluation.over_optimization.report import results as sign_results
from tuner.evaluation.position_loss import HeldOutReplay, RangeLoss
from tuner.evaluation.win_rate import Contestant, PolicyCard, judge_all, policy_card, results
from tuner.models.load import Loaded, load_model
from tuner.models.locate import locate
from tuner.models.reward_roles import RewardPlace, reward_role_names, reward_roles
from tuner.models.roles import Roles
from tuner.models.scorer import RewardInputs
from tuner.models.tokenizer import read_tokenizer
from tuner.rollout.reward_sources import RewardSource
from tuner.rollout.rules import load_rule
from tuner.stages.rl.entrants import answer, entrant
from tuner.stages.rl.prompts import load_policy_prompts
from tuner.stages.rl.reward_source import reward_source, scorer_of
from tuner.stages.run import Run
from tuner.stages.stage import Evaluation
from tuner.training.devices import Devices


def evaluate(
    run: Run,
    config: PolicyConfig,
    against: Sequence[str] = (),
    *,
    title: str | None = None,
    names: Mapping[str, str] | None = None,
) -> Evaluation:
    """Judge the answers of a finished run's policy, and of others, to the config's test prompts.

    against: runs, model folders or hub names. title: of the page; None: the run's name. names: path -> name in tables,
    where the folder's says too little. Each policy reads the prompts in its own chat template, or in the run's where
    it has none; sampling, reward, conditions and gold rule are the run's. One model is in memory at a time. Raises
    UserError, before any generation, where a model is missing or not a policy, and when there are no test prompts.
    """
    title, signs = title or run.folder.name, over_optimization(run)
    grown = [course.phrase.text for course in signs.phrases]
    card, effects = _measure(run, config, against, names or {}, grown)
    figures = {"over_optimization": sign_results(signs), "form": effect_results(effects)}
    return Evaluation(
        title,
        results(card) | figures,
        Group(policy_terminal(card), over_optimization_terminal(signs, effects)),
        lambda: policy_html(card, title, over_optimization_html(signs, effects)),
    )


def _measure(
    run: Run, config: PolicyConfig, against: Sequence[str], names: Mapping[str, str], grown: Sequence[str]
) -> tuple[PolicyCard, list[FormEffect]]:
    """The policies' answers judged, and those of the run's rewritten in form. grown: phrases that grew in training."""
    folder, devices = run.folder, Devices.unsharded(config)
    # Everything that can be refused comes before any generation: a mistyped name must not cost hours.
    rule = load_rule(config.evaluation.rule, "evaluation.rule")
    reward = find_reward(config, devices)
    prompts, chat_template = _test_prompts(run, config)
    others = list(dict.fromkeys(against))
    shown = _names(folder, others, names)
    # The config's trust covers the run's own model only; code of the models it is compared with never runs.
    trained = Model(path=str(run.model_folder), trust_remote_code=config.policy.trust_remote_code)
    models = [trained, *(Model(path=path) for path in others)]
    policy, *opponents = [
        entrant(name, path, model, config, prompts, chat_template)
        for name, path, model in zip(shown, [str(folder), *others], models, strict=True)
    ]
    policy_answers, ranges = answer(
        policy, config, devices, lambda roles: _replay_loss(config, roles, devices)
    )
    answers = [policy_answers, *(answer(opponent, config, devices)[0] for opponent in opponents)]
    judge = Judge(prompts, load_reward(config, devices, reward), rule, str(config.evaluation.rule), devices)
    judged = _judge(config, judge, answers)
    with progress_bar("Judging rewritten answers", 1) as advance:
        effects = form_effects(judge, policy_answers, judged[0], favored_phrases(judged[0], grown))
        advance(1)
    first, *rest = [
        Contestant(contestant.name, contestant.path, texts, scores)
        for contestant, texts, scores in zip([policy, *opponents], answers, judged, strict=True)
    ]
    return policy_card(first, rest, ranges, scorer_of(config)), effects


def find_reward(config: PolicyConfig, devices: Devices) -> RewardSource | dict[str, RewardPlace]:
    """The rule that scores, or the places of the reward models by role. UserError where one is gone, or wrong."""
    models = config.reward_models
    if not models:
        return reward_source(config, None, {}, devices)
    places: dict[str, RewardPlace] = {}
    for name, model in zip(reward_role_names(len(models)), models, strict=True):
        places[name] = RewardPlace(model, locate(model, weights=False))
        if not places[name].location.has_score:
            raise UserError(f"{model.path}: this is no longer a reward model; restore it, or train again")
    return places


def _test_prompts(run: Run, config: PolicyConfig) -> tuple[PromptSet, str]:
    """The test prompts, at most as many as the run measured during training, and the chat template's source."""
    tokenizer: Any = read_tokenizer(
        locate(Model(path=str(run.model_folder)), weights=False).tokenizer_folder,
        trust_remote_code=config.policy.trust_remote_code,
    )
    with reading_bar() as progress:
        prompts = load_policy_prompts(config, tokenizer, progress=progress).test
    if prompts is None:
        raise UserError(f"{run.folder}: its config holds out no test prompts; name some with --files")
    return stratified_subset(prompts, config.evaluation.rows), Template(
        config.prompts.template, tokenizer
    ).source


def _names(folder: Path, others: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """Names in tables: the given one, or the last part of a folder's path, or the whole path where another policy has
    that name."""
    paths = [str(folder), *others]
    short = [
        names.get(path) or (Path(path).resolve().name if Path(path).is_dir() else path) for path in paths
    ]
    return [
        name if short.count(name) == 1 or not index else path
        for index, (name, path) in enumerate(zip(short, paths, strict=True))
    ]


def _replay_loss(config: PolicyConfig, policy: Roles, devices: Devices) -> list[RangeLoss]:
    rows = None if config.replay is None else load_examples(config.replay.data, policy.tokenizer).test
    rows = stratified_subset(rows, config.evaluation.rows)
    return HeldOutReplay(rows, policy, devices, config.tokens_per_pass).losses_by_position()


def _judge(config: PolicyConfig, judge: Judge, answers: Sequence[Answers]) -> list[JudgedAnswers]:
    """Each policy's answers scored by the run's reward and gold rule."""
    total = sum(len(policy.texts) for policy in answers)
    with progress_bar("Judging answers", total) as advance:
        judged = judge_all(judge, answers)
        advance(total)
    _check_numbers(config, judged)
    return judged


def load_reward(
    config: PolicyConfig, devices: Devices, reward: RewardSource | dict[str, RewardPlace]
) -> RewardSource:
    """What scores the answers. Reward models are loaded only now, when no policy is in memory any more."""
    if not isinstance(reward, dict):
        return reward

    def load(model: Model) -> Loaded:
        return load_model(model, precision=config.precision, device=devices.device, train=False, head="score")

    roles = reward_roles(reward, [], load, shared=config.roles == "shared")
    inputs = {
        name: RewardInputs.of(place.model, place.location, roles[name].loaded)
        for name, place in reward.items()
    }
    return reward_source(config, Roles(roles, devices.autocast), inputs, devices)


def _check_numbers(config: PolicyConfig, judged: Sequence[JudgedAnswers]) -> None:
    for policy in judged:
        if not np.isfinite(policy.scores_A).all():
            index = int(np.flatnonzero(~np.isfinite(policy.scores_A))[0])
            model = "" if config.reward_model is None else config.reward_model.path
            raise UserError(
                f"{policy.prompts.origin(index)}: {model} gives {policy.scores_A[index]} for an answer, which "
                "is not a score; train the reward model again"
            )
