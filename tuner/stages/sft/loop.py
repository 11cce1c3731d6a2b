"""Supervised fine-tuning, and continued pre-training: the same loop over other rows."""

from __future__ import annotations

from tuner.config import SFT
from tuner.models.forward import token_loss
from tuner.stages.job import Job, template_of
from tuner.stages.rows import plan


def sft(config: SFT, job: Job) -> None:
    """Teach the policy to answer like the conversations do."""
    roles = job.load_roles(config, "policy")
    data = job.load_data(config, roles)
    validation, test = (job.held_out(config, roles, rows) for rows in (data.validation, data.test))
    loop = job.loop(config, roles, plan(config, data), validation)
    before = job.measure_before(test, loop)
    for step in loop:
        for batch in step.batches:
            with roles.role("policy", train=True) as model:
                step.add(token_loss(model, batch), per="tokens")
                step.backward()
        step.finish()
    loop.load_best()
    job.finish(template_of(config), roles, {"before": before, "after": job.measure("after", test, loop)})
