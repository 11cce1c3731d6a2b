"""Supervised fine-tuning, and continued pre-training: the same loop over other rows."""

from __future__ import annotations

from functools import partial

from tuner.config import SFT
from tuner.models.forward import token_loss
from tuner.stages.context import Context
from tuner.stages.model_folder import write_model_folder
from tuner.stages.packed_rows import plan
from tuner.stages.sft.evaluate import held_out_rows, measure, measure_before, template_of


def sft(config: SFT, context: Context) -> None:
    """Train the policy with cross entropy on the rows' tokens, by their loss weights."""
    roles = context.load_role(config, "policy")
    data = context.load_rows(config, roles)
    validation, test = (
        held_out_rows(config, roles, context.devices, rows) for rows in (data.validation, data.test)
    )
    loop = context.loop(config, context.trained(config, roles), plan(config, data), validation)
    before = measure_before(context, test, loop)
    for step in loop:
        with roles.role("policy", train=True) as model:
            for batch in step.batches:
                step.add(token_loss(model, batch), per="tokens")
                step.backward()
        step.finish()
    loop.load_model_step()
    results = {"before": before, "after": measure("after", test, loop)}
    context.finish(results, partial(write_model_folder, roles.loaded, template_of(config)), roles.loaded)
