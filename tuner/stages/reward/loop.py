"""The conditional reward model: one scalar head that tells which answer is preferred, and under which condition."""

from __future__ import annotations

from tuner.config import RewardModel
from tuner.evaluation.held_out_pairs import HeldOutPairs
from tuner.models.forward import scores
from tuner.models.pair_sums import pair_sums
from tuner.stages.job import Job
from tuner.stages.reward.finish import finish_reward
from tuner.stages.rows import plan


def reward(config: RewardModel, job: Job) -> None:
    """Teach scores that rank answers as the rows do, each row under the condition it names."""
    roles = job.load_roles(config, "reward")
    data = job.load_data(config, roles)
    loop = job.loop(
        config, roles, plan(config, data), HeldOutPairs(data.validation, roles, job.devices, config)
    )
    for step in loop:
        for batch in step.batches:
            with roles.role("reward", train=True) as model:
                found = pair_sums(scores(model, batch), batch, config.loss)
                step.add(found.ranking, per="pairs", name="ranking")
                step.add(found.penalty, per="answers", name="penalty")
                step.note("accuracy", found.right, per="pairs")
                step.note("margin", found.lead, per="pairs")
                step.note("score", found.score, per="answers")
                step.backward()
        step.finish()
    loop.load_best()
    finish_reward(config, job, roles, loop)
