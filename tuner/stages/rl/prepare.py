"""What PPO's loop works with, made from its config; and what is written when it is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tuner.config import PPO
from tuner.data.dataset import Dataset, load_data
from tuner.data.examples import Examples
from tuner.data.load_prompts import load_prompts
from tuner.data.prompt_stream import PromptStream
from tuner.data.prompts import PromptSet
from tuner.data.replay import ReplayStream
from tuner.data.subset import spread
from tuner.data.template import Template
from tuner.evaluation.held_out_policy import HeldOutPolicy, PolicyMeasure
from tuner.evaluation.judged import Judge, load_rule
from tuner.evaluation.position_loss import HeldOutReplay, by_position
from tuner.models.chat import end_ids
from tuner.models.load_roles import CRITIC, REFERENCE, REWARD, PolicyModels, PolicyRoles, load_policy_roles
from tuner.models.roles import Roles
from tuner.models.scorer import RewardInputs
from tuner.rollout.rollout import Rollout
from tuner.stages.job import Job
from tuner.stages.rows import all_warm_up, plan_run
from tuner.training.loop import Loop, Step
from tuner.training.optimizers import Trained


@dataclass(frozen=True)
class Prepared:
    """Roles, prompts and replayed rows of a run, and its loop."""

    config: PPO
    job: Job
    roles: Roles
    sequences: RewardInputs
    stream: PromptStream
    replay: ReplayStream | None
    held_out: HeldOutPolicy
    end_ids: frozenset[int]
    loop: Loop

    def measure_before(self) -> PolicyMeasure:
        """The policy before the first step; a run that goes on has it in its before.json."""
        kept = self.job.run.kept("before")
        if self.loop.counters.step and kept is not None:
            return PolicyMeasure.from_dict(kept)
        before = self._look("before", None)
        if self.job.devices.is_main:
            self.job.run.keep("before", before.to_dict())
        return before

    def draw_replay(self, step: Step, tokens: int) -> list[int]:
        """The rows that fall due beside a rollout of so many tokens, counted in the step's record."""
        if self.replay is None:
            return []
        rows, self.loop.kept["replay"] = self.replay.draw(self.loop.kept.get("replay", {}), tokens)
        step.facts["replay_tokens"] = self.replay.tokens(rows)
        return rows

    def keep_answers(self, step: Step, rollout: Rollout, scores_A: np.ndarray) -> None:
        """The first answers of a rollout, to be read: a file shows them step by step."""
        if not self.job.devices.is_main:
            return
        shown = range(min(self.config.evaluation.samples, len(rollout)))
        self.held_out.answered = [rollout.sample(place, self.roles.tokenizer) for place in shown]
        answers = [
            {
                "prompt": rollout.prompts[place].turns[-1].content,
                "answer": rollout.texts[place],
                "condition": rollout.prompts[place].condition,
                "score": float(scores_A[place]),
                "ended": rollout.answers[place].ended,
            }
            for place in shown
        ]
        self.job.run.record_answers(step.index + 1, answers)

    def finish(self, before: PolicyMeasure) -> None:
        """Measure what was trained, and write it."""
        after = self._look("after", self.held_out.last)  # the loop has looked at its last step
        last = (self.job.run.metrics or [{}])[-1] if self.job.devices.is_main else {}
        self.job.finish(
            self.config.prompts.template,
            self.roles,
            {**results(before, after), "kl": last.get("kl")},
        )

    def _look(self, when: str, found: PolicyMeasure | None) -> PolicyMeasure:
        found = found or self.held_out.look()
        self.loop.say(f"{when} training: {found}")
        return found


def prepare(config: PPO, job: Job) -> Prepared:
    """Load what a config names. Raises UserError where it does not fit together."""
    loaded = load_policy_roles(policy_models(config), job.devices.device, job.devices.autocast)
    roles = loaded.roles
    if job.devices.is_main:
        for name, print_of in loaded.fingerprints.items():
            job.run.check_same(name, print_of, path=getattr(config, name).path)
    torch.manual_seed(config.seed + job.devices.rank)
    prompts, stream, replay = _load_rows(config, job, loaded)
    ends = end_ids(Template(config.prompts.template, roles.tokenizer), roles.tokenizer)
    held_out = _held_out(config, job, loaded, prompts.test, None if replay is None else replay.test, ends)
    trained = {
        "policy": Trained(roles.trained("policy"), config.optimizer.lr, config.critic_warmup),
        "critic": Trained(roles.trained("critic"), config.critic_lr),
    }
    loop = Loop(config, job.run, job.devices, trained, stream, held_out, job.watchers)
    for note in (loaded.description, *prompts.report.notes, *all_warm_up(config, loop.total)):
        loop.say(note)
    return Prepared(
        config=config,
        job=job,
        roles=roles,
        sequences=_sequences(loaded),
        stream=stream,
        replay=None if replay is None else _replay_stream(config, replay.train),
        held_out=held_out,
        end_ids=ends,
        loop=loop,
    )


def policy_models(config: PPO) -> PolicyModels:
    """What the roles of a config are loaded from."""
    return PolicyModels(
        policy=config.policy,
        reward=config.reward_model,
        adapter=config.adapter,
        critic_adapter=config.critic_adapter,
        critic_from=config.critic_from,
        layout=config.roles,
        roles=frozenset({REFERENCE, CRITIC, REWARD}),
        template=config.prompts.template,
        precision=config.precision,
        seed=config.seed,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def results(before: PolicyMeasure, after: PolicyMeasure) -> dict[str, Any]:
    """What results.json holds of two looks: gold and score in all and by condition, and the replay set's loss."""
    found: dict[str, Any] = {"conditions": {}}
    for name, value in after.means.items():
        kind, _, condition = name.partition("/")
        place = found["conditions"].setdefault(condition, {}) if condition else found
        place[kind] = {"before": before.means[name], "after": value}
    if after.ranges:
        found["replay"] = {"before": before.replay_loss, "after": after.replay_loss}
        found["positions"] = by_position(before.ranges, after.ranges)
    return found


def _load_rows(
    config: PPO, job: Job, loaded: PolicyRoles
) -> tuple[Dataset[PromptSet], PromptStream, Dataset[Examples] | None]:
    """Prompts, the steps they make, and replayed rows; refuses to go on with other rows than before."""
    tokenizer = loaded.roles.tokenizer
    reader, replay = _sequences(loaded).reader, None
    with job.reading() as progress:  # one bar, which leaves without a word where the rows do not fit together
        prompts = load_prompts(config.prompts, tokenizer, reader, progress=progress)
        stream = plan_run(config, prompts)
        if config.replay is not None:
            replay = load_data(config.replay.data, tokenizer, progress=progress)
    if job.devices.is_main:
        parts: Sequence[Any] = [prompts] if replay is None else [prompts, replay]
        together = "-".join(part.fingerprint for part in parts)
        job.run.check_same("data", together, report=[part.report.to_dict() for part in parts])
        for part in parts:
            job.run.log(str(part.report))
    return prompts, stream, replay


def _replay_stream(config: PPO, rows: Examples) -> ReplayStream:
    assert config.replay is not None
    return ReplayStream(rows, config.replay.sources, config.replay.ratio, config.tokens_per_pass, config.seed)


def _held_out(
    config: PPO,
    job: Job,
    loaded: PolicyRoles,
    prompts: PromptSet | None,
    replay: Examples | None,
    ends: frozenset[int],
) -> HeldOutPolicy:
    rule, limit = load_rule(config.evaluation.rule), config.evaluation.rows
    prompts, replay = spread(prompts, limit), spread(replay, limit)
    judge = None if prompts is None else Judge(prompts, config, _sequences(loaded), job.devices, rule)
    rows = HeldOutReplay(replay, loaded.roles, job.devices, config.tokens_per_pass)
    return HeldOutPolicy(judge, rows, loaded.roles, ends, config.evaluation.samples)


def _sequences(loaded: PolicyRoles) -> RewardInputs:
    assert loaded.sequences is not None  # PPO has a reward model
    return loaded.sequences
