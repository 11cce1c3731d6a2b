"""Proximal policy optimisation, as in the InternLM2 report (arXiv 2403.17297, 4.2.3): a step in six parts."""

from __future__ import annotations

from tuner.config import PPO
from tuner.losses.policy import policy_loss, value_loss
from tuner.models.forward import token_logprobs, token_loss, values
from tuner.models.roles import Roles
from tuner.rollout.answers import answer_prompts
from tuner.rollout.experience import observe, with_advantages, with_rewards
from tuner.rollout.health import health
from tuner.rollout.scores import learned_scores, score_answers
from tuner.rollout.updates import Update, updates
from tuner.stages.job import Job
from tuner.stages.rl.prepare import prepare
from tuner.training.step import Step


def ppo(config: PPO, job: Job) -> None:
    """Teach the policy to answer as the reward model prefers, near to what it was."""
    made, devices = prepare(config, job), job.devices
    roles, loop = made.roles, made.loop
    before = made.measure_before()
    for step in loop:
        with step.part("generate"):
            chosen = made.stream.step(step.index)
            rollout = answer_prompts(
                roles, made.stream.prompts, chosen, made.end_ids, config, devices, step.index
            )
        with step.part("logprobs"):
            rows = rollout.rows(config.mini_batches, config.tokens_per_pass, devices)
            step.batches = [row.batch for row in rows]  # to be looked at where a step goes wrong
            observed = observe(roles, rows, config.sampling.temperature)
        with step.part("scores"):
            scores_A = score_answers(roles, made.sequences, rollout, config.tokens_per_pass, devices)
        with step.part("rewards"):
            learned_A, loop.state["scores"] = learned_scores(
                scores_A, rollout.ended, loop.state.get("scores", {}), config
            )
            rewarded = with_rewards(observed, learned_A, config)
        with step.part("advantages"):
            experiences = with_advantages(rewarded, config, devices)
        with step.part("updates"):
            warming_up = step.index < config.critic_warmup
            replayed = [] if warming_up else made.draw_replay(step, rollout.num_tokens)
            for update in updates(rollout, experiences, made.replay, replayed, config, devices):
                step.totals = update.totals
                if not warming_up:
                    learn_policy(step, roles, update, config)
                learn_values(step, roles, update, config)
                step.update(*(["critic"] if warming_up else ["policy", "critic"]))
        step.tokens = rollout.num_tokens
        made.keep_answers(step, rollout, scores_A)
        step.metrics |= health(rollout, scores_A, experiences, devices)
        step.finish()
    made.finish(before)


def learn_policy(step: Step, roles: Roles, update: Update, config: PPO) -> None:
    """Gradients of the clipped policy loss, and of the replayed rows' beside it."""
    for one in update.experiences:
        with roles.role("policy", train=True) as model:
            logprobs_N, _ = token_logprobs(model, one.row.batch, config.sampling.temperature)
            found = policy_loss(logprobs_N, one.old_N, one.advantages_N, config.clip)
            step.add(found.loss, per="answer_tokens", name="policy_loss")
            step.note("ratio", found.ratio, per="answer_tokens")
            step.note("clipped", found.clipped, per="answer_tokens")
            step.note("update_kl", found.kl, per="answer_tokens")
            step.backward()
    coefficient = 0.0 if config.replay is None else config.replay.coefficient
    for batch in update.replayed:
        with roles.role("policy", train=True) as model:
            step.add(token_loss(model, batch), "replay_tokens", "replay_loss", factor=coefficient)
            step.backward()


def learn_values(step: Step, roles: Roles, update: Update, config: PPO) -> None:
    """Gradients of the critic's squared error."""
    for one in update.experiences:
        with roles.role("critic", train=True) as model:
            values_N = values(model, one.row.batch)
            loss = value_loss(values_N, one.returns_N, one.values_N, config.value_clip)
            step.add(loss, per="answer_tokens", name="value_loss")
            step.backward()
