"""Reinforcement learning of a policy, a step in six parts (InternLM2, arXiv 2403.17297, 4.2.3)."""

from __future__ import annotations

from contextlib import closing

from tuner.config import PolicyConfig
from tuner.rollout.experience import answer_rewards
from tuner.rollout.rollout import answer_prompts
from tuner.rollout.rollout_figures import rollout_figures, token_means
from tuner.stages.context import Context
from tuner.stages.rl.prepare import Setup, prepare


def reinforce(config: PolicyConfig, context: Context) -> None:
    """Train the policy to maximize the reward, with a KL penalty that keeps it near the reference."""
    setup = prepare(config, context)
    with closing(setup.engine):  # however the run ends, a server that it has started ends with it
        _train(setup)


def _train(setup: Setup) -> None:
    config, devices = setup.config, setup.context.devices
    roles, loop, algorithm = setup.roles, setup.loop, setup.algorithm
    before = setup.measure_before()
    for step in loop:
        with step.part("generate"):
            rollout = answer_prompts(
                setup.engine,
                roles.tokenizer,
                setup.stream.prompts,
                setup.stream.step(step.index),
                answers_per_prompt=algorithm.answers_per_prompt,
                masks_truncated=config.mask_truncated,
                step=step.index,
            )
        with step.part("logprobs"):
            rows = rollout.rows(config.mini_batches, config.tokens_per_pass, devices)
            step.batches = [row.batch for row in rows]  # saved where losses stay non-finite
            observed = setup.corrected(step, rollout, algorithm.observe(roles, rows))
        with step.part("scores"):
            scores = setup.score(step, rollout)
            golds_A = setup.gold(rollout)
        references_AM = setup.reference_scores(step, rollout)
        with step.part("rewards"):
            shaped_A = setup.shape(scores.total_A, rollout, references_AM)
            rewarded = algorithm.reward(observed, shaped_A)
            rewards_A = answer_rewards(rewarded, len(rollout), devices)
        with step.part("advantages"):
            experiences = algorithm.estimate(rewarded, rewards_A, devices)
        with step.part("updates"):
            for update in setup.updates(step, rollout, experiences):
                # Each update has its own token counts: losses are sums divided by the counts of all ranks.
                step.totals = update.totals
                algorithm.learn(step, roles, update)
                step.update(*algorithm.trains(step.index))
            if "policy" in algorithm.trains(step.index):
                # An engine with a copy of the weights would silently go on sampling from the old policy.
                setup.engine.weights_changed()
        step.tokens = rollout.num_tokens
        setup.record_answers(step, rollout, scores, golds_A)
        step.metrics |= rollout_figures(rollout, scores.total_A, rewards_A, golds_A)
        step.metrics |= algorithm.derived_figures(
            token_means(rollout, experiences, algorithm.token_figures, devices)
        )
        setup.adapt_kl(step, rollout)
        setup.judge(step, rollout, scores.total_A)
        step.finish()
    setup.finish(before)
