"""Folders that leave tuner, in the hands of transformers, tokenizers and peft alone: they read the same tokens, stop at
the same tokens, and give the same scores."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
)

import tuner
from tests.equivalence.conftest import SMALL, SMALL_REWARD
from tuner.config import override
from tuner.data.conversation import Conversation, Turn
from tuner.models.chat import open_chat
from tuner.models.merge import export, merge
from tuner.models.scorer import open_scorer
from tuner.models.tiny import tiny_model_folder

TEXTS = ["How much is 12 + 7? It is 19. A broom is a tool for sweeping. " * 30]
PROMPT = "What is 12 + 7? 扫帚"
CHAT = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "19, a tool."}]
SHORT = {"max_steps": 1, "data.limit": 20, "data.max_length": 256}
FULL = {"adapter": None}
FAMILIES = {
    # InternLM2's tokenizer adds its begin token to text, as Llama's does; alpaca is one of the templates that tell
    # both kinds of tokenizers apart by a variable of ours
    "internlm2": ("tuner:tiny", "internlm2"),
    "llama": ("", "alpaca"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def artifacts(request, tmp_path_factory):
    """Every folder of a language model that leaves tuner: name -> folder."""
    folder = tmp_path_factory.mktemp(request.param)
    path, template = FAMILIES[request.param]
    path = path or str(tiny_model_folder("org/llama", folder / "base"))
    changes = {"model.path": path, "data.template": template} | SHORT
    nf4 = {"model.quantization": "nf4"}
    runs = {
        name: tuner.train(override(SMALL, changes | more | {"name": name}), runs=folder)
        for name, more in {"adapter": nf4, "full": FULL}.items()
    }
    merge(runs["adapter"].folder, folder / "merged", texts=TEXTS)
    export(runs["full"].folder, folder / "exported")
    found = {name: run.model_folder for name, run in runs.items()}
    found |= {name: folder / name for name in ("merged", "exported")}
    if request.param == "internlm2":
        merge(runs["adapter"].folder, folder / "llama", texts=TEXTS, layout="llama")
        found["llama"] = folder / "llama"
    return found


class Says(LogitsProcessor):
    """Makes a model say these tokens, and one other for ever after."""

    def __init__(self, tokens, prompt):
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids, scores):
        place = input_ids.shape[1] - self.prompt
        scores[:] = -torch.inf
        scores[:, self.tokens[place] if place < len(self.tokens) else 20] = 0
        return scores


def test_transformers_stops_where_tuner_chat_stops(artifacts):
    for name, folder in artifacts.items():
        chat = open_chat(str(folder))
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
        assert set(ends) == chat.end_ids, name
        if name == "adapter":
            continue  # whoever loads it alone takes the base's settings: `tuner train` says so
        model = AutoModelForCausalLM.from_pretrained(folder)
        prompt = torch.tensor([chat.template.render_prompt(Conversation((Turn("user", PROMPT),), origin=""))])
        for end in chat.end_ids:
            says = Says([30, 31, end], prompt.shape[1])
            tokens = model.generate(prompt, max_new_tokens=9, do_sample=False, logits_processor=[says])
            assert tokens[0, prompt.shape[1] :].tolist() == [30, 31, end], name


def test_the_end_of_a_turn_is_an_end(artifacts):
    tokenizer = AutoTokenizer.from_pretrained(artifacts["adapter"])
    if "<|im_end|>" in tokenizer.get_vocab():
        assert tokenizer.eos_token != "<|im_end|>"
        for folder in artifacts.values():
            ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
            assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ends


def test_others_read_what_tuner_reads(artifacts):
    for name, folder in artifacts.items():
        chat = open_chat(str(folder))
        turns = Conversation((Turn("user", PROMPT),), origin="")
        ids = chat.template.render_prompt(turns)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=False)
        assert found == ids, name
        plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert plain.truncation is plain.padding is None
        assert plain.encode(chat.template.prompt_text(turns), add_special_tokens=False).ids == ids
        assert plain.encode(TEXTS[0]).ids == chat.loaded.tokenizer(TEXTS[0])["input_ids"]


def test_others_may_read_the_files(artifacts, tmp_path):
    (tmp_path / "new").touch()
    for folder in artifacts.values():
        modes = {file.name: file.stat().st_mode for file in folder.iterdir()}
        assert set(modes.values()) == {(tmp_path / "new").stat().st_mode}, modes


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    """Every folder of a reward model that leaves tuner: name -> folder."""
    folder = tmp_path_factory.mktemp("rewards")
    runs = {
        name: tuner.train(override(SMALL_REWARD, {"max_steps": 2, "name": name} | more), runs=folder)
        for name, more in {"adapter": {}, "full": FULL}.items()
    }
    merge(runs["adapter"].folder, folder / "merged", texts=TEXTS, dtype="fp32")
    merge(runs["adapter"].folder, folder / "llama", texts=TEXTS, dtype="fp32", layout="llama")
    export(folder / "llama", folder / "again", dtype="fp32")
    found = {name: run.model_folder for name, run in runs.items()}
    return found | {name: folder / name for name in ("merged", "llama", "again")}


@torch.no_grad()
def test_a_rendered_conversation_ends_in_the_reward_token(rewards):
    """As vLLM's /classify and transformers render it; in InternLM2's own layout its published code appends it."""
    turns = Conversation(tuple(Turn(turn["role"], turn["content"]) for turn in CHAT), origin="")
    for name, folder in rewards.items():
        scorer = open_scorer(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer.apply_chat_template(CHAT, return_dict=False)
        if name in ("full", "merged"):
            ids.append(json.loads((folder / "config.json").read_text())["reward_token_id"])
        [score] = scorer.score([turns])
        if name != "adapter":
            model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
            np.testing.assert_allclose(model(torch.tensor([ids])).logits.item(), score, atol=1e-5, rtol=0)
        assert ids.count(tokenizer.convert_tokens_to_ids(scorer.record.reward_token)) == 1, name
        assert ids[-1] == tokenizer.convert_tokens_to_ids(scorer.record.reward_token), name


def test_a_reward_model_trained_further_writes_one_reward_token(rewards, tmp_path):
    again = {"model.path": str(rewards["adapter"].parent), "adapter": None, "data.template": "tokenizer"}
    run = tuner.train(override(SMALL_REWARD, {"max_steps": 1, "name": "again"} | again), runs=tmp_path)
    first, second = (folder / "chat_template.jinja" for folder in (rewards["adapter"], run.model_folder))
    assert second.read_text() == first.read_text()
