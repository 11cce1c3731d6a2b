"""Every case, in the order in which they run: correctness first, then what each later case is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from benchmarks.gpu import attention, correctness, matrix_peak, peers, two_processes
from benchmarks.gpu.case import Bound, Case, at_least, at_most
from benchmarks.gpu.policy import Generation, Policy, measure_generation, measure_ppo, ratio
from benchmarks.gpu.training import MATRIX_PEAK, Training, measure_training
from tuner.models.kernels.registry import KERNELS

PEAK = MATRIX_PEAK[0]

_ATTENTION = {
    "packed_forward": at_most(5e-3),
    "packed_backward": at_most(1e-2),
    "rounding_forward": at_most(1e-2),
    "rounding_backward": at_most(2e-2),
}
"""bf16's spacing is 2⁻⁸ = 4e-3; sums over keys and queries are in fp32 and their terms rounded."""
_NF4 = {
    "loss_fp32": at_most(1e-4),
    "gradient_fp32": at_most(1e-3),
    "loss_bf16": at_most(1e-2),
    "gradient_bf16": at_most(5e-2),
}
_EXACT = {"largest_difference": at_most(0)}


def _attention() -> list[Case]:
    """Attention by every backend."""
    return [
        Case(
            f"right.attention_{backend}",
            f"Attention by {backend}: packed against alone, bf16 against fp32, forward and backward",
            partial(attention.measure, backend),
            10,
            _ATTENTION,
        )
        for backend in attention.BACKENDS
    ]


def _kernels() -> list[Case]:
    """What takes the place of a model's modules, by the proof of every run."""
    return [
        Case(
            f"right.kernel_{name}",
            f'The embedded model with kernels=("{name}",), as a share of the bound of the proof',
            partial(correctness.kernel, name),
            60,
            {"share": at_most(1)},
        )
        for name in KERNELS
    ]


def _models() -> list[Case]:
    """What a model computes: the embedded one, and a random one of InternLM2-7B's shape."""
    isolation, generation = (
        {"error": at_most(0.1)},
        {"gradient_error": at_most(1e-2), "logprob_error": at_most(5e-2)},
    )
    rows = [
        (
            "isolation",
            "Packed samples against samples alone in every precision, by the probe of every run",
            (correctness.isolation,),
            isolation,
        ),
        ("nf4", "NF4 QLoRA against an adapter on its de-quantized base", (correctness.nf4,), _NF4),
        (
            "generate_nf4",
            "Gradients before and after generation, and its log-probabilities in training, on an NF4 base",
            (correctness.generate_then_train, "nf4"),
            generation,
        ),
        (
            "generate_bf16",
            "The same on a base in bf16",
            (correctness.generate_then_train, None),
            generation,
        ),
    ]
    cases = []
    for name, what, (measure, *settings), bounds in rows:
        small = Case(
            f"right.{name}", f"{what}: embedded model", partial(measure, None, *settings), 15, bounds
        )
        large = replace(
            small,
            name=f"right.{name}_7b",
            what=f"{what}: InternLM2-7B's shape",
            measure=partial(measure, "internlm2_7b", *settings),
            seconds=60,
            shapes=("internlm2_7b",),
        )
        cases += [small, large]
    return cases


def _runs() -> list[Case]:
    """What runs of the embedded model do: roles, resumes, repetitions, processes."""
    # bitsandbytes holds in 8 bit what has 4,096 numbers, and pages what has 100,000: of adapters this small, hardly any
    whole = {"adapter": None, "optimizer.lr": 1e-3, "optimizer.bits": 8}
    optimizers = {"32": {"adapter.dropout": 0.1}, "8": whole, "8_paged": {**whole, "optimizer.paged": True}}
    roles = {"ratio": at_most(0.02), "kl": at_most(0.02), "role_error": at_most(5e-2)}
    cases = [
        *(
            (
                f"ppo_{layout}",
                f"Every role of PPO, {layout}: against a CPU in fp32, and the identities of a first step",
                partial(correctness.ppo_roles, layout),
                roles,
            )
            for layout in ("shared", "separate")
        ),
        *(
            (
                f"resume_{name}",
                f"A killed run that goes on, optimizer.bits and paging: {name.replace('_', ', ')}",
                partial(correctness.resume, changes),
                _EXACT,
            )
            for name, changes in optimizers.items()
        ),
        *(
            (
                f"deterministic_{stage}",
                f"Two runs of {stage} with deterministic=True, bit for bit",
                partial(correctness.deterministic, stage),
                {**_EXACT, "different_losses": at_most(0)},
            )
            for stage in ("sft", "ppo")
        ),
        *(
            (
                f"two_processes_{layout}",
                f"Two processes on one card by gloo against one process ({layout})",
                partial(two_processes.measure, layout),
                {"loss_difference": at_most(1e-4)},
            )
            for layout in two_processes.LAYOUTS
        ),
    ]
    return [Case(f"right.{name}", what, measure, 30, bounds) for name, what, measure, bounds in cases]


def _trained(
    name: str, what: str, training: Training, seconds: int, bounds: Mapping[str, Bound] | None = None
) -> Case:
    """A measured run, whose speed is relative to the matrix peak of the same call."""
    return Case(
        name,
        what,
        partial(measure_training, training),
        seconds,
        bounds or {},
        shapes=(training.shape,),
        needs=("bitsandbytes",) if training.quantization or training.bits == 8 else (),
        beside=(PEAK,),
    )


def _memory() -> list[Case]:
    """Peaks, each beside what `tuner check --memory` predicts."""
    qlora = Training(
        "internlm2_7b", 2048, quantization="nf4", dropout=0.1, checkpointing=True, bits=8, paged=True
    )
    long = replace(qlora, checkpointing="offload", mlp_tile=2048, steps=3)
    rows = [
        ("nf4_7b_2k", "QLoRA of InternLM2-7B as configs/internlm2_7b_qlora, 2k a pass", qlora, 7.0),
        ("nf4_7b_8k", "The same with one sample of 8k a pass", replace(qlora, sample=8192), 8.5),
        (
            "nf4_7b_32k",
            "The same with one sample of 32k a pass",
            replace(qlora, sample=32_768, steps=4),
            14.0,
        ),
        (
            "nf4_7b_8k_selective",
            "The same with 8k, products kept",
            replace(qlora, sample=8192, checkpointing="selective"),
            None,
        ),
        (
            "nf4_7b_256k",
            "One sample of 256k a pass, inputs on the host, MLPs in tiles",
            replace(long, sample=262_144),
            74.0,
        ),
        ("nf4_7b_512k", "The same with 512k", replace(long, sample=524_288), 131.0),
        ("nf4_20b_2k", "QLoRA of InternLM2-20B, 2k a pass", replace(qlora, shape="internlm2_20b"), 16.0),
        ("int8_7b_2k", "LoRA on InternLM2-7B in 8 bit, 2k a pass", replace(qlora, quantization="int8"), None),
        ("lora_7b_2k", "LoRA on InternLM2-7B in bf16, 2k a pass", replace(qlora, quantization=None), None),
        (
            "full_1_8b_2k",
            "All weights of InternLM2-1.8B, 2k a pass",
            Training("internlm2_1_8b", 2048, r=None, checkpointing=True),
            None,
        ),
    ]
    return [
        _trained(
            f"memory.{name}",
            what,
            training,
            _seconds(training),
            {} if limit is None else {"peak": at_most(limit)},
        )
        for name, what, training, limit in rows
    ]


def _seconds(training: Training) -> int:
    """An estimate: a checkpoint of all weights has their moments, too; attention's work grows with the row's square."""
    if training.r is None:
        return 150
    return 60 + (training.steps * training.sample // 10_000 if training.sample > 100_000 else 0)


def _speed() -> list[Case]:
    """Shares of the matrix peak, by the necessary operations alone."""
    nf4 = Training("internlm2_7b", 4096, quantization="nf4")
    lora = Training("llama3_8b", 4096, samples=2, r=16)
    recomputed, selective = (replace(nf4, checkpointing=way) for way in (True, "selective"))
    rows = [
        ("lora_llama3_8b", "LoRA on Llama-3-8B in bf16, batch 2 × 4,096", lora, 0.65),
        ("lora_qwen2_5_7b", "The same on Qwen2.5-7B", replace(lora, shape="qwen2_5_7b"), 0.65),
        ("nf4_7b_4k", "QLoRA of InternLM2-7B, one sample of 4k a pass", nf4, 0.60),
        ("nf4_7b_8k", "QLoRA of InternLM2-7B, one sample of 8k a pass", replace(nf4, sample=8192), 0.60),
        ("nf4_7b_4k_recomputed", "4k with full recomputation", recomputed, None),
        ("nf4_7b_8k_recomputed", "8k with full recomputation", replace(recomputed, sample=8192), 0.40),
        ("nf4_7b_4k_selective", "4k, products kept", selective, None),
        ("nf4_7b_8k_selective", "8k, products kept", replace(selective, sample=8192), None),
    ]
    kernels = [
        ("nf4_7b_4k_compile", "The first of them with compiled layers", replace(nf4, kernels=("compile",))),
        ("nf4_7b_4k_liger", "The same with Liger's kernels", replace(nf4, kernels=("liger",))),
        ("nf4_7b_4k_lora", "The same with fused LoRA layers", replace(nf4, kernels=("lora",))),
        ("nf4_7b_4k_liger_lora", "The same with both", replace(nf4, kernels=("liger", "lora"))),
        ("lora_llama3_8b_auto", "LoRA on Llama-3-8B with the kernels proved", replace(lora, kernels="auto")),
    ]
    plain = [
        _trained(
            f"speed.{name}", what, training, 50, {} if limit is None else {"utilization": at_least(limit)}
        )
        for name, what, training, limit in rows
    ]
    # compiling takes minutes, for the proof and for the run
    return plain + [_trained(f"speed.{name}", what, training, 180) for name, what, training in kernels]


def _policy() -> list[Case]:
    """PPO by its parts, and generation."""
    ppo, generation = Policy("internlm2_7b"), Generation("internlm2_7b")
    return [
        Case(
            "policy.ppo_7b",
            "PPO of InternLM2-7B, four roles on one NF4 base and replay, 1,024 + 1,024 tokens, passes of 8k",
            partial(measure_ppo, ppo),
            240,
            {"peak_outside_generation": at_most(14.0)},
            shapes=("internlm2_7b",),
            needs=("bitsandbytes",),
        ),
        Case(
            "policy.generate_7b",
            "64 sampled answers of 512 tokens by InternLM2-7B in bf16",
            partial(measure_generation, generation),
            60,
            {"speed": at_least(5_000)},
            shapes=("internlm2_7b",),
        ),
        Case(
            "policy.generate_7b_nf4",
            "The same on the NF4 base",
            partial(measure_generation, replace(generation, quantization="nf4")),
            90,
            shapes=("internlm2_7b",),
            needs=("bitsandbytes",),
        ),
    ]


def _peers_in_training() -> list[Case]:
    """Others on the same card, beside our own runs of the same call; of a shape that all of them know."""
    qlora, shape = Training("llama3_8b", 4096, samples=2, quantization="nf4"), ("llama3_8b",)
    return [
        _trained("peers.our_qlora", "QLoRA of Llama-3-8B, batch 2 × 4,096", qlora, 50),
        _trained(
            "peers.our_qlora_recomputed",
            "The same with full recomputation",
            replace(qlora, checkpointing=True),
            60,
        ),
        Case(
            "peers.trl_qlora",
            "The same by TRL, peft and bitsandbytes, with Liger's kernels where they are installed",
            partial(peers.trl_qlora, qlora),
            150,
            shapes=shape,
            needs=("trl", "bitsandbytes"),
        ),
        _compared("trl_qlora", "our_qlora", at_least(2.0)),
        Case(
            "peers.unsloth_qlora",
            "The same by Unsloth",
            partial(peers.unsloth_qlora, qlora),
            150,
            shapes=shape,
            first=("unsloth",),
        ),
        _compared("unsloth_qlora", "our_qlora", at_least(1.2)),
    ]


def _peers_in_generation() -> list[Case]:
    generation, shape = Generation("llama3_8b"), ("llama3_8b",)
    return [
        Case(
            "peers.our_generation",
            "64 sampled answers of 512 tokens by Llama-3-8B in bf16",
            partial(measure_generation, generation),
            60,
            shapes=shape,
        ),
        Case(
            "peers.vllm_generation",
            "The same by vLLM",
            partial(peers.vllm_generation, generation),
            150,
            shapes=shape,
            first=("vllm",),
        ),
        _compared("vllm_generation", "our_generation"),
    ]


def _peers_in_pairs() -> list[Case]:
    pairs = peers.Pairs("llama3_1b")
    return [
        Case(
            "peers.our_pairs",
            "A reward model of Llama-3.2-1B, LoRA in bf16, on pairs of answers of different lengths",
            partial(peers.our_pairs, pairs),
            40,
            shapes=(pairs.shape,),
        ),
        Case(
            "peers.trl_pairs",
            "The same by TRL",
            partial(peers.trl_pairs, pairs),
            60,
            shapes=(pairs.shape,),
            needs=("trl",),
        ),
        _compared("trl_pairs", "our_pairs"),
    ]


def _compared(theirs: str, ours: str, bound: Bound | None = None) -> Case:
    """Our speed over a peer's, both of the same call."""
    cases = (f"peers.{ours}", f"peers.{theirs}")
    return Case(
        f"compare.{theirs}",
        f"Our speed over theirs: {ours} / {theirs}",
        partial(ratio, *cases, "speed"),
        0,
        {} if bound is None else {"ratio": bound},
        beside=cases,
    )


_PEAK = Case(PEAK, "bf16 matrix products of random numbers", matrix_peak.measure, 10)
# what takes seconds first
_RIGHT = sorted((*_attention(), *_kernels(), *_models(), *_runs()), key=lambda case: len(case.shapes))
_PEERS = (*_peers_in_training(), *_peers_in_generation(), *_peers_in_pairs())
CASES = {case.name: case for case in (*_RIGHT, _PEAK, *_memory(), *_speed(), *_policy(), *_PEERS)}
"""Name -> case."""
