"""The steps that plan_memory.py counts: of each stage, what it holds and a function that takes a step's passes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from memory_cases import Case
from torch import nn

from tuner.config import FocalRanking, Model
from tuner.data.batch import Batch, Pairs, make_batch
from tuner.models.arithmetic import autocast
from tuner.models.checkpointing import recompute_activations
from tuner.models.forward import scores, token_logprobs, token_loss, values
from tuner.models.generate import generate
from tuner.models.load import Loaded, load_model
from tuner.models.load_roles import PolicyModels, load_policy_roles
from tuner.models.pair_sums import pair_sums
from tuner.models.roles import Roles
from tuner.models.sampling import uniforms
from tuner.models.tiled_mlp import tile_mlps

SEGMENTS = 4
"""Samples of a row."""
CPU = torch.device("cpu")


def load(case: Case, model: Model, device: torch.device) -> Loaded:
    """The model of a stage with one role."""
    head = "score" if case.stage == "reward" else "language"
    loaded = load_model(model, precision=case.precision, device=device, adapter=case.adapter, head=head)
    recompute_activations(loaded.model, case.recomputation)
    tile_mlps(loaded.model, case.mlp_tile)
    return loaded


def rows_of(case: Case) -> list[Batch]:
    """Two packed rows of a few segments, all tokens with a loss; for a reward model pairs of segments."""
    generator, length = np.random.default_rng(0), case.tokens // SEGMENTS
    batches = []
    for _ in range(2):
        weights = np.ones(length, np.float32)
        if case.stage == "reward":
            weights[:-1] = 0
        samples = [(generator.integers(0, 1_000, length).astype(np.int32), weights) for _ in range(SEGMENTS)]
        batch = make_batch(samples)
        if case.stage == "reward":
            first = torch.arange(0, SEGMENTS, 2)
            ones = torch.ones(len(first))
            batch = Batch(**{**vars(batch), "pairs": Pairs(first, first + 1, ones, 0 * ones)})
        batches.append(batch)
    return batches


def single_step(case: Case, model: Model, device: torch.device) -> Any:
    """SFT and reward models: passes within one role, as their loops make them."""
    loaded = load(case, model, device)
    roles = Roles.of("policy", loaded, lambda: autocast(CPU, case.precision))
    batches = rows_of(case)

    def loss(opened: nn.Module, batch: Batch) -> torch.Tensor:
        if case.stage == "reward":
            sums = pair_sums(scores(opened, batch), batch, FocalRanking())
            return sums.ranking + sums.penalty
        return token_loss(opened, batch)

    def step() -> None:
        with roles.role("policy", train=True) as opened:
            for batch in batches:
                loss(opened, batch).backward()

    return step, [loaded.model], roles.trained("policy")


def padded_step(case: Case, model: Model, device: torch.device) -> Any:
    """DPO: a padded batch through the head that TRL fuses, and the reference's pass before the backward pass."""
    from trl.trainer.utils import add_fused_lm_head

    loaded = load(case, model, device)
    loaded.transformer.set_attn_implementation("sdpa")
    add_fused_lm_head(loaded.transformer, outputs=("log_probs", "entropy", "mean_logits"))
    roles = Roles.of("policy", loaded, lambda: autocast(CPU, case.precision))
    length = case.tokens // SEGMENTS
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 1_000, (SEGMENTS, length)))
    mask = torch.ones_like(tokens)
    mask[1, length // 2 :] = 0  # or transformers would leave the mask out

    def logprobs(opened: nn.Module) -> torch.Tensor:
        output = opened(
            input_ids=tokens, attention_mask=mask, labels=tokens, use_cache=False, fused_lm_head=True
        )
        return output.log_probs.sum(1)

    def step() -> None:
        for _ in range(2):
            with roles.role("policy", train=True) as opened:
                learned = logprobs(opened)
                with torch.no_grad(), loaded.model.disable_adapter():
                    reference = logprobs(opened)
                loss = -torch.nn.functional.logsigmoid((learned - reference).diff()).sum()
                loss.backward()

    return step, [loaded.model], roles.trained("policy")


def policy_roles(case: Case, model: Model, device: torch.device) -> Roles:
    """Policy, reference and critic on one base."""
    models = PolicyModels(
        policy=model,
        reference=None,
        reward=None,
        adapter=case.adapter,
        critic_adapter=None,
        critic_from="policy",
        layout="shared",
        roles=frozenset({"reference", "critic"}),
        template="internlm2" if case.family.startswith("internlm") else "llama3",
        precision=case.precision,
        seed=0,
        gradient_checkpointing=case.recomputation,
        mlp_tile=case.mlp_tile,
    )
    autocasts = (lambda: autocast(CPU, case.precision)) if device == CPU else nullcontext
    return load_policy_roles(models, device, autocasts).roles


def policy_step(case: Case, model: Model, device: torch.device) -> Any:
    """PPO's passes: each opens its role, and both adapters stand on one base."""
    roles = policy_roles(case, model, device)
    batches = dict.fromkeys(("policy", "critic"), rows_of(case))
    if case.stage == "critic":  # whose passes then decide: the policy's have few tokens
        batches["policy"] = [make_batch([(np.arange(64, dtype=np.int32), np.ones(64, np.float32))])]

    def step() -> None:
        for name in batches:
            for batch in batches[name]:
                with roles.role(name, train=True) as opened:
                    learned = values(opened, batch) if name == "critic" else token_logprobs(opened, batch)[0]
                    learned.square().sum().backward()
                    del learned

    trained = {
        f"{name}.{key}": value for name in ("policy", "critic") for key, value in roles.trained(name).items()
    }
    return step, [roles.loaded.model, *roles.heads], trained


def generation_step(case: Case, model: Model, device: torch.device) -> Any:
    """Answers of equal length, sampled."""
    loaded = load(case, model, device)
    roles = Roles.of("policy", loaded, lambda: autocast(CPU, case.precision))
    prompts = [list(range(200, 200 + case.tokens // 32))] * 64

    def step() -> None:
        with roles.role("policy") as opened:
            generate(
                opened, prompts, max_new_tokens=ANSWER, end_ids=frozenset(), tokens_per_pass=case.tokens,
                cache_bytes=2**40, temperature=1.0, noise=uniforms(0, 0, range(len(prompts)), ANSWER),
            )  # fmt: skip

    return step, [loaded.model], {}


ANSWER = 64
"""Tokens of an answer: a block of the cache, so that it has its full size as prompts are read, as the plan assumes."""

STEPS: dict[str, Callable[[Case, Model, torch.device], Any]] = {
    "sft": single_step, "reward": single_step, "dpo": padded_step, "policy": policy_step, "critic": policy_step,
    "generation": generation_step,
}  # fmt: skip
