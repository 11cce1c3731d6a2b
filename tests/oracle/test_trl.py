"""A loss here is what TRL's users know as the loss: the same rows and weights follow the same trajectory there."""

import pytest
import torch

import tuner
from tests.shallow_models import shallow
from tuner.config import SFT, AdamW, Chat, Constant, Evaluation, LoRA, Model, override
from tuner.models.load import load_model, load_tokenizer
from tuner.stages.data_view import load_rows
from tuner.stages.packed_rows import plan

CPU = torch.device("cpu")
STEPS = 3
ROWS = 48
CONFIG = SFT(
    name="ours",
    model=Model(path=shallow(2)),
    adapter=LoRA(r=8, alpha=16),
    data=Chat(files=("tuner:sums/train.jsonl",), template="internlm2", max_length=64, limit=ROWS),
    optimizer=AdamW(
        lr=3e-3, eps=1e-5
    ),  # the usual 1e-8 makes whole steps of the rounding of gradients near zero
    schedule=Constant(warmup=0),
    max_steps=STEPS,
    epochs=STEPS,
    precision="fp32",
    gradient_checkpointing=False,
    evaluation=Evaluation(samples=0),
)
KINDS = {
    "full": {"adapter": None, "optimizer.lr": 3e-4},
    "lora": {},
    "qlora": {"model.quantization": "nf4"},
}
WAYS = {
    "padded": {"per_device_train_batch_size": ROWS},
    "accumulated": {"per_device_train_batch_size": ROWS // 6, "gradient_accumulation_steps": 6},
    "packed": {"packing": True, "packing_strategy": "bfd", "per_device_train_batch_size": ROWS},
}
"""How TRL is to hold the one batch of everything. Packed, all of it is one row of its own best-fit packs."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_trajectory(kind, way, tmp_path):
    config = every_row_in_every_step(override(CONFIG, KINDS[kind]))
    ours = tuner.train(config, runs=tmp_path)
    losses, norms, weights = train_with_trl(config, WAYS[way], tmp_path)
    assert [record["step"] for record in ours.metrics] == [1, 2, 3]
    assert [record["loss"] for record in ours.metrics] == pytest.approx(losses, rel=1e-4)
    assert [record["grad_norm"] for record in ours.metrics] == pytest.approx(norms, rel=1e-3)
    assert losses[2] < losses[0] - 0.02  # it did learn: weights that never move agree too
    assert_same_weights(config, ours, weights)


def every_row_in_every_step(config):
    """The config with steps of exactly all its rows, so that no order can matter."""
    data = load_rows(config)
    tokens = int(data.train.lengths.sum())
    config = override(config, {"tokens_per_step": tokens, "tokens_per_pass": min(tokens, 512)})
    stream = plan(config, data)
    assert [sorted(step.samples) for step in stream.steps] == [list(range(ROWS))] * STEPS
    return config


def train_with_trl(config, way, folder):
    """(losses, gradient norms, trained weights by name) of TRL's SFTTrainer from the weights ours begins with."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Recording(SFTTrainer):
        """Keeps the loss of each optimiser step unrounded: TRL divides every pass by the step's tokens."""

        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            step = self.state.global_step
            recorded[step] = recorded.get(step, 0.0) + loss.item()
            return loss

    recorded = {}
    loaded = load_model(config.model, precision="fp32", device=CPU, adapter=config.adapter, seed=config.seed)
    loaded.transformer.set_attn_implementation("sdpa")
    data, tokenizer = load_rows(config), load_tokenizer(config.model)
    samples = [data.train.example(index) for index in range(ROWS)]
    rows = {
        "input_ids": [tokens.tolist() for tokens, _ in samples],
        "labels": [
            [token if weight else -100 for token, weight in zip(*map(list, sample), strict=True)]
            for sample in samples
        ],
    }
    settings = SFTConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        max_length=256,
        learning_rate=config.optimizer.lr,
        lr_scheduler_type="constant",
        weight_decay=config.optimizer.weight_decay,
        adam_epsilon=config.optimizer.eps,
        max_grad_norm=config.max_grad_norm,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        **way,
    )
    trained = {name: weight for name, weight in loaded.model.named_parameters() if weight.requires_grad}
    start = {name: weight.detach().clone() for name, weight in trained.items()}
    trainer = Recording(
        model=loaded.model, args=settings, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer
    )
    for (
        name,
        weight,
    ) in trained.items():  # TRL has rounded adapters of a quantised base to bf16; ours are fp32
        weight.data = start[name]
    trainer.train()
    norms = [float(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]
    return [recorded[step] for step in range(STEPS)], norms, trained


def assert_same_weights(config, run, theirs):
    """By the length of what lies between them, tensor by tensor."""
    model = Model(path=str(run.folder))
    trained = load_model(model, precision="fp32", device=CPU, adapter=config.adapter).model
    ours = {name: weight for name, weight in trained.named_parameters() if weight.requires_grad}
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.dist(weight, theirs[name]) <= 5e-3 * weight.norm(), name
