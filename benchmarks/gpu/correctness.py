"""Whether results are right on this card: each case compares what must be equal, and says by how much it is not."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.case import Measurement, NotHereError, Place
from benchmarks.gpu.shapes import model_folder
from benchmarks.gpu.small_runs import (
    SMALL_PPO,
    SMALL_SFT,
    TINY,
    largest_difference,
    starts,
    train,
)
from tuner.config import LoRA, Model, override
from tuner.config.training import KernelName
from tuner.data.batch import Batch, make_batch
from tuner.models.arithmetic import autocast
from tuner.models.forward import scores, token_logprobs, token_loss, values
from tuner.models.generate import generate
from tuner.models.kernels import compiled
from tuner.models.kernels.proof import Proof, bound
from tuner.models.kernels.registry import KERNELS
from tuner.models.load import Loaded, load_model
from tuner.models.load_roles import load_policy_roles
from tuner.models.probe import prove_isolation
from tuner.models.quantization import dequantize
from tuner.models.roles import Roles
from tuner.stages.rl.models import policy_models
from tuner.training.step import Step

KINDS: tuple[tuple[Literal["bf16", "fp32"], Literal["nf4", "int8"] | None], ...] = (
    ("fp32", None),
    ("bf16", None),
    ("bf16", "nf4"),
    ("bf16", "int8"),
)

LARGE_KINDS = KINDS[1:3]


def isolation(shape: str | None, place: Place) -> Iterator[Measurement]:
    """Packed samples' hidden states against those of samples alone, by the probe that every run starts with.

    shape: of a random model; None: the embedded model, in more precisions.
    """
    for precision, quantization in KINDS if shape is None else LARGE_KINDS:
        model = Model(path=_path(shape, place), quantization=quantization)
        loaded = load_model(model, precision=precision, device=place.device)
        error = prove_isolation(loaded, place.device, autocast(place.device, precision))
        yield Measurement("error", error, "", setting=f"{precision}, {quantization or 'not quantized'}")


def kernel(name: KernelName, place: Place) -> Iterator[Measurement]:
    """Hidden states and gradients of the embedded model with a kernel, by the proof of every run: the largest error as
    a share of its bound. In a dry run compiled layers are traced, and no code is made of them."""
    if (reason := KERNELS[name].unavailable(place.device)) is not None:
        raise NotHereError(f"{name} {reason}")
    if place.is_dry:
        compiled.BACKEND = "aot_eager"
    for precision, quantization in KINDS[:1] if place.is_dry else KINDS[:3]:
        model = Model(path=TINY, quantization=quantization)
        loaded = load_model(model, precision=precision, device=place.device, adapter=LoRA(r=8))
        proof = Proof(loaded, partial(autocast, place.device, precision))
        KERNELS[name].install(loaded.model)
        share = max(error / bound(plain) for error, plain in proof.errors().values())
        yield Measurement("share", share, "", setting=f"{precision}, {quantization or 'not quantized'}")


def nf4(shape: str | None, place: Place) -> Iterator[Measurement]:
    """Loss and adapter gradients of QLoRA against the same adapter on the de-quantized base, in the same precision.

    `rounding` is what bf16 itself does to the gradients, which depends on the model: against fp32.
    """
    path = _path(shape, place)
    exact: list[Tensor] = []
    for precision in ("fp32", "bf16"):
        loaded = load_model(
            Model(path=path, quantization="nf4"), precision=precision, device=place.device, adapter=LoRA(r=8)
        )
        _make_adapters_count(loaded)
        batch = _random_batch(place, (7, 120, place.size(385, 20)))
        loss, gradients = _loss_and_gradients(loaded, batch, precision)
        dequantize(loaded.transformer)
        expected, expected_gradients = _loss_and_gradients(loaded, batch, precision)
        exact = exact or expected_gradients
        yield Measurement(f"loss_{precision}", abs(loss - expected) / abs(expected), "")
        yield Measurement(f"gradient_{precision}", _relative_error(gradients, expected_gradients), "")
    yield Measurement("rounding", _relative_error(gradients, exact), "")


def ppo_roles(layout: str, place: Place) -> Iterator[Measurement]:
    """A first step has the ratio 1 and no KL divergence; and each role computes what it does on a CPU in fp32."""
    config = override(SMALL_PPO, starts(place) | {"roles": layout})
    first = train(config, place, layout).metrics[0]
    yield Measurement("ratio", abs(first["ratio"] - 1), "", setting="mean ratio of the first step, less 1")
    yield Measurement("kl", abs(first["kl"]), "nats/token", setting="of the first step")
    models, cpu = policy_models(config, ("reference", "critic")), torch.device("cpu")
    on_device = load_policy_roles(models, place.device, lambda: autocast(place.device, "bf16")).roles
    on_cpu = load_policy_roles(models, cpu, lambda: autocast(cpu, "fp32")).roles
    for loaded in on_cpu.models:
        loaded.model.float()
    batch = _random_batch(place, (30, 12, 40))
    for role in ("policy", "reference", "critic", "reward"):
        exact = _of_role(on_cpu, role, batch.to(cpu))
        computed = _of_role(on_device, role, batch.to(place.device)).cpu()
        error = (computed - exact).norm() / exact.norm().clamp(min=1e-6)  # a fresh critic is 0 everywhere
        yield Measurement("role_error", float(error), "", setting=role)


def _of_role(roles: Roles, role: str, batch: Batch) -> Tensor:
    with roles.role(role) as model:
        if role == "reward":
            return scores(model, batch).float()
        return values(model, batch) if role == "critic" else token_logprobs(model, batch)[0]


def generate_then_train(
    shape: str | None, quantization: Literal["nf4"] | None, place: Place
) -> Iterator[Measurement]:
    """Gradients before and after generation are the same, and generation's log-probabilities are those of training."""
    loaded = load_model(
        Model(path=_path(shape, place), quantization=quantization),
        precision="bf16",
        device=place.device,
        adapter=LoRA(r=8),
    )
    _make_adapters_count(loaded)
    batch = _random_batch(place, (7, 12, 40))
    _, before = _loss_and_gradients(loaded, batch, "bf16")
    prompts = [row.tolist() for row in batch.tokens_T.cpu().split([7, 12, 40])]
    with autocast(place.device, "bf16"):
        answers = generate(loaded.model, prompts, max_new_tokens=24, end_ids=())
    _, after = _loss_and_gradients(loaded, batch, "bf16")
    yield Measurement("gradient_error", _relative_error(after, before), "")
    rows = [
        (
            np.concatenate([prompt, answer.tokens]).astype(np.int32),
            np.repeat([0.0, 1.0], [len(prompt), len(answer.tokens)]).astype(np.float32),
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    packed = make_batch(rows).to(place.device)
    with torch.no_grad(), autocast(place.device, "bf16"):
        logprobs = token_logprobs(loaded.model, packed)[0].cpu()
    generated = torch.from_numpy(np.concatenate([answer.logprobs for answer in answers]))
    yield Measurement("logprob_error", float((logprobs - generated).abs().mean()), "nats/token")


def resume(changes: dict[str, Any], place: Place) -> Iterator[Measurement]:
    """A run that is killed after a checkpoint and goes on, against the run that was not."""
    changes = {"deterministic": True, "checkpoint.every": 2, **changes}
    whole = train(SMALL_SFT, place, "whole", changes)
    finish = Step.finish

    def killed(self: Step) -> None:
        if self.index == 3:
            raise KilledError
        finish(self)

    Step.finish = killed
    try:
        train(SMALL_SFT, place, "killed", changes)
    except KilledError:
        pass
    else:
        raise AssertionError("the run was not killed")
    finally:
        Step.finish = finish
    resumed = train(SMALL_SFT, place, "killed", changes)
    yield Measurement("largest_difference", largest_difference(whole, resumed), "")


class KilledError(BaseException):
    """Stands for a kill: nothing is cleaned up."""


def deterministic(stage: Literal["sft", "ppo"], place: Place) -> Iterator[Measurement]:
    """Two runs of one config, with `deterministic=True`."""
    config, changes = (SMALL_SFT, {"adapter.dropout": 0.1}) if stage == "sft" else (SMALL_PPO, starts(place))
    runs = [train(config, place, folder, {"deterministic": True, **changes}) for folder in ("one", "two")]
    yield Measurement("largest_difference", largest_difference(*runs), "")
    losses = [[record["loss"] for record in run.metrics] for run in runs]
    yield Measurement("different_losses", float(sum(a != b for a, b in zip(*losses, strict=True))), "steps")


def _path(shape: str | None, place: Place) -> str:
    return TINY if shape is None else str(model_folder(shape, place))


def _make_adapters_count(loaded: Loaded) -> None:
    """Draw the adapters' second matrices, which start at zero: the first would have no gradients."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in loaded.model.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=generator).mul(0.02).to(weight.device)


def _random_batch(place: Place, lengths: tuple[int, ...]) -> Batch:
    generator = np.random.default_rng(0)
    samples = [generator.integers(10, 1_000, length).astype(np.int32) for length in lengths]
    return make_batch([(tokens, np.ones(len(tokens), np.float32)) for tokens in samples]).to(place.device)


def _loss_and_gradients(
    loaded: Loaded, batch: Batch, precision: Literal["bf16", "fp32"]
) -> tuple[float, list[Tensor]]:
    """Mean loss in nats, and the gradients of all trained weights."""
    trained = [weight for weight in loaded.model.parameters() if weight.requires_grad]
    loaded.model.train()
    with autocast(batch.tokens_T.device, precision):
        loss = token_loss(loaded.model, batch) / len(batch.learned_N)
        gradients = torch.autograd.grad(loss, trained)
    loaded.model.eval()
    return float(loss.detach()), [gradient.float() for gradient in gradients]


def _relative_error(gradients: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference of all gradients together, relative to theirs."""
    squares = [
        (float((gradient - exact).square().sum()), float(exact.square().sum()))
        for gradient, exact in zip(gradients, expected, strict=True)
    ]
    different, whole = (sum(part) for part in zip(*squares, strict=True))
    return (different / whole) ** 0.5
