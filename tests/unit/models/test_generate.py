"""Answers do not depend on their batch, equal transformers' own, and asking leaves no trace in the model."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.whole_models import full_logits
from tuner.config import LoRA, Model, Rope
from tuner.data.batch import make_batch
from tuner.errors import UserError
from tuner.models import decoding, varlen
from tuner.models import kv_cache as cache_module
from tuner.models.answer_end import StopTexts
from tuner.models.checkpointing import recompute_activations
from tuner.models.generate import Answer, generate, stream, uniforms, unpacked
from tuner.models.load import Loaded, load_model
from tuner.models.segment_rope import SegmentedRotary
from tuner.models.tiny import tiny_model_folder

PROMPTS = [[20, 21, 22, 23, 24, 25], [30], [40, 41, 42], [50, 51]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[None, "nf4"])
def loaded(request, internlm2_folder):
    return load_model(
        Model(path=str(internlm2_folder), quantization=request.param),
        precision="fp32",
        device=CPU,
        adapter=LoRA(r=4, dropout=0.5),
    )


@pytest.fixture(scope="module")
def skilled():
    """The small model that has learned something: its probabilities are far from even."""
    return load_model(Model(path="tuner:tiny"), precision="fp32", device=CPU, train=False)


def ragged(count=13, longest=90, vocabulary=2000, seed=0):
    generator = np.random.default_rng(seed)
    lengths = [longest, 1, *generator.integers(2, longest // 2, count - 2)]
    return [generator.integers(10, vocabulary, length).tolist() for length in lengths]


def ask(loaded, prompts=PROMPTS, **options):
    model = loaded.model if isinstance(loaded, Loaded) else loaded
    return generate(model, prompts, **{"max_new_tokens": 8, "end_ids": ()} | options)


def tokens(answers):
    return [answer.tokens.tolist() for answer in answers]


@torch.no_grad()
def recomputed(loaded, prompt, answer, temperature=1.0):
    """Log-probabilities of the answer's tokens by one pass over prompt and answer, as in training."""
    whole = np.array([*prompt, *answer.tokens], np.int32)
    logits_TV = full_logits(loaded.model, make_batch([(whole, np.zeros(len(whole), np.float32))]))
    logprobs_TV = (logits_TV / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
    answer_N = torch.from_numpy(answer.tokens.astype(np.int64))
    return logprobs_TV.gather(-1, answer_N[:, None])[:, 0].numpy()


def same(first, second):
    assert tokens(first) == tokens(second)
    assert [answer.ended for answer in first] == [answer.ended for answer in second]
    for answer, other in zip(first, second, strict=True):
        np.testing.assert_allclose(answer.logprobs, other.logprobs, atol=2e-5)


def theirs(transformer, prompts, max_new_tokens, end_ids=()):
    """transformers' own greedy answers, one prompt at a time."""
    before = transformer.config._attn_implementation
    transformer.set_attn_implementation("sdpa")
    answers = []
    for prompt in prompts:
        output = transformer.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(end_ids) or None,
            pad_token_id=0,
        )
        answers.append(output[0, len(prompt) :].tolist())
    transformer.set_attn_implementation(before)
    return answers


# What is answered


def test_greedy_answers_are_transformers_own(skilled):
    prompts = ragged()
    assert tokens(ask(skilled, prompts, max_new_tokens=20)) == theirs(skilled.transformer, prompts, 20)


@pytest.mark.parametrize(
    "path", ["meta-llama/Llama-3.2-1B", "Qwen/Qwen3-0.6B", "mistralai/Mistral-7B", "google/gemma-2b"]
)
def test_other_families_too(path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder(path, tmp_path)).eval()
    prompts = ragged(6, 40, 900)
    assert tokens(ask(model, prompts, max_new_tokens=12)) == theirs(model, prompts, 12)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("mistral", {"sliding_window": 6}),
        ("qwen2", {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1}),
        ("gemma3_text", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    ],
)
def test_windows_are_kept_over_prompts_and_answers(family, values, monkeypatch):
    """Of all layers, or of some beside full ones; answers grow beyond the window and the slots."""
    monkeypatch.setattr(decoding, "BLOCK", 4)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        family, **shape, num_key_value_heads=2, head_dim=16, vocab_size=300, pad_token_id=0, **values
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        weight.data *= 3  # else one token is likeliest after all prompts
    prompts = ragged(6, 30, 290)
    answers = tokens(ask(model, prompts, max_new_tokens=16))
    assert answers == theirs(model, prompts, 16)
    model.config.sliding_window = 1000
    for module in model.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = 1000
    assert tokens(ask(model, prompts, max_new_tokens=16)) != answers, "the window made no difference"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.0, "top_p": 0.9, "top_k": 30, "min_new_tokens": 5, "stop": ("a", "the ", "1")},
    ],
)
def test_answers_do_not_depend_on_what_they_are_batched_with(skilled, settings, monkeypatch):
    prompts, count = ragged(), 24
    noise = uniforms(1, 2, range(len(prompts)), count) if settings else None
    ends = (5, *range(200, 300))  # some rows end early, so that they leave and the cache is moved
    options = {"max_new_tokens": count, "end_ids": ends, **settings}
    if "stop" in settings:
        options["stop"] = StopTexts(skilled.tokenizer, settings["stop"])
    alone = [
        ask(skilled, [prompt], noise=None if noise is None else noise[row : row + 1], **options)[0]
        for row, prompt in enumerate(prompts)
    ]
    together = ask(skilled, prompts, noise=noise, **options)
    same(together, alone)
    assert len({len(answer.tokens) for answer in together}) > (3 if settings else 1)
    assert ("stop" in settings) == any(answer.cut for answer in together)
    same(ask(skilled, prompts, noise=noise, cache_bytes=1, **options), alone)
    same(ask(skilled, prompts, noise=noise, cache_bytes=3_000_000, tokens_per_pass=50, **options), alone)
    monkeypatch.setattr(decoding, "BLOCK", 1)
    same(ask(skilled, prompts, noise=noise, **options), alone)
    order = np.random.default_rng(0).permutation(len(prompts))
    shuffled = ask(
        skilled, [prompts[row] for row in order], noise=None if noise is None else noise[order], **options
    )
    same(shuffled, [alone[row] for row in order])


def test_logprobs_are_those_of_a_full_forward_pass(skilled):
    prompts = ragged(5)
    noise = uniforms(0, 0, range(5), 12)
    for temperature, answers in (
        (1.0, ask(skilled, prompts, max_new_tokens=12)),
        (0.7, ask(skilled, prompts, max_new_tokens=12, temperature=0.7, top_p=0.9, noise=noise)),
    ):
        for prompt, answer in zip(prompts, answers, strict=True):
            expected = recomputed(skilled, prompt, answer, temperature)
            np.testing.assert_allclose(answer.logprobs, expected, atol=2e-5)
            assert answer.logprobs.dtype == np.float32


def test_samples_follow_their_noise(skilled):
    noise = uniforms(1, 0, range(4), 8)
    first = ask(skilled, temperature=1.0, noise=noise)
    same(ask(skilled, temperature=1.0, noise=noise), first)
    assert tokens(ask(skilled, temperature=1.0, noise=uniforms(2, 0, range(4), 8))) != tokens(first)
    same(ask(skilled, temperature=1.0, top_p=1e-6, noise=noise), ask(skilled))


def test_first_tokens_are_as_likely_as_the_model_says(skilled):
    count = 4000
    answers = ask(
        skilled, [[20, 21]] * count, max_new_tokens=1, temperature=1.0, noise=uniforms(0, 0, range(count), 1)
    )
    with torch.no_grad():
        exact = full_logits(
            skilled.model, make_batch([(np.array([20, 21], np.int32), np.zeros(2, np.float32))])
        )[-1]
    exact = exact.softmax(-1).numpy()
    frequencies = np.bincount(np.concatenate(tokens(answers)), minlength=len(exact)) / count
    assert np.abs(frequencies - exact).max() < 4 * np.sqrt(0.25 / count)


# Where an answer ends


def test_the_first_of_several_end_tokens_ends_an_answer(loaded):
    free = ask(loaded, max_new_tokens=8)
    ends = {int(free[0].tokens[3]), int(free[1].tokens[1]), 999_999}
    for whole, cut in zip(free, ask(loaded, end_ids=ends), strict=True):
        answer = whole.tokens.tolist()
        end = next((place for place, token in enumerate(answer) if token in ends), None)
        assert cut.ended == (end is not None)
        assert cut.tokens.tolist() == (answer if end is None else answer[: end + 1])
        assert cut.content.tolist() == (answer if end is None else answer[:end])
        assert len(cut.logprobs) == len(cut.tokens)
        assert cut.tokens.dtype == np.int32
    assert not any(answer.ended for answer in free)


def test_an_end_token_at_the_last_place_ends_too(loaded):
    last = int(ask(loaded, [PROMPTS[0]], max_new_tokens=1)[0].tokens[0])
    answer = ask(loaded, [PROMPTS[0]], max_new_tokens=1, end_ids=(last,))[0]
    assert (answer.tokens.tolist(), answer.ended, answer.content.tolist()) == ([last], True, [])


def test_before_the_minimum_no_end_is_sampled(loaded):
    free = ask(loaded, max_new_tokens=8)
    ends = {int(answer.tokens[0]) for answer in free} | {999_999}
    settled = [{}, {"temperature": 1.0, "noise": uniforms(0, 0, range(4), 8)}]
    for settings in settled:
        for answer in ask(loaded, end_ids=ends, min_new_tokens=3, **settings):
            assert not ends & set(answer.tokens[:3].tolist())
            assert len(answer.content) >= 3
    whole = ask(loaded, end_ids=ends)
    assert all(len(answer.tokens) == 1 for answer in whole)
    # the log-probability is over the whole vocabulary: of the most likely token, it is no less than another's
    assert ask(loaded, end_ids=ends, min_new_tokens=1)[0].logprobs[0] <= whole[0].logprobs[0]


def test_a_stop_text_ends_an_answer_with_the_token_that_completes_it(skilled):
    tokenizer, prompts = skilled.tokenizer, ragged(6)
    free = ask(skilled, prompts, max_new_tokens=24)
    texts = [tokenizer.decode(answer.tokens.tolist()) for answer in free]
    stops = (texts[0][9:12], texts[1][5:6], "never written")
    cut = 0
    for whole, answer in zip(
        free, ask(skilled, prompts, max_new_tokens=24, stop=StopTexts(tokenizer, stops)), strict=True
    ):
        prefixes = [tokenizer.decode(whole.tokens[: end + 1].tolist()) for end in range(24)]
        end = next(
            (place for place, text in enumerate(prefixes) if any(stop in text for stop in stops)), None
        )
        assert answer.ended == (end is not None)
        assert answer.tokens.tolist() == whole.tokens[: 24 if end is None else end + 1].tolist()
        first = min(
            (prefixes[end or 0].find(stop) for stop in stops if stop in prefixes[end or 0]), default=None
        )
        assert answer.text(tokenizer) == (prefixes[-1] if end is None else prefixes[end][:first])
        cut += end is not None
    assert cut >= 2


def test_a_stop_text_before_the_minimum_does_not_count_later(skilled):
    prompt = [ragged(6)[0]]
    (free,) = ask(skilled, prompt, max_new_tokens=24)
    pieces = [skilled.tokenizer.decode([token]) for token in free.tokens.tolist()]
    place = next(
        place for place in range(3, 20) if pieces[place].strip() and "".join(pieces).count(pieces[place]) == 1
    )
    stop = StopTexts(skilled.tokenizer, (pieces[place],))
    (ended,) = ask(skilled, prompt, max_new_tokens=24, stop=stop, min_new_tokens=place)
    assert (len(ended.tokens), ended.ended) == (place + 1, True)
    (late,) = ask(skilled, prompt, max_new_tokens=24, stop=stop, min_new_tokens=place + 1)
    assert (late.tokens.tolist(), late.ended, late.cut) == (free.tokens.tolist(), False, 0)


def test_stop_texts_across_tokens_and_characters_of_several_bytes(skilled):
    """Token by token against the text of all of them, where one token is one byte of a character."""
    tokenizer = skilled.tokenizer
    ids = tokenizer("one, 二 and — three.\n\n", add_special_tokens=False)["input_ids"]
    for texts in (("二",), ("—", "three"), ("\n\n",), (", ", "zz")):
        ends = [
            place for place in range(len(ids)) if StopTexts(tokenizer, texts).found_at_end(ids[: place + 1])
        ]
        decoded = [tokenizer.decode(ids[: place + 1]) for place in range(len(ids))]
        counts = [0, *(sum(text.count(stop) for stop in texts) for text in decoded)]
        assert ends == [place for place in range(len(ids)) if counts[place + 1] > counts[place]]
        assert bool(ends) == any(stop in decoded[-1] for stop in texts)


def test_the_model_is_not_asked_on_when_all_have_ended(loaded, monkeypatch):
    passes = []
    loaded.transformer.register_forward_hook(lambda *_: passes.append(1))
    end = int(ask(loaded, [PROMPTS[0]], max_new_tokens=1)[0].tokens[0])
    passes.clear()
    ask(loaded, [PROMPTS[0]] * 3, max_new_tokens=50, end_ids=(end,))
    assert len(passes) == 1
    ask(loaded, [PROMPTS[0]], max_new_tokens=4)
    assert len(passes) == 1 + 4
    loaded.transformer._forward_hooks.clear()


def test_rows_that_have_ended_are_not_computed_on(skilled):
    sizes = []
    hook = skilled.transformer.get_decoder().register_forward_pre_hook(
        lambda _, __, values: sizes.append(values["input_ids"].shape[0]), with_kwargs=True
    )
    prompts = ragged()
    noise = uniforms(0, 0, range(len(prompts)), 40)
    ask(skilled, prompts, max_new_tokens=40, temperature=1.0, noise=noise, end_ids=range(100, 500))
    hook.remove()
    assert sizes[:2] == [1, len(prompts)]  # prompts packed, then a row each
    assert sizes[1:] == sorted(sizes[1:], reverse=True)
    assert sizes[-1] < len(prompts) / 2


def test_rows_that_end_give_their_places_to_prompts_that_wait(skilled):
    """The cache has room for 4 of 13 rows: most passes are over 4, and each answer is what it is alone."""
    rows = []
    hook = skilled.transformer.get_decoder().register_forward_pre_hook(
        lambda _, __, values: rows.append(values["input_ids"].shape[0]), with_kwargs=True
    )
    prompts = [prompt[:20] for prompt in ragged()]
    noise = uniforms(0, 0, range(len(prompts)), 40)
    options = {"max_new_tokens": 40, "temperature": 1.0, "end_ids": range(100, 500)}
    answers = ask(skilled, prompts, noise=noise, tokens_per_pass=4 * 60, **options)
    hook.remove()
    same(ask(skilled, prompts, noise=noise, **options), answers)
    given = sum(len(answer.tokens) - 1 for answer in answers)
    decoded = [count for count in rows if count > 1]
    assert max(decoded) == 4
    assert sum(rows) < 1.5 * (given + len(prompts)), "places stood empty"


def test_a_long_prompt_is_read_in_pieces(skilled):
    """Of at most tokens_per_pass tokens; each sees those before it."""
    sizes = []
    hook = skilled.transformer.get_decoder().register_forward_pre_hook(
        lambda _, __, values: sizes.append(tuple(values["input_ids"].shape)), with_kwargs=True
    )
    prompt = ragged()[0]
    pieces = ask(skilled, [prompt], tokens_per_pass=40)
    hook.remove()
    assert sizes[:3] == [(1, 40), (1, 40), (1, 10)]
    same(pieces, ask(skilled, [prompt]))


# What it asks of the model, and leaves


@pytest.mark.parametrize("tokens_per_pass", [6, 7, 16_384])
def test_no_padding_is_seen_by_varlen_and_no_pack_by_sdpa(loaded, tokens_per_pass, monkeypatch):
    packed, padded = [], []
    attend = varlen._by_segment

    def spied(query, key, value, lengths, *rest):
        packed.append((query.shape[2], key.shape[2], lengths))
        return attend(query, key, value, lengths, *rest)

    def watched(_, __, values):
        implementation = loaded.transformer.config._attn_implementation
        assert (implementation == "varlen") == ("segment_borders" in values)
        if implementation != "varlen":
            padded.append(tuple(values["input_ids"].shape))

    monkeypatch.setattr(varlen, "_by_segment", spied)
    hook = loaded.transformer.get_decoder().register_forward_pre_hook(watched, with_kwargs=True)
    ask(loaded, tokens_per_pass=tokens_per_pass, cache_bytes=2**30)
    hook.remove()
    assert all(queries == keys == sum(lengths) for queries, keys, lengths in packed)
    layers = loaded.transformer.config.num_hidden_layers
    read = [length for _, _, lengths in packed[::layers] for length in lengths]
    assert read == sorted((len(prompt) for prompt in PROMPTS), reverse=True)
    assert len(packed) // layers == {6: 2, 7: 2, 16_384: 1}[tokens_per_pass]
    assert padded == [(4, 1)] * 7


def test_nothing_is_left_behind(loaded):
    model = loaded.model.train()
    model.base_model.model.model.layers[0].eval()  # a mixed state must come back as it was
    modes = [module.training for module in model.modules()]
    learned = [weight.requires_grad for weight in model.parameters()]
    transformer = loaded.transformer
    recompute_activations(model)
    attention, defaults = transformer.config._attn_implementation, transformer.generation_config
    assert attention == "varlen"
    torch.manual_seed(3)
    state = torch.get_rng_state()
    answers = ask(loaded, temperature=1.0, noise=uniforms(0, 0, range(4), 8))
    "".join(stream(loaded.model, loaded.tokenizer, [20], max_new_tokens=3, temperature=1.0, end_ids=()))
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [weight.requires_grad for weight in model.parameters()] == learned
    assert transformer.config._attn_implementation == attention
    assert transformer.generation_config is defaults
    assert transformer.is_gradient_checkpointing
    transformer.gradient_checkpointing_disable()
    model.eval()
    same(ask(loaded, temperature=1.0, noise=uniforms(0, 0, range(4), 8)), answers)  # no dropout meanwhile


@pytest.mark.parametrize("fails_at", [0, 1, 4])
def test_everything_comes_back_after_an_error(loaded, fails_at):
    """While prompts are read, at the first token, and later."""
    passes = []

    def fail(*_):
        passes.append(1)
        if len(passes) > fails_at:
            raise RuntimeError("out of memory")

    hook = loaded.transformer.get_decoder().norm.register_forward_hook(fail)
    loaded.model.train()
    with pytest.raises(RuntimeError, match="out of memory"):
        ask(loaded)
    hook.remove()
    assert loaded.transformer.config._attn_implementation == "varlen"
    assert all(module.training for module in loaded.model.modules())
    loaded.model.eval()


def test_a_stream_left_early_leaves_nothing_behind(loaded):
    pieces = stream(loaded.model, loaded.tokenizer, [20], max_new_tokens=50, end_ids=())
    next(pieces)
    pieces.close()
    assert loaded.transformer.config._attn_implementation == "varlen"
    with pytest.raises(RuntimeError), unpacked(loaded.model):
        raise RuntimeError
    assert loaded.transformer.config._attn_implementation == "varlen"


def test_the_checkpoints_own_settings_do_not_leak_in(loaded):
    answers = ask(loaded)
    loaded.transformer.generation_config.repetition_penalty = 50.0
    loaded.transformer.generation_config.do_sample = True
    same(ask(loaded), answers)
    loaded.transformer.generation_config.repetition_penalty = 1.0
    loaded.transformer.generation_config.do_sample = False


def test_the_active_adapter_answers(internlm2_folder):
    base = load_model(Model(path=str(internlm2_folder)), precision="fp32", device=CPU, train=False)
    bare = tokens(ask(base))
    from tuner.models.adapters import add_adapter

    model = add_adapter(base.model, LoRA(r=4), 0)
    first = model.active_adapter
    model.add_adapter("second", model.peft_config[first])
    for name, weight in model.named_parameters():
        if "lora_B.second" in name:
            torch.nn.init.normal_(weight, std=0.3)
    learned = {name: weight.requires_grad for name, weight in model.named_parameters()}
    assert tokens(ask(model)) == bare  # the first one adds nothing yet
    model.set_adapter("second")
    answers = tokens(ask(model))
    assert answers != bare
    assert answers == theirs(model.get_base_model(), PROMPTS, 8)
    model.set_adapter(first)
    assert tokens(ask(model)) == bare
    assert model.active_adapter == first
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == learned


def test_bf16_adapters_and_whole_modules_answer(internlm2_folder):
    bf16 = load_model(
        Model(path=str(internlm2_folder), quantization="nf4"),
        precision="bf16",
        device=CPU,
        adapter=LoRA(r=4, train_whole=("embed_tokens", "lm_head")),
    )
    assert len(ask(bf16)[0].tokens) == 8


def test_fp32_weights_under_autocast_cache_in_bf16(internlm2_folder, monkeypatch):
    """Full training: rotary positions come out in fp32, and the cache would be twice what was allowed."""
    full = load_model(Model(path=str(internlm2_folder)), precision="bf16", device=CPU)
    held = []
    update = cache_module._RowLayer.update
    monkeypatch.setattr(
        cache_module._RowLayer,
        "update",
        lambda self, *states: (update(self, *states), held.append((self.keys.dtype, self.values.dtype)))[0],
    )
    with torch.autocast("cpu", torch.bfloat16):
        answers = ask(full)
    assert set(held) == {(torch.bfloat16, torch.bfloat16)}
    assert [len(answer.tokens) for answer in answers] == [8] * 4
    full.model(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False, **segments()).logits.sum().backward()
    assert all(weight.grad is not None for weight in full.model.parameters())


def segments():
    return varlen.segment_arguments(make_batch([(np.array(PROMPTS[0]), np.zeros(6, np.float32))]))


# What is asked wrongly


def test_an_empty_prompt_is_refused(loaded):
    with pytest.raises(ValueError, match="empty prompt"):
        ask(loaded, [[20], []])
    with pytest.raises(ValueError, match="empty prompt"):
        next(stream(loaded.model, loaded.tokenizer, [], max_new_tokens=3, end_ids=()))


@pytest.mark.parametrize("noise", [None, uniforms(0, 0, range(4), 7), uniforms(0, 0, range(3), 8)])
def test_sampling_needs_a_number_for_every_token(loaded, noise):
    with pytest.raises(ValueError, match=r"noise of shape \(4, 8\)"):
        ask(loaded, temperature=1.0, noise=noise)


def test_no_prompts_no_answers(loaded):
    assert ask(loaded, []) == []
    assert tokens(ask(loaded, max_new_tokens=0)) == [[]] * 4
    assert Answer(np.array([3], np.int32), True, np.zeros(1, np.float32)).content.tolist() == []


# Piece by piece


def test_a_stream_joins_to_the_answer(loaded):
    prompt = loaded.tokenizer("请 hello")["input_ids"]
    answer = ask(loaded, [prompt], max_new_tokens=24)[0]
    pieces = list(stream(loaded.model, loaded.tokenizer, prompt, max_new_tokens=24, end_ids=()))
    assert "".join(pieces) == loaded.tokenizer.decode(answer.tokens.tolist(), skip_special_tokens=True)
    assert len(pieces) > 3


def test_a_stream_ends_at_the_end_token(loaded):
    answer = ask(loaded, [[20]], max_new_tokens=6)[0].tokens.tolist()
    end = answer[2]
    pieces = stream(loaded.model, loaded.tokenizer, [20], max_new_tokens=6, end_ids=(end,))
    content = answer[: answer.index(end)]
    assert "".join(pieces) == loaded.tokenizer.decode(content, skip_special_tokens=True)


def test_a_sampled_stream_is_the_sampled_answer(skilled):
    settings = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9}
    answer = ask(skilled, [[20, 21]], noise=uniforms(4, 0, [0], 12), **settings)[0]
    pieces = stream(skilled.model, skilled.tokenizer, [20, 21], end_ids=(), seed=4, **settings)
    assert "".join(pieces) == skilled.tokenizer.decode(answer.tokens.tolist(), skip_special_tokens=True)


def test_dynamic_rope_is_exact_to_the_trained_length_and_refused_beyond(tmp_path):
    """Past it, keys cached earlier would keep the rotation of a shorter row: 0.06 nats from the training pass."""
    folder = tiny_model_folder("internlm/internlm2-7b", tmp_path)
    model = Model(path=str(folder), rope=Rope(scaling="dynamic", factor=4.0))
    stretched = load_model(model, precision="fp32", device=CPU, train=False)
    trained_length = 52
    for module in stretched.transformer.modules():
        if isinstance(module, SegmentedRotary):
            module.trained_length = module.config.max_position_embeddings = trained_length
    prompts = ragged(6, 40, 900)
    answers = ask(stretched, prompts, max_new_tokens=12)
    for prompt, answer in zip(prompts, answers, strict=True):
        np.testing.assert_allclose(answer.logprobs, recomputed(stretched, prompt, answer), atol=1e-5)
    with pytest.raises(UserError, match="up to 53 tokens cannot be generated under dynamic NTK scaling"):
        ask(stretched, prompts, max_new_tokens=13)
    with pytest.raises(UserError, match="up to 53 tokens"):
        next(stream(stretched.model, stretched.tokenizer, prompts[0], max_new_tokens=13, end_ids=()))


def test_a_row_that_outgrows_a_mixed_window_is_computed_anew(tmp_path):
    """Each token is predicted as by a pass over the tokens before it: rows cross at different steps, one begins beyond,
    one ends before, and full rows are dropped on the way."""
    folder = tiny_model_folder("internlm/internlm2-7b", tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 24}))
    rope = Rope(base=3.0, length=96, mixed_window=True)
    loaded = load_model(Model(path=str(folder), rope=rope), precision="fp32", device=CPU, train=False)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(10, 1000, length).tolist() for length in (20, 30, 5, 24, 23, 15)]
    answers = ask(loaded, prompts, max_new_tokens=12, tokens_per_pass=60)
    for prompt, answer in zip(prompts, answers, strict=True):
        for place, logprob in enumerate(answer.logprobs.tolist()):
            # the token itself is the last of the pass, which must not choose the frequencies that predict it
            prefix = np.array([*prompt, *answer.tokens[:place]], np.int32)
            logits_TV = full_logits(
                loaded.model, make_batch([(prefix, np.zeros(len(prefix), np.float32))])
            ).detach()
            expected = logits_TV[-1].log_softmax(-1)[int(answer.tokens[place])]
            assert logprob == pytest.approx(float(expected), abs=1e-5)
    crossing = recomputed(loaded, prompts[0], answers[0])
    assert (
        np.abs(crossing - answers[0].logprobs).max() > 1e-3
    )  # a pass over the whole row has other frequencies
