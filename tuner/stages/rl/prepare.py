"""Set-up of the RL loop from its config, and the state that goes on from step to step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tuner.algorithms.algorithm import Algorithm, algorithm_of
from tuner.config import VLLM, AdaptiveKL, PolicyConfig
from tuner.config.alarms import ACTIONS
from tuner.data.dataset import Dataset
from tuner.data.examples import Examples
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
from tuner.models.load_roles import load_policy_roles
from tuner.models.positions import check_generated_length
from tuner.models.roles import Roles
from tuner.rollout.engine import Engine
from tuner.rollout.experience import Experience
from tuner.rollout.health import Health, Sign
from tuner.rollout.reference_answers import ReferenceAnswers
from tuner.rollout.reward_sources import RewardSource, Scores
from tuner.rollout.rollout import Rollout
from tuner.rollout.rollout_figures import split_best
from tuner.rollout.rules import Rule, load_rule, rule_scores
from tuner.rollout.sampler_gap import CORRECTION, AnyObserved, SamplerGap, corrected
from tuner.rollout.shaping import length_penalties, preferences, shape_scores
from tuner.rollout.updates import Update, updates
from tuner.stages.context import Context
from tuner.stages.model_folder import write_model_folder
from tuner.stages.rl.engine import load_engine, reference_answers
from tuner.stages.rl.models import model_paths, policy_models
from tuner.stages.rl.prompts import load_rows, long_prompts
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
    references: ReferenceAnswers | None
    """The reference policy's answers that rewards compare with; None where they compare with none."""
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

    def score(self, step: Step, rollout: Rollout) -> Scores:
        """Scores of the answers; what they are made from is logged: parts of a sum, several reward models."""
        scores = self.reward.detailed(rollout.prompts, rollout.texts)
        step.metrics |= scores.figures()
        return scores

    def reference_scores(self, step: Step, rollout: Rollout) -> np.ndarray | None:
        """Scores of the reference policy's answers to each answer's prompt, less their penalties, float64 [A, M]; None
        where rewards compare with none."""
        if self.references is None:
            return None
        with step.part("references"):
            indices = self.stream.step(step.index)
            answers = self.references.answer(self.stream.prompts, indices, step.index)
            scores_R = self.reward.score(answers.prompts, answers.texts)
            step.metrics["reference_score"] = float(scores_R.mean())
            return self.references.compared(scores_R, answers, rollout.answers_per_prompt)

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

    def shape(
        self, scores_A: np.ndarray, rollout: Rollout, references_AM: np.ndarray | None = None
    ) -> np.ndarray:
        """Shaped scores, float64 [A]. The moments that normalize them are part of the loop's state, which is saved.

        references_AM: as `reference_scores` gives them.
        """
        config, state = self.config, self.loop.state
        preference = None
        if references_AM is not None and config.preference_reward is not None:
            preference = partial(preferences, references_AM=references_AM, settings=config.preference_reward)
        # In the saved state: with moments started anew, a resumed run would scale rewards differently.
        shaped_A, state["scores"] = shape_scores(
            scores_A,
            rollout.ended,
            state.get("scores", {}),
            missing_end_penalty=config.missing_end_penalty,
            length_penalties_A=length_penalties(rollout.answer_lengths, config.length_penalty),
            clip=config.reward_clip,
            normalize=config.normalize_rewards,
            preference=preference,
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
        self, step: Step, rollout: Rollout, scores: Scores, golds_A: np.ndarray | None
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
                score=float(scores.total_A[index]),
                scores=scores.models_of(index),
                gold=None if golds_A is None else float(golds_A[index]),
                ended=rollout.answers[index].ended,
            )
            for index in range(len(rollout) if limit is None else min(limit, len(rollout)))
        ]
        self.context.run.record_answers(step.index + 1, answers)

    def judge(self, step: Step, rollout: Rollout, scores_A: np.ndarray) -> None:
        """Say what a step's figures show of the policy; end the run where an alarm or a KL above the limit does."""
        loop, limit, kl = self.loop, self.config.max_kl, step.metrics.get("kl")
        health = Health.of(loop.state.get("health", {}))
        trains = "policy" in self.algorithm.trains(step.index)
        grad_norm = step.grad_norms.get("policy", 0.0)
        signs = health.judge(step.metrics, trains, grad_norm, *split_best(rollout, scores_A))
        for sign in signs:
            loop.say(f"step {step.index + 1}: {sign.sentence}")
        loop.state["health"] = health.to_state()
        loop.suspect(health.suspicious)
        self._act(step, signs)
        if limit is not None and kl is not None and not kl <= limit:
            loop.stop(f"KL from the reference is {kl:.2f} nats a token, above max_kl={limit:g}")

    def _act(self, step: Step, signs: Sequence[Sign]) -> None:
        """Stop or roll back as the config's alarms say of new signs; the one that does more counts."""
        actions = {sign.name: getattr(self.config.alarms, sign.kind, "warn") for sign in signs}
        name = max(actions, key=lambda name: ACTIONS.index(actions[name]), default=None)
        if name is None or actions[name] == "warn":
            return
        reason = f"alarms.{name.partition(' ')[0]}={actions[name]!r}"
        # In the saved state, from which a run that is killed before its end takes it for its results.
        self.loop.state["alarm"] = {"sign": name, "step": step.index + 1, "action": actions[name]}
        if actions[name] == "stop":
            self.loop.stop(reason)
        else:
            self.loop.roll_back(reason)

    def finish(self, before: PolicyMeasurement) -> None:
        """Measure the trained policy, and write model and results."""
        loop = self.loop
        # an evaluation of the last step is not repeated, where that is the model and was evaluated
        known = None if loop.restores_earlier or loop.ended_early else self.held_out.last
        if loop.restores_earlier:
            loop.load_model_step()
            self.engine.weights_changed()
        after = self._measure("after", known)
        model_step = loop.counters.model_step
        metrics = self.context.run.metrics if self.context.devices.is_main else []
        last = next((record for record in metrics if record["step"] == model_step), {})
        results = {**policy_results(before, after), "kl": last.get("kl")}
        if (alarm := loop.state.get("alarm")) is not None:
            results["alarm"] = {**alarm, "model_step": model_step}
        template = self.config.prompts.template
        self.context.finish(
            results, partial(write_model_folder, self.roles.loaded, template), self.roles.loaded
        )

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
    models = policy_models(config, algorithm.roles)
    loaded = load_policy_roles(
        models,
        devices.device,
        devices.autocast,
        devices.mesh.shards,
        install_kernels=partial(context.install_kernels, config),
    )
    roles = loaded.roles
    if devices.is_main:
        paths = model_paths(config)
        for name, fingerprint in loaded.fingerprints.items():
            context.run.pin(name, fingerprint, path=paths[name])
    context.seed_dropout(config.seed)
    context.lay_out(roles)
    prompts, stream, replay = load_rows(config, context, loaded)
    check_generated_length(
        roles.loaded.transformer, config.prompts.max_length + config.sampling.max_new_tokens
    )
    too_long = long_prompts(config, roles, prompts, replay)
    ends = end_ids(Template(config.prompts.template, roles.tokenizer), roles.tokenizer)
    engine = load_engine(config, context, roles, ends)
    reward = reward_source(config, roles, loaded.reward_inputs, devices)
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
        references=reference_answers(config, roles, ends, devices),
        stream=stream,
        replay=None if replay is None else _replay_stream(config, replay.train),
        held_out=held_out,
        rule=rule if config.evaluation.rule_on_rollouts else None,
        loop=loop,
    )


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
    return HeldOutPolicy(judge, rows, engine, roles.tokenizer, evaluation, config.sampling.max_new_tokens)
