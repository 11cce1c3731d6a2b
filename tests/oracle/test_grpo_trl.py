"""GRPO's and RLOO's losses and advantages: TRL's trainers on padded rows, our functions on one packed row."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch

from tuner.config import Model
from tuner.data.batch import make_batch
from tuner.losses.policy import (
    answer_policy_loss,
    group_advantages,
    kl_estimate,
    leave_one_out,
    policy_loss,
)
from tuner.models.forward import token_logprobs
from tuner.models.load import load_model
from tuner.models.tiny import tiny_model_folder

CPU = torch.device("cpu")
PROMPTS, ANSWERS = (3, 7, 1, 5), (6, 1, 9, 4)
"""Tokens of each."""
BORDERS = [0, *itertools.accumulate(ANSWERS)]
ADVANTAGES = torch.tensor([1.5, -0.7, 0.4, -2.0])
CLIP, CLIP_HIGH, KL = 0.1, 0.3, 0.2
SCORES = [0.5, 2.0, -1.0, 3.5, 1.0, 1.0, 1.0, 1.0]
GROUP = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random Llama whose log-probabilities differ from token to token."""
    folder = tiny_model_folder("meta-llama/Llama-3.2-1B", tmp_path_factory.mktemp("model"))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.lm_head.weight.data *= 10
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randint(16, 1000, (prompt,), generator=generator),
            torch.randint(16, 1000, (answer,), generator=generator),
        )
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    ]


@pytest.fixture(scope="module")
def ours(folder):
    return load_model(Model(path=str(folder)), precision="fp32", device=CPU).model


@pytest.fixture(scope="module")
def recorded(ours, rows):
    """Log-probabilities of an earlier policy and of a reference: some ratios lie past either bound of the clip."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        logprobs_N, _ = token_logprobs(ours, packed(rows))
    old_N, reference_N = (
        logprobs_N + scale * torch.randn(len(logprobs_N), generator=generator) for scale in (0.3, 0.5)
    )
    ratio_N = (logprobs_N - old_N).exp()
    assert (ratio_N < 1 - CLIP).any()
    assert (ratio_N > 1 + CLIP_HIGH).any()
    assert ((ratio_N > 1 + CLIP) & (ratio_N < 1 + CLIP_HIGH)).any()
    return old_N, reference_N


def packed(rows):
    return make_batch(
        [
            (
                torch.cat(row).numpy().astype(np.int32),
                np.array([0.0] * len(row[0]) + [1.0] * len(row[1]), np.float32),
            )
            for row in rows
        ]
    )


def padded(rows, old_N, reference_N):
    """What a TRL trainer hands to its loss: prompts padded on the left, answers on the right."""
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    prompts, answers = zip(*rows, strict=True)
    ones = ([torch.ones_like(row) for row in rows] for rows in (prompts, answers))
    prompt_mask, completion_mask = pad(next(ones), padding_side="left"), pad(next(ones))
    old = pad(old_N.split(ANSWERS))
    return {
        "prompt_ids": pad(prompts, padding_side="left"),
        "prompt_mask": prompt_mask,
        "completion_ids": pad(answers),
        "completion_mask": completion_mask,
        "advantages": ADVANTAGES,
        "old_per_token_logps": old,
        "old_logps": old.sum(1),
        "ref_per_token_logps": pad(reference_N.split(ANSWERS)),
        "num_items_in_batch": completion_mask.sum(),
    }


def trl_trainer(kind, folder, output, **settings):
    """A GRPOTrainer or RLOOTrainer on the model, that scores answers with SCORES."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = getattr(trl, f"{kind}Config")(
        output_dir=str(output),
        per_device_train_batch_size=len(SCORES),
        num_generations=GROUP,
        max_completion_length=4,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        **settings,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = getattr(trl, f"{kind}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=lambda completions, **fields: SCORES,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["Say one.", "Say two."]}),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1  # what the training loop sets
    return trainer


def trl_loss(trainer, inputs):
    """Loss, and gradients by name."""
    model = trainer.model.train()
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in model.named_parameters()}


def assert_same(model, loss, theirs):
    value, gradients = theirs
    assert loss.item() == pytest.approx(value, rel=1e-5)
    names, weights = zip(*model.named_parameters(), strict=True)
    assert set(names) == set(gradients)
    for name, own in zip(names, torch.autograd.grad(loss, weights), strict=True):
        assert torch.dist(own, gradients[name]) <= 1e-4 * gradients[name].norm(), name


@pytest.mark.parametrize(("beta", "corrected"), [(0.0, False), (KL, False), (KL, True)])
@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo"])
def test_the_loss_of_grpo(loss_type, beta, corrected, folder, rows, ours, recorded, tmp_path):
    """dapo and bnpo: a mean over all tokens; grpo: a mean over answers of the means over their tokens.

    corrected: the KL penalty is multiplied by the ratio (arXiv 2512.02556), TRL's default; the paper of GRPO does not.
    """
    old_N, reference_N = recorded
    trainer = trl_trainer(
        "GRPO",
        folder,
        tmp_path,
        loss_type=loss_type,
        epsilon=CLIP,
        epsilon_high=CLIP_HIGH,
        beta=beta,
        use_bias_correction_kl=corrected,
    )
    theirs = trl_loss(trainer, padded(rows, old_N, reference_N))
    lengths_A = torch.tensor(ANSWERS)
    weights_N = (1 / lengths_A).repeat_interleave(lengths_A) if loss_type == "grpo" else None
    count = len(ANSWERS) if loss_type == "grpo" else sum(ANSWERS)
    logprobs_N, _ = token_logprobs(ours, packed(rows))
    advantages_N = ADVANTAGES.repeat_interleave(lengths_A)
    surrogate = policy_loss(logprobs_N, old_N, advantages_N, CLIP, CLIP_HIGH, weights_N).loss
    kl_N = kl_estimate(logprobs_N, reference_N, "k3")
    if corrected:
        kl_N = kl_N * (logprobs_N - old_N).exp()
    penalty = (kl_N if weights_N is None else kl_N * weights_N).sum()
    assert_same(ours, (surrogate + beta * penalty) / count, theirs)


def test_the_loss_of_rloo(folder, rows, ours, recorded, tmp_path):
    old_N, reference_N = recorded
    trainer = trl_trainer("RLOO", folder, tmp_path, epsilon=CLIP, epsilon_high=CLIP, beta=0.0)
    theirs = trl_loss(trainer, padded(rows, old_N, reference_N))
    logprobs_N, _ = token_logprobs(ours, packed(rows))
    sums = answer_policy_loss(logprobs_N, old_N, ADVANTAGES, BORDERS, CLIP)
    assert 0 < sums.clipped < len(ANSWERS)
    assert_same(ours, sums.loss / len(ANSWERS), theirs)


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("GRPO", {"scale_rewards": "group"}, partial(group_advantages, scale=True)),
        ("GRPO", {"scale_rewards": "none"}, partial(group_advantages, scale=False)),
        ("RLOO", {}, leave_one_out),
    ],
    ids=["grpo", "grpo-unscaled", "rloo"],
)
def test_advantages(kind, settings, expected, folder, tmp_path):
    """Of eight answers, four to each of two prompts; the second group's scores do not differ."""
    trainer = trl_trainer(kind, folder, tmp_path, beta=0.0, **settings)
    prompts = [{"prompt": prompt} for prompt in ("Say one.", "Say two.") for _ in range(GROUP)]
    theirs = trainer._generate_and_score_completions(prompts)["advantages"]
    own = expected(np.array(SCORES), GROUP)
    np.testing.assert_allclose(own, theirs.numpy(), rtol=1e-5, atol=1e-6)
    assert np.abs(own[:GROUP]).min() > 0.1
