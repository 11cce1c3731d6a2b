"""Loss and gradients of a packed step equal transformers' own, sample by sample, unpacked."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tuner.config import LoRA, Model
from tuner.data.load_examples import load_examples
from tuner.data.stream import make_stream
from tuner.models.checkpointing import recompute_activations
from tuner.models.forward import hidden_states, token_loss
from tuner.models.load import load_model
from tuner.models.probe import prove_isolation
from tuner.models.unwrap import unwrapped

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    from tests.equivalence.conftest import SMALL

    loaded = load_model(SMALL.model, precision="fp32", device=CPU)
    data = load_examples(SMALL.data, loaded.tokenizer)
    return make_stream(data.train, tokens_per_step=512, tokens_per_pass=256, epochs=1.0, seed=0)


def plain_loss(model, tokens, weights):
    """transformers' logits under its own attention, and the loss written out."""
    logits = model(input_ids=torch.from_numpy(tokens)[None].long(), use_cache=False).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(tokens)[1:].long(), reduction="none")
    return (losses * torch.from_numpy(weights)[1:]).sum()


@pytest.mark.parametrize(
    ("adapter", "quantization"),
    [(None, None), (LoRA(r=4), None), (LoRA(r=4), "nf4")],
    ids=["full", "lora", "qlora"],
)
def test_loss_and_gradients(stream, adapter, quantization):
    model = load_model(
        Model(path="tuner:tiny", quantization=quantization), precision="fp32", device=CPU, adapter=adapter
    ).model
    if adapter is not None:  # fresh B factors are zero: give them something to differ by
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours = sum(token_loss(model, batch) for batch in stream.batches(0)) / stream.totals(0)["tokens"]
    gradients = torch.autograd.grad(ours, trained)
    unwrapped(model).set_attn_implementation("sdpa")
    samples = [stream.examples.example(index) for index in stream.steps[0].samples]
    total = sum(float(weights.sum()) for _, weights in samples)
    theirs = sum(plain_loss(model, tokens, weights) for tokens, weights in samples) / total
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for own, other in zip(gradients, torch.autograd.grad(theirs, trained), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-6)


def test_every_token_is_as_if_alone(stream):
    model = load_model(Model(path="tuner:tiny"), precision="fp32", device=CPU).model
    batch = stream.batches(0)[0]
    packed = hidden_states(model, batch)
    unwrapped(model).set_attn_implementation("sdpa")
    for start, end in zip(batch.borders, batch.borders[1:], strict=False):
        alone = unwrapped(model).model(input_ids=batch.tokens_T[None, start:end]).last_hidden_state[0]
        torch.testing.assert_close(packed[start:end], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma", "internlm2"])
def test_the_probe_passes_for_every_family_and_fails_on_a_leak(family, tmp_path, monkeypatch):
    from tuner.errors import UserError
    from tuner.models import varlen
    from tuner.models.tiny import tiny_model_folder

    tiny_model_folder(f"org/{family}-9b", tmp_path)
    loaded = load_model(Model(path=str(tmp_path)), precision="fp32", device=CPU)
    assert prove_isolation(loaded, CPU, torch.autocast("cpu", enabled=False)) < 1e-4
    by_segment = varlen._by_segment
    monkeypatch.setattr(
        varlen, "_by_segment", lambda q, k, v, lengths, *rest: by_segment(q, k, v, [sum(lengths)], *rest)
    )
    with pytest.raises(UserError, match="packed samples do not come out as they do alone"):
        prove_isolation(loaded, CPU, torch.autocast("cpu", enabled=False))


def test_a_sliding_window_equals_transformers(tmp_path):
    """Mistral 7B v0.1 attends to the last 4,096 tokens only; here 16, in segments shorter and longer than that."""
    from transformers import MistralConfig, MistralForCausalLM

    from tuner.models.probe import LENGTHS, _one_by_one, _relative_error, random_row

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(**shape, num_key_value_heads=2, vocab_size=128, sliding_window=7)
    model = MistralForCausalLM(config).eval()
    model.set_attn_implementation("varlen")
    batch = random_row(model, CPU, LENGTHS)
    with torch.no_grad():
        packed = hidden_states(model, batch)
        model.set_attn_implementation("sdpa")
        assert _relative_error(packed, _one_by_one(model, batch)) < 1e-6


def test_padding_under_varlen_is_an_error_not_a_wrong_answer():
    model = load_model(Model(path="tuner:tiny"), precision="fp32", device=CPU).model
    tokens = torch.ones(2, 8, dtype=torch.long)
    with pytest.raises(ValueError, match="varlen attention needs segments"):
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens))


def test_a_row_of_32k_tokens_trains_without_quadratic_memory(tmp_path):
    """One packed row of 32k, equal to its segments; scores of T × T would be 4 GiB a head and layer."""
    import resource

    import numpy as np

    from tuner.config import Rope
    from tuner.data.batch import make_batch
    from tuner.models.tiny import tiny_model_folder

    tiny_model_folder("org/internlm2", tmp_path)
    rope = Rope(base=1e6, scaling="dynamic", factor=2.0)
    base = Model(path=str(tmp_path), rope=rope)
    model = load_model(base, precision="fp32", device=CPU, adapter=LoRA(r=4)).model
    recompute_activations(model)
    model.train()
    generator = np.random.default_rng(0)
    lengths = (16_384, 12_000, 4_384)
    samples = [(generator.integers(10, 1000, n).astype(np.int32), np.ones(n, np.float32)) for n in lengths]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    packed = token_loss(model, make_batch(samples))
    packed.backward()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    together = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    alone = [token_loss(model, make_batch([sample])) for sample in samples]
    sum(alone).backward()
    apart = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert packed.item() == pytest.approx(sum(loss.item() for loss in alone), rel=1e-5)
    for own, other in zip(together, apart, strict=True):
        assert (own - other).norm() <= 1e-3 * other.norm()
    assert grown < 3.0  # GiB


def test_the_model_is_what_automodel_loads(tmp_path):
    from tuner.resources import locate

    ours = load_model(Model(path="tuner:tiny"), precision="fp32", device=CPU).model
    theirs = AutoModelForCausalLM.from_pretrained(locate("tuner:tiny"), dtype=torch.float32)
    assert all(torch.equal(one, two) for one, two in zip(ours.parameters(), theirs.parameters(), strict=True))
