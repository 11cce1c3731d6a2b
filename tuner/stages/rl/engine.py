"""The engine that a policy stage's config names, and what it needs; and the reference's own."""

from __future__ import annotations

import shutil
from collections.abc import Collection

import torch

from tuner.config import VLLM, PolicyConfig
from tuner.errors import UserError
from tuner.models.adapters import adapter_settings, is_adapted
from tuner.models.load import Loaded
from tuner.models.roles import Roles
from tuner.models.rope import check_served_length
from tuner.models.served import is_servable, refuse_unservable
from tuner.rollout.engine import Engine, LocalEngine
from tuner.rollout.reference_answers import ReferenceAnswers
from tuner.rollout.stored_answers import StoredAnswers
from tuner.rollout.vllm_base import served_base
from tuner.rollout.vllm_engine import VLLMEngine
from tuner.rollout.vllm_server import ServerSettings, VLLMServer, find_python, max_rank, usable_port
from tuner.rollout.vllm_serving import Serving
from tuner.stages.context import Context
from tuner.training.checkpoint_names import checkpoints_in, step_of
from tuner.training.devices import Devices
from tuner.training.run_folder import RunFolder


def load_engine(config: PolicyConfig, context: Context, roles: Roles, ends: Collection[int]) -> Engine:
    """The engine; a server is only started with the first answers. Raises UserError as `refuse_engine` does."""
    devices, run, sampling = context.devices, context.run, config.sampling
    if not isinstance(config.engine, VLLM):
        return LocalEngine(roles, ends, sampling, config.seed, config.tokens_per_pass, devices)
    refuse_engine(config, roles.loaded)
    server = None
    if config.engine.url is None and devices.is_main:
        settings = _settings(config, config.engine, roles.loaded, devices)
        server = VLLMServer(settings, run.folder / "vllm.log")
    serving = Serving(
        config.engine,
        roles.loaded,
        run.folder / "served_policy",
        server=server,
        base=lambda: served_base(config.policy, run.folder / "served_base", config.precision),
        say=context.say,
    )
    stored = StoredAnswers(run.answers_folder)
    return VLLMEngine(
        serving,
        stored,
        roles,
        ends,
        sampling,
        config.seed,
        devices,
        oldest_step=lambda: _oldest_step(run),
        discard=lambda: _discard_base(run),
    )


def reference_answers(
    config: PolicyConfig, roles: Roles, ends: Collection[int], devices: Devices
) -> ReferenceAnswers | None:
    """The reference's answers that a config's rewards compare with; None where they compare with none.

    roles: has the role `reference` where they do.
    """
    if config.preference_reward is None:
        return None
    # of another seed than the policy's: in the first step both are one model, and would give the same answers
    seed = config.seed + 1
    engine = LocalEngine(
        roles, ends, config.sampling, seed, config.tokens_per_pass, devices, role="reference"
    )
    answers = config.preference_reward.answers
    return ReferenceAnswers(engine, answers, config.missing_end_penalty, config.length_penalty)


def refuse_engine(config: PolicyConfig, policy: Loaded) -> None:
    """Raise UserError where the config's engine cannot serve the policy, or its environment is missing."""
    engine = config.engine
    if not isinstance(engine, VLLM):
        return
    check_served_length(policy.transformer.config, config.prompts.max_length + config.sampling.max_new_tokens)
    if engine.url is None:
        find_python(engine.python)
    if is_adapted(policy.model):
        settings = adapter_settings(policy.model)
        refuse_unservable(settings, config.policy.path)
        max_rank(settings.r)
    elif config.parallel.shard > 1:
        raise UserError(
            "engine=VLLM(): the main process gives a server a policy that has no adapter, and in shards does not have "
            "all of it: write engine=local, add adapter=LoRA(), or leave parallel.shard out"
        )
    elif engine.url is not None:
        raise UserError(
            f"engine.url={engine.url!r}: a policy without an adapter reaches a server by a restart after each update, "
            "so it must be the run's own: leave url out, or add adapter=LoRA()"
        )


def engine_notes(config: PolicyConfig, policy: Loaded) -> list[str]:
    """What the config's engine needs, in sentences."""
    engine = config.engine
    if not isinstance(engine, VLLM):
        return []
    rank = max_rank(adapter_settings(policy.model).r) if is_adapted(policy.model) else None
    how = (
        f"by adapters of rank {rank} or less, loaded after each update"
        if rank
        else "by a folder of its whole weights and a restart of the server after each update"
    )
    notes = [
        f"engine: the policy reaches vLLM {how}; rollouts are stored in the run's folder before they are used"
    ]
    if engine.url is not None:
        quantization = policy.base.quantization
        options = f" --quantization {quantization}" if quantization else ""
        notes.append(
            f"engine: {engine.url} must serve the policy's base: tuner serve-rollouts {config.policy.path} "
            f"--max-lora-rank {rank} --precision {config.precision} "
            f"--temperature {config.sampling.temperature:g}{options}"
        )
    elif not is_servable(config.policy) and rank:
        notes.append(
            "engine: the run first writes its base, dequantized and in Llama's layout, to served_base/"
        )
    return notes


def _settings(config: PolicyConfig, engine: VLLM, policy: Loaded, devices: Devices) -> ServerSettings:
    return ServerSettings(
        python=find_python(engine.python),
        precision=config.precision,
        max_rank=max_rank(adapter_settings(policy.model).r) if is_adapted(policy.model) else None,
        processed_logprobs=config.sampling.temperature != 1,
        max_length=config.prompts.max_length + config.sampling.max_new_tokens,
        on_gpu=torch.cuda.is_available(),
        port=usable_port(),
        arguments=engine.arguments,
        shares_gpu=devices.device.type == "cuda",
    )


def _discard_base(run: RunFolder) -> None:
    """Remove the copy of the base from a run that has finished: it is as large as the model."""
    if run.is_finished:
        shutil.rmtree(run.folder / "served_base", ignore_errors=True)


def _oldest_step(run: RunFolder) -> int:
    """The first step that the run would take again from the oldest of its checkpoints."""
    return min(map(step_of, checkpoints_in(run.checkpoints_folder)), default=0)
