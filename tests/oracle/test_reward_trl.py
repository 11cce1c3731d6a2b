"""A reward model's loss: TRL's where TRL has it (no focus, no barrier), and written out by hand where it has not."""

import json
import math

import pytest
import torch

import tuner
from tests.bounds import rounding
from tests.shallow_models import shallow
from tuner.config import AdamW, Constant, FocalRanking, LoRA, Model, Preferences, RewardModel, override
from tuner.data.stream import make_stream
from tuner.models.forward import scores
from tuner.models.load import load_model
from tuner.models.pair_sums import pair_sums
from tuner.models.save import save_model
from tuner.models.unwrap import unwrapped
from tuner.stages.data_view import load_rows
from tuner.stages.packed_rows import plan

CPU = torch.device("cpu")
STEPS = 3
ROWS = 16
PLAIN = FocalRanking(gamma=0.0, barrier=0.0)
CONFIG = RewardModel(
    name="ours",
    model=Model(path=shallow(2)),
    adapter=LoRA(r=8, alpha=16),
    data=Preferences(files=("tuner:twins/train.jsonl",), template="internlm2", max_length=128),
    loss=PLAIN,
    optimizer=AdamW(lr=2e-3, eps=1e-4, weight_decay=0.01),  # eps: see test_trl.py
    schedule=Constant(warmup=0),
    max_steps=STEPS,
    epochs=STEPS,
    precision="fp32",
    gradient_checkpointing=False,
)
KINDS = {
    "full": {"adapter": None, "optimizer.lr": 3e-4},
    "lora": {},
    "qlora": {"model.quantization": "nf4"},
}
WAYS = {
    "padded": {"per_device_train_batch_size": ROWS},
    "accumulated": {"per_device_train_batch_size": ROWS // 4, "gradient_accumulation_steps": 4},
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A reward model whose head is not zero: from zeros, the first gradient reaches nothing but the head."""
    folder = tmp_path_factory.mktemp("start") / "model"
    loaded = load_model(CONFIG.model, precision="fp32", device=CPU, head="score")
    head = loaded.transformer.score.weight
    head.data = 0.25 * torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
    save_model(loaded, folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs of several lengths, each second one with a margin."""
    file = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for number in range(ROWS):
            answers = f"It is {number}." + " Really." * (number % 5), "No." * (number % 7 + 1)
            row = dict(zip(("chosen", "rejected"), answers[:: 1 if number % 3 else -1], strict=True))
            row |= {"prompt": f"Say {number * 7}."} | ({"margin": number / 10} if number % 2 else {})
            lines.write(json.dumps(row) + "\n")
    return file


@pytest.mark.parametrize(
    ("kind", "way"),
    [("full", "padded"), ("full", "accumulated"), ("lora", "padded"), ("qlora", "accumulated")],
)
def test_the_same_trajectory(kind, way, start, pairs, tmp_path):
    changes = {"model.path": str(start), "data.files": [str(pairs)], **KINDS[kind]}
    config = every_row_in_every_step(override(CONFIG, changes))
    ours = tuner.train(config, runs=tmp_path)
    losses, norms, accuracies, weights = train_with_trl(config, WAYS[way], tmp_path)
    assert [record["loss"] for record in ours.metrics] == pytest.approx(losses, rel=1e-4)
    assert ours.metrics[0]["grad_norm"] == pytest.approx(norms[0], rel=1e-4)
    assert [record["grad_norm"] for record in ours.metrics] == pytest.approx(norms, rel=1e-2)
    assert [record["accuracy"] for record in ours.metrics] == pytest.approx(accuracies)
    assert abs(losses[0] - math.log(2)) > 0.01
    assert losses[2] < losses[0] - 0.02  # it did learn: weights that never move agree too
    assert_same_weights(config, ours, weights)


def every_row_in_every_step(config):
    """The config with steps of exactly all its rows, in several passes."""
    tokens = int(load_rows(config).train.lengths.sum())
    config = override(config, {"tokens_per_step": tokens, "tokens_per_pass": 256})
    stream = plan(config, load_rows(config))
    assert [sorted(step.samples) for step in stream.steps] == [list(range(ROWS))] * STEPS
    assert len(stream.passes(0)) > 3
    return config


def train_with_trl(config, way, folder):
    """(losses, gradient norms, accuracies, trained weights by name) of TRL's RewardTrainer from the same weights."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    class Recording(RewardTrainer):
        """Keeps losses unrounded; the passes of a step are equally many pairs, so theirs is the mean."""

        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            recorded.setdefault(self.state.global_step, []).append(loss.item())
            return loss

    recorded = {}
    loaded = load_model(
        config.model, precision="fp32", device=CPU, adapter=config.adapter, seed=config.seed, head="score"
    )
    loaded.transformer.set_attn_implementation("sdpa")
    data = load_rows(config)
    tokens = [data.train.sequences.example(index)[0].tolist() for index in range(2 * ROWS)]
    rows = {
        "chosen_ids": tokens[0::2],
        "rejected_ids": tokens[1::2],
        "margin": data.train.margins.tolist(),
    }
    settings = RewardConfig(
        output_dir=str(folder),
        max_steps=STEPS,
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
    begin = {name: weight.detach().clone() for name, weight in trained.items()}
    trainer = Recording(
        model=loaded.model,
        args=settings,
        train_dataset=Dataset.from_dict(rows),
        processing_class=loaded.tokenizer,
    )
    for (
        name,
        weight,
    ) in trained.items():  # TRL has rounded those beside a quantised base to bf16; ours are fp32
        weight.data = begin[name]
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    losses = [sum(recorded[step]) / len(recorded[step]) for step in range(STEPS)]
    return losses, [float(step["grad_norm"]) for step in steps], [step["accuracy"] for step in steps], trained


def assert_same_weights(config, run, theirs):
    """By the length of what lies between them, tensor by tensor; the head among them."""
    trained = load_model(
        Model(path=str(run.folder)), precision="fp32", device=CPU, adapter=config.adapter, head="score"
    ).model
    ours = {name: weight for name, weight in trained.named_parameters() if weight.requires_grad}
    assert ours.keys() == theirs.keys()
    assert sum("score" in name for name in ours) == 1
    for name, weight in ours.items():
        assert torch.dist(weight, theirs[name]) <= 5e-3 * weight.norm(), name


# What TRL has not: written out


ROWS_BY_HAND = (
    {
        "prompt": "Say one.",
        "answers": ["One.", "Two of them.", "Three. Or four.", "5"],
        "ranks": [2, 1, 3, 3],
    },
    {"prompt": "Say six.", "answers": ["Six.", "Seven, eight."], "ranks": [1, 2], "margin": 0.8, "weight": 2},
    {"prompt": "Say it.", "answers": ["It is said and done.", "No."], "scores": [0.1, 0]},
    {"prompt": "Say ten.", "answers": ["Eleven.", "Ten.", "Twelve. Twelve."], "scores": [0.5, 2, -1]},
)
PAIRS_BY_HAND = {
    "drop": (
        [(1, 0, 1 / 5), (1, 2, 1 / 5), (1, 3, 1 / 5), (0, 2, 1 / 5), (0, 3, 1 / 5)],
        [(0, 1, 2.0)],
        [(0, 1, 1.0)],
        [(1, 0, 1 / 3), (1, 2, 1 / 3), (0, 2, 1 / 3)],
    ),
    "half": (
        [
            (1, 0, 1 / 6),
            (1, 2, 1 / 6),
            (1, 3, 1 / 6),
            (0, 2, 1 / 6),
            (0, 3, 1 / 6),
            (2, 3, 1 / 12),
            (3, 2, 1 / 12),
        ],
        [(0, 1, 2.0)],
        [(0, 1, 1.0)],
        [(1, 0, 1 / 3), (1, 2, 1 / 3), (0, 2, 1 / 3)],
    ),
}
"""By what becomes of ties: (better, worse, weight) of each row's pairs, by the places of the answers in the row."""
MARGINS, WEIGHTS = (0.0, 0.8, 0.0, 0.0), (1.0, 2.0, 1.0, 1.0)
TEMPLATE = "<s><|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n[UNUSED_TOKEN_130]"


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "lists.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS_BY_HAND))
    return file


def plain_score(model, tokenizer, prompt, answer):
    """Of one answer, by transformers' own sequence classification, alone and unpadded; with its gradient."""
    tokens = tokenizer(TEMPLATE.format(prompt, answer), add_special_tokens=False, return_tensors="pt")
    return model(input_ids=tokens["input_ids"], use_cache=False).logits[0, 0]


def plain_loss(scored, loss, ties):
    """From the scores of each row's answers, in fp64: the issue's formulas, a prompt and an answer counting once."""
    ranking = penalty = 0.0
    for row, scores_of_row in enumerate(scored):
        for better, worse, weight in PAIRS_BY_HAND[ties][row]:
            lead = scores_of_row[better] - scores_of_row[worse] - loss.margin * MARGINS[row]
            chance = 1 / (1 + torch.exp(-lead))
            focus = (1 - 2 * torch.clamp(chance - 0.5, min=0)) ** loss.gamma
            ranking = ranking - weight * focus * torch.log(chance)
        for score in scores_of_row:
            own = -(torch.log(loss.bound + score) + torch.log(loss.bound - score))
            penalty = penalty + WEIGHTS[row] * (own if loss.penalty == "log" else score**2)
    answers = sum(weight * len(of_row) for weight, of_row in zip(WEIGHTS, scored, strict=True))
    return ranking / sum(WEIGHTS) + loss.barrier * penalty / answers


def sizes_of_terms(loss, scores_of_answers, trained):
    """Of each weight, the norms of its gradient's parts by answer, summed: what is rounded."""
    outer = torch.autograd.grad(loss, scores_of_answers, retain_graph=True)
    parts = [
        torch.autograd.grad(score, trained, slope, retain_graph=True)
        for score, slope in zip(scores_of_answers, outer, strict=True)
    ]
    return [sum(part.norm() for part in of_weight) for of_weight in zip(*parts, strict=True)]


@pytest.mark.parametrize(
    ("kind", "loss", "ties"),
    [
        ("full", FocalRanking(), "drop"),
        ("lora", FocalRanking(margin=0.5), "half"),
        ("qlora", FocalRanking(gamma=1.0, penalty="square", barrier=0.1), "drop"),
        ("lora", PLAIN, "drop"),
    ],
    ids=["full", "lora-ties", "qlora-square", "plain"],
)
def test_loss_and_gradients_by_hand_in_any_split(kind, loss, ties, start, by_hand):
    """Lists, margins, weights and ties, in one pass, in two, and row by row."""
    config = override(
        CONFIG, {"model.path": str(start), "data.files": [str(by_hand)], "data.ties": ties, **KINDS[kind]}
    )
    loaded = load_model(config.model, precision="fp32", device=CPU, adapter=config.adapter, head="score")
    model = loaded.model
    if config.adapter is not None:  # fresh B factors are zero: give them something to differ by
        generator = torch.Generator().manual_seed(0)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data = 0.02 * torch.randn(weight.shape, generator=generator)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    data = load_rows(config, loaded.tokenizer).train
    found = {}
    for tokens_per_pass in (4096, 200, 1):
        stream = make_stream(
            data,
            tokens_per_step=4096,
            tokens_per_pass=max(tokens_per_pass, int(data.lengths.max())),
            epochs=1.0,
            seed=0,
        )
        totals, total = stream.totals(0), torch.tensor(0.0)
        assert totals == pytest.approx({"pairs": 5.0, "answers": 13.0})
        for batch in stream.batches(0):
            sums = pair_sums(scores(model, batch), batch, loss)
            total = total + sums.ranking / totals["pairs"] + sums.penalty / totals["answers"]
        found[len(stream.passes(0))] = total.item(), torch.autograd.grad(total, trained)
    assert len(found) == 3
    unwrapped(model).set_attn_implementation("sdpa")
    scored = [
        [plain_score(model, loaded.tokenizer, row["prompt"], answer).double() for answer in row["answers"]]
        for row in ROWS_BY_HAND
    ]
    assert 0.5 < max(abs(score.item()) for of_row in scored for score in of_row) < loss.bound
    expected = plain_loss(scored, loss, ties)
    gradients = torch.autograd.grad(expected, trained, retain_graph=True)
    # two ways, each through seven products a layer, forward and twice backward
    shape = unwrapped(model).config
    products = 3 * 7 * shape.num_hidden_layers
    bound = 2 * rounding(torch.float32, terms=shape.intermediate_size, products=products)
    sizes = sizes_of_terms(expected, [score for of_row in scored for score in of_row], trained)
    for value, ours in found.values():
        assert value == pytest.approx(expected.item(), rel=2e-6)
        for own, theirs, size in zip(ours, gradients, sizes, strict=True):
            assert torch.dist(own, theirs) <= bound * size
