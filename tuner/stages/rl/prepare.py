"""Set-up of the RL loop from its config, and the state that goes on from step to step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tuner.algorithms.algorithm import Algorithm, algorithm_of
from tuner.config import VLLM, AdaptiveKL, PolicyConfig
from tuner.data.dataset import Dataset, load_data
from tuner.data.examples import Examples
from tuner.data.load_prompts import load_prompts
from tuner.data.prompt_stream import PromptStream
from tuner.data.prompts import PromptSet
from tuner.data.replay import ReplayStream
from tuner.data.rollout_rows import rollout_row
from tuner.data.subset import stratified_subset
from tuner.data.template import Template
from tuner.errors import UserError
from tuner.evaluation.held_out_policy import HeldOutPolicy, PolicyMeasurement, policy_results
from tuner.evaluation.judge import Judge
from tuner.evaluation.position_loss import HeldOutReplay
from tuner.losses.policy import adapted_coefficient
from tuner.models.chat import end_ids
from tuner.models.load_roles import PolicyRoles, load_policy_roles
from tuner.models.positions import check_generated_length
from tuner.models.roles import Roles
from tuner.rollout.engine import Engine
from tuner.rollout.experience import Experience
from tuner.rollout.health import Health
from tuner.rollout.reward_sources import RewardSource, SummedReward, summed
from tuner.rollout.rollout import Rollout
from tuner.rollout.rollout_figures import split_best
from tuner.rollout.rules import Rule, load_rule, rule_scores
from tuner.rollout.sampler_gap import CORRECTION, AnyObserved, SamplerGap, corrected
from tuner.rollout.shaping import length_penalties, shape_scores
from tuner.rollout.updates import Update, updates
from tuner.stages.context import Context
from tuner.stages.model_folder import write_model_folder
from tuner.stages.rl.engine import load_engine
from tuner.stages.rl.models import policy_models
from tuner.stages.rl.prompts import long_prompts, plan_run
from tuner.stages.rl.reward_source import reward_source
from tuner.stages.rl.sampling_notes import sampling_notes
from tuner.training.json_lines import read_json
from tuner.training.loop import Loop
from tuner.training.step import Step


@dataclass(frozen=True)
class Setup:
    """Models, rows and loop of a run, and the parts of a step that carry state or write records."""

    config: PolicyConfig
    context: Context
    algorithm: Algorithm[Any]
    roles: Roles
    engine: Engine
    reward: RewardSource
    stream: PromptStream
    replay: ReplayStream | None
    held_out: HeldOutPolicy
    rule: Rule | None
    """The gold rule; None where there is none for rollouts."""
    loop: Loop

    def measure_before(self) -> PolicyMeasurement:
        """Held-out measurement before the first step; a resumed run reads it from its before.json."""
        if self.loop.counters.step:  # no measure of a policy in training would be one of before it
            file = self.context.run.folder / "before.json"
            try:
                return PolicyMeasurement.from_dict(read_json(file))
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{file}: not the measures before training; restore it") from error
        before = self._measure("before", None)
        if self.context.devices.is_main:
            self.context.run.save_json("before", before.to_dict())
        return before

    def score(self, step: Step, rollout: Rollout) -> np.ndarray:
        """Scores of the answers, float64 [A]; where they are a sum, the means of its parts are logged."""
        if not isinstance(self.reward, SummedReward):
            return self.reward.score(rollout.prompts, rollout.texts)
        parts = self.reward.parts(rollout.prompts, rollout.texts)
        step.metrics |= {f"score_of/{name}": float(part_A.mean()) for name, part_A in parts.items()}
        return summed(parts)

    def corrected(
        self, step: Step, rollout: Rollout, observed: Sequence[AnyObserved]
    ) -> Sequence[AnyObserved]:
        """The observed rows; of an external engine, with its log-probabilities where they are too far from the
        trainer's, and with the gap logged. Raises UserError where the config stops the run for it."""
        engine = self.config.engine
        if not isinstance(engine, VLLM):
            return observed
        gap = SamplerGap.of(rollout, observed, self.context.devices)
        step.metrics["generator_gap_max"] = gap.largest
        rows = corrected(rollout, observed, gap, engine)
        if rows is not observed and not self.loop.state.get("gap_is_corrected"):
            # Once a run, and not again when it is resumed.
            self.loop.state["gap_is_corrected"] = True
            self.loop.say(f"step {step.index + 1}: {gap}, {CORRECTION}")
        return rows

    def gold(self, rollout: Rollout) -> np.ndarray | None:
        """Gold scores of the answers, float64 [A], which nothing is trained on; None without a rule.

        Raises UserError where the rule fails or gives a number outside 0..1.
        """
        if self.rule is None:
            return None
        name = (
            f"evaluation.rule {str(self.config.evaluation.rule)!r}, of a training prompt's answer "
            "(evaluation.rule_on_rollouts=False leaves these out),"
        )
        devices, bounds = self.context.devices, (0.0, 1.0)
        return rule_scores(self.rule, name, rollout.prompts, rollout.texts, devices, bounds=bounds)

    def shape(self, scores_A: np.ndarray, rollout: Rollout) -> np.ndarray:
        """Shaped scores, float64 [A]. The moments that normalize them are part of the loop's state, which is saved."""
        config, state = self.config, self.loop.state
        # In the saved state: with moments started anew, a resumed run would scale rewards differently.
        shaped_A, state["scores"] = shape_scores(
            scores_A,
            rollout.ended,
            state.get("scores", {}),
            missing_end_penalty=config.missing_end_penalty,
            length_penalties_A=length_penalties(rollout.answer_lengths, config.length_penalty),
            clip=config.reward_clip,
            normalize=config.normalize_rewards,
        )
        return shaped_A

    def updates(self, step: Step, rollout: Rollout, experiences: Sequence[Experience]) -> Iterator[Update]:
        """The updates of a step. Replayed rows go with the policy's: none are drawn in a warm-up of the critic."""
        config = self.config
        trains_policy = "policy" in self.algorithm.trains(step.index)
        replayed = self._draw_replay(step, rollout.num_tokens) if trains_policy else []
        if not rollout.learned.any():
            step.metrics["loss"] = None  # there may be no loss at all
            self.loop.say(
                f"step {step.index + 1}: every answer was truncated and is left out of the losses (mask_truncated); "
                "raise sampling.max_new_tokens"
            )
        return updates(
            rollout,
            experiences,
            self.replay,
            replayed,
            epochs=config.update_epochs,
            mini_batches=config.mini_batches,
            devices=self.context.devices,
        )

    def adapt_kl(self, step: Step, rollout: Rollout) -> None:
        """Log the step's KL coefficient and adapt the next one's, where the config says so."""
        adaptive, algorithm = self.config.kl, self.algorithm
        if not isinstance(adaptive, AdaptiveKL):
            return
        step.metrics["kl_coefficient"], kl = algorithm.kl, step.metrics.get("kl_per_answer")
        if kl is not None and "policy" in algorithm.trains(
            step.index
        ):  # in a warm-up nothing would answer to it
            share = len(rollout) / adaptive.horizon
            # In the saved state, from which `prepare` takes it in a resumed run.
            algorithm.kl = adapted_coefficient(algorithm.kl, kl, adaptive.target, share)
            self.loop.state["kl_coefficient"] = algorithm.kl

    def record_answers(
        self, step: Step, rollout: Rollout, scores_A: np.ndarray, golds_A: np.ndarray | None
    ) -> None:
        """Write a rollout's first answers to rollouts.jsonl, and keep some for the next evaluation's samples."""
        if not self.context.devices.is_main:
            return
        evaluation, numbers = self.config.evaluation, self.stream.step(step.index).tolist()
        shown = range(min(evaluation.samples, len(rollout)))
        self.held_out.rollout_samples = [rollout.sample(index, self.roles.tokenizer) for index in shown]
        limit = evaluation.recorded_answers
        answers = [
            rollout_row(
                rollout.prompts[index],
                rollout.texts[index],
                number=numbers[index // rollout.answers_per_prompt],
                score=float(scores_A[index]),
                gold=None if golds_A is None else float(golds_A[index]),
                ended=rollout.answers[index].ended,
            )
            for index in range(len(rollout) if limit is None else min(limit, len(rollout)))
        ]
        self.context.run.record_answers(step.index + 1, answers)

    def judge(self, step: Step, rollout: Rollout, scores_A: np.ndarray) -> None:
        """Say what a step's figures show of the policy, and end the run where its KL is above the limit."""
        loop, limit, kl = self.loop, self.config.max_kl, step.metrics.get("kl")
        health = Health.of(loop.state.get("health", {}))
        trains = "policy" in self.algorithm.trains(step.index)
        grad_norm = step.grad_norms.get("policy", 0.0)
        for sentence in health.judge(step.metrics, trains, grad_norm, *split_best(rollout, scores_A)):
            loop.say(f"step {step.index + 1}: {sentence}")
        loop.state["health"] = health.to_state()
        if limit is not None and kl is not None and not kl <= limit:
            loop.stop(f"KL from the reference is {kl:.2f} nats a token, above max_kl={limit:g}")

    def finish(self, before: PolicyMeasurement) -> None:
        """Measure the trained policy, and write model and results."""
        loop = self.loop
        # an evaluation of the last step is not repeated, where that is the model and was evaluated
        known = None if loop.restores_best or loop.ended_early else self.held_out.last
        if loop.restores_best:
            loop.load_best()
            self.engine.weights_changed()
        after = self._measure("after", known)
        model_step = loop.counters.best_step if loop.restores_best else loop.counters.step
        metrics = self.context.run.metrics if self.context.devices.is_main else []
        last = next((record for record in metrics if record["step"] == model_step), {})
        results = {**policy_results(before, after), "kl": last.get("kl")}
        template = self.config.prompts.template
        self.context.finish(results, partial(write_model_folder, self.roles.loaded, template))

    def _measure(self, when: str, known: PolicyMeasurement | None) -> PolicyMeasurement:
        measurement = known or self.held_out.measure()
        self.loop.say(f"{when} training: {measurement}")
        return measurement

    def _draw_replay(self, step: Step, tokens: int) -> list[int]:
        """Indices of the rows to replay with a rollout of so many tokens; their tokens are logged.

        Rows are never split: tokens too few for the next row are owed to later steps, so the ratio holds over the run.
        """
        if self.replay is None:
            return []
        # In the saved state: a resumed run replays the rows that come next, none twice.
        rows, self.loop.state["replay"] = self.replay.draw(self.loop.state.get("replay", {}), tokens)
        step.metrics["replay_tokens"] = self.replay.tokens(rows)
        return rows


def prepare(config: PolicyConfig, context: Context) -> Setup:
    """Load what a config names. Raises UserError where its parts do not fit together."""
    devices, algorithm = context.devices, algorithm_of(config)
    rule = load_rule(config.evaluation.rule, "evaluation.rule")  # refused before models and rows are loaded
    loaded = load_policy_roles(policy_models(config, algorithm.roles), devices.device, devices.autocast)
    roles = loaded.roles
    if devices.is_main:
        for name, fingerprint in loaded.fingerprints.items():
            context.run.pin(name, fingerprint, path=getattr(config, name).path)
    context.seed_dropout(config.seed)
    prompts, stream, replay = _load_rows(config, context, loaded)
    check_generated_length(
        roles.loaded.transformer, config.prompts.max_length + config.sampling.max_new_tokens
    )
    too_long = long_prompts(config, roles, prompts, replay)
    ends = end_ids(Template(config.prompts.template, roles.tokenizer), roles.tokenizer)
    engine = load_engine(config, context, roles, ends)
    reward = reward_source(config, roles, loaded.sequences, devices)
    held_out = _held_out(config, context, roles, engine, reward, rule, prompts, replay)
    loop = context.loop(config, algorithm.trained(roles), stream, held_out)
    if loop.counters.step:  # a checkpoint was restored
        engine.weights_changed()
        algorithm.kl = loop.state.get("kl_coefficient", algorithm.kl)
    notes = sampling_notes(config.sampling, has_reference="reference" in roles)
    context.say_all((loaded.description, *roles.notes, *too_long, *notes))
    context.say_all(algorithm.warnings(loop.total_steps))
    return Setup(
        config=config,
        context=context,
        algorithm=algorithm,
        roles=roles,
        engine=engine,
        reward=reward,
        stream=stream,
        replay=None if replay is None else _replay_stream(config, replay.train),
        held_out=held_out,
        rule=rule if config.evaluation.rule_on_rollouts else None,
        loop=loop,
    )


def _load_rows(
    config: PolicyConfig, context: Context, loaded: PolicyRoles
) -> tuple[Dataset[PromptSet], PromptStream, Dataset[Examples] | None]:
    """Prompts, their steps, and replayed rows. Raises UserError where a resumed run finds other rows than before."""
    tokenizer = loaded.roles.tokenizer
    # of the model in memory, so that one from a hub checks the prompts, too
    reader = None if loaded.sequences is None else loaded.sequences.reader
    with context.reading() as progress:  # one bar for both; an error must remove it
        prompts = load_prompts(config.prompts, tokenizer, reader, progress=progress)
        stream = plan_run(config, prompts)
        replay = None
        if config.replay is not None:
            replay = load_data(config.replay.data, tokenizer, progress=progress)
    context.pin_rows(*([prompts] if replay is None else [prompts, replay]))
    return prompts, stream, replay


def _replay_stream(config: PolicyConfig, rows: Examples) -> ReplayStream:
    assert config.replay is not None
    return ReplayStream(rows, config.replay.sources, config.replay.ratio, config.tokens_per_pass, config.seed)


def _held_out(
    config: PolicyConfig,
    context: Context,
    roles: Roles,
    engine: Engine,
    reward: RewardSource,
    rule: Rule | None,
    prompts: Dataset[PromptSet],
    replay: Dataset[Examples] | None,
) -> HeldOutPolicy:
    evaluation, devices = config.evaluation, context.devices
    test = stratified_subset(prompts.test, evaluation.rows)
    replayed = stratified_subset(None if replay is None else replay.test, evaluation.rows)
    judge = None if test is None else Judge(test, reward, rule, str(evaluation.rule), devices)
    rows = HeldOutReplay(replayed, roles, devices, config.tokens_per_pass)
    return HeldOutPolicy(judge, rows, engine, roles.tokenizer, evaluation)
