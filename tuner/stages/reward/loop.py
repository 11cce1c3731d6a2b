"""The conditional reward model: a scalar head that scores an answer under its row's condition (InternLM2, 4.2.1)."""

from __future__ import annotations

from tuner.config import RewardModel
from tuner.evaluation.held_out_pairs import HeldOutPairs
from tuner.models.forward import scores
from tuner.models.pair_sums import pair_sums
from tuner.stages.context import Context
from tuner.stages.packed_rows import plan
from tuner.stages.reward.finish import finish_reward


def reward(config: RewardModel, context: Context) -> None:
    """Train scores to rank answers as the rows do, each row under the condition it names."""
    roles = context.load_role(config, "reward", head="score")
    data = context.load_rows(config, roles)
    held_out = HeldOutPairs(
        data.validation, roles, context.devices, config.evaluation, config.loss, config.tokens_per_pass
    )
    loop = context.loop(config, context.trained(config, roles), plan(config, data), held_out)
    for step in loop:
        with roles.role("reward", train=True) as model:
            for batch in step.batches:
                sums = pair_sums(scores(model, batch), batch, config.loss)
                step.add(sums.ranking, per="pairs", name="ranking")
                step.add(sums.penalty, per="answers", name="penalty")
                step.note("accuracy", sums.right, per="pairs")
                step.note("margin", sums.lead, per="pairs")
                step.note("score", sums.score, per="answers")
                step.backward()
        step.finish()
    loop.load_model_step()
    finish_reward(config, context, roles, loop)
