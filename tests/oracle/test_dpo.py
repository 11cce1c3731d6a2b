"""Our DPO is TRL's: the same rows and weights follow the same trajectory in its DPOTrainer used plainly, on texts."""

from copy import deepcopy

import pytest
import torch

import tuner
from tests.shallow_models import shallow
from tuner.config import DPO, AdamW, Constant, LoRA, Model, Preferences, override
from tuner.data.conversation import Conversation, Turn
from tuner.data.sources import Rows
from tuner.data.template import Template
from tuner.models.load import load_model

STEPS = 5  # of 4 pairs: an epoch of 18 ends with a smaller step
CONFIG = DPO(
    name="ours",
    model=Model(path=shallow(2)),
    adapter=LoRA(r=8, alpha=16),
    data=Preferences(files=("tuner:twins/train.jsonl",), template="internlm2", max_length=256, limit=18),
    optimizer=AdamW(lr=3e-3, eps=1e-5),
    schedule=Constant(warmup=0),
    pairs_per_step=4,
    pairs_per_pass=2,
    precision="fp32",
    gradient_checkpointing=False,
    device="cpu",
)
KINDS = {
    "full": {"adapter": None, "optimizer.lr": 1e-4},
    "lora": {},
    "qlora": {"model.quantization": "nf4", "loss": "ipo"},
    "checkpointing": {"gradient_checkpointing": True, "loss": "robust", "label_smoothing": 0.1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_trajectory(kind, tmp_path):
    config = override(CONFIG, KINDS[kind])
    ours = tuner.train(config, runs=tmp_path)
    theirs, weights = train_with_trl(config, tmp_path / "theirs")
    assert [record["step"] for record in ours.metrics] == list(range(1, STEPS + 1))
    for name, key in (
        ("loss", "loss"),
        ("grad_norm", "grad_norm"),
        ("margin", "rewards/margins"),
        ("accuracy", "rewards/accuracies"),
        ("chosen_reward", "rewards/chosen"),
        ("tokens", "num_tokens"),
    ):
        found, expected = (
            [record[one] for record in records] for one, records in ((name, ours.metrics), (key, theirs))
        )
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5), name
    assert abs(ours.metrics[-1]["margin"]) > 1e-3  # it did learn: weights that never move agree too
    trained = load_model(
        Model(path=str(ours.folder)), precision="fp32", device=torch.device("cpu"), adapter=config.adapter
    )
    named = {name: weight for name, weight in trained.model.named_parameters() if weight.requires_grad}
    assert named.keys() == weights.keys()
    for name, weight in named.items():
        assert torch.dist(weight, weights[name]) <= 5e-3 * weight.norm(), name


def train_with_trl(config, folder):
    """(log of every step, trained weights by name) of TRL's own trainer, optimiser and schedule, on texts."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    loaded = load_model(
        config.model, precision="fp32", device=torch.device("cpu"), adapter=config.adapter, seed=config.seed
    )
    loaded.transformer.set_attn_implementation("sdpa")
    trained = {name: weight for name, weight in loaded.model.named_parameters() if weight.requires_grad}
    start = {name: weight.detach().clone() for name, weight in trained.items()}
    tokenizer = deepcopy(loaded.tokenizer)
    tokenizer.eos_token = "<|im_end|>"  # else TRL appends another end
    settings = DPOConfig(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.pairs_per_pass,
        gradient_accumulation_steps=config.pairs_per_step // config.pairs_per_pass,
        loss_type=config.loss,
        label_smoothing=config.label_smoothing,
        beta=config.beta,
        learning_rate=config.optimizer.lr,
        adam_epsilon=config.optimizer.eps,
        lr_scheduler_type="constant",
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        bf16=False,
        gradient_checkpointing=config.gradient_checkpointing,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
    )
    trainer = DPOTrainer(
        model=loaded.model,
        ref_model=None
        if config.adapter
        else reference(config),  # its own way of loading one fails on InternLM2
        args=settings,
        train_dataset=Dataset.from_list(texts(config)),
        processing_class=tokenizer,
    )
    for (
        name,
        weight,
    ) in trained.items():  # TRL has rounded adapters of a quantised base to bf16; ours are fp32
        weight.data = start[name]
    trainer.train()
    return [entry for entry in trainer.state.log_history if "grad_norm" in entry], trained


def reference(config):
    model = load_model(config.model, precision="fp32", device=torch.device("cpu"), train=False).model
    model.set_attn_implementation("sdpa")
    return model


def texts(config):
    """The rows as TRL's users would write them: without the BOS that the tokenizer adds itself."""
    tokenizer = load_model(config.model, precision="fp32", device=torch.device("cpu"), train=False).tokenizer
    template = Template(config.data.template, tokenizer)
    found = []
    for row in Rows(config.data.sources[0]):
        prompt = template.prompt_text(Conversation((Turn("user", row.values["prompt"]),)))
        answers = {side: row.values[side] + "<|im_end|>" for side in ("chosen", "rejected")}
        found.append({"prompt": prompt.removeprefix(tokenizer.bos_token), **answers})
    return found
