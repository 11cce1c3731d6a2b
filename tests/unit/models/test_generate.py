"""Answers do not depend on their batch, and asking leaves no trace in the model."""

import pytest
import torch

from tuner.config import LoRA, Model
from tuner.models.checkpointing import recompute_activations
from tuner.models.generate import generate, generating, stream
from tuner.models.load import load_model

PROMPTS = [[20, 21, 22, 23, 24, 25], [30], [40, 41, 42], [50, 51]]


@pytest.fixture(scope="module", params=[None, "nf4"])
def loaded(request, internlm2_folder):
    return load_model(
        Model(path=str(internlm2_folder), quantization=request.param),
        precision="fp32",
        device=torch.device("cpu"),
        adapter=LoRA(r=4, dropout=0.5),
    )


def ask(loaded, prompts=PROMPTS, **options):
    return generate(loaded.model, prompts, **{"max_new_tokens": 8, "end_ids": (), "pad_id": 0} | options)


def test_greedy_answers_do_not_depend_on_the_batch(loaded):
    alone = [ask(loaded, [prompt])[0] for prompt in PROMPTS]
    assert ask(loaded) == alone
    assert ask(loaded, batch_size=2) == alone
    assert ask(loaded, pad_id=77) == alone


def test_greedy_is_the_most_likely_next_token(loaded):
    answer = ask(loaded, [PROMPTS[0]])[0]
    row = torch.tensor([PROMPTS[0] + answer])
    with torch.no_grad(), generating(loaded.model) as transformer:
        most_likely = transformer(input_ids=row, use_cache=False).logits[0].argmax(dim=-1).tolist()
    assert answer == most_likely[len(PROMPTS[0]) - 1 : -1]


def test_answers_end_before_the_end_token(loaded):
    free = ask(loaded)
    end = free[0][3]
    for answer, cut in zip(free, ask(loaded, end_ids=(end,)), strict=True):
        assert cut == (answer[: answer.index(end)] if end in answer else answer)


def test_samples_follow_their_seed(loaded):
    first = ask(loaded, temperature=1.0, seed=1)
    assert ask(loaded, temperature=1.0, seed=1) == first
    assert ask(loaded, temperature=1.0, seed=2) != first


def test_a_tiny_nucleus_is_greedy(loaded):
    assert ask(loaded, temperature=1.0, top_p=1e-6) == ask(loaded)


def test_nothing_is_left_behind(loaded):
    model = loaded.model.train()
    model.base_model.model.model.layers[0].eval()  # a mixed state must come back as it was
    modes = [module.training for module in model.modules()]
    transformer = loaded.transformer
    recompute_activations(model)
    attention, defaults = transformer.config._attn_implementation, transformer.generation_config
    assert attention == "varlen"
    torch.manual_seed(3)
    state = torch.get_rng_state()
    ask(loaded, temperature=1.0)
    "".join(stream(loaded.model, loaded.tokenizer, [20], max_new_tokens=3, temperature=1.0, end_ids=()))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert transformer.config._attn_implementation == attention
    assert transformer.generation_config is defaults
    assert transformer.is_gradient_checkpointing
    transformer.gradient_checkpointing_disable()
    model.eval()


def test_everything_comes_back_after_an_error(loaded):
    with pytest.raises(RuntimeError), generating(loaded.model):
        raise RuntimeError
    assert loaded.transformer.config._attn_implementation == "varlen"


def test_the_checkpoints_own_settings_do_not_leak_in(loaded):
    answers = ask(loaded)
    loaded.transformer.generation_config.repetition_penalty = 50.0
    loaded.transformer.generation_config.do_sample = True
    assert ask(loaded) == answers
    loaded.transformer.generation_config.repetition_penalty = 1.0
    loaded.transformer.generation_config.do_sample = False


def test_an_empty_prompt_is_refused(loaded):
    with pytest.raises(ValueError, match="empty prompt"):
        ask(loaded, [[20], []])


def test_no_prompts_no_answers(loaded):
    assert ask(loaded, []) == []


def test_a_stream_joins_to_the_answer(loaded):
    prompt = loaded.tokenizer("请 hello")["input_ids"]
    answer = ask(loaded, [prompt], max_new_tokens=24)[0]
    pieces = list(stream(loaded.model, loaded.tokenizer, prompt, max_new_tokens=24, end_ids=()))
    assert "".join(pieces) == loaded.tokenizer.decode(answer, skip_special_tokens=True)
    assert len(pieces) > 3


def test_a_stream_ends_at_the_end_token(loaded):
    answer = ask(loaded, [[20]], max_new_tokens=6)[0]
    end = answer[2]
    pieces = stream(loaded.model, loaded.tokenizer, [20], max_new_tokens=6, end_ids=(end,))
    kept = answer[: answer.index(end)]
    assert "".join(pieces) == loaded.tokenizer.decode(kept, skip_special_tokens=True)


def test_bf16_adapters_and_whole_modules_answer(internlm2_folder):
    bf16 = load_model(
        Model(path=str(internlm2_folder), quantization="nf4"),
        precision="bf16",
        device=torch.device("cpu"),
        adapter=LoRA(r=4, train_whole=("embed_tokens", "lm_head")),
    )
    assert len(ask(bf16)[0]) == 8
