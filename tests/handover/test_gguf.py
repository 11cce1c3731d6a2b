"""GGUF files in llama.cpp: the same tokens, logits and answers as here."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import tuner
from tests.small_models import CASES, write_case
from tuner.cli.main import app
from tuner.config import LoRA, Model, load_config, override
from tuner.data.conversation import Turn
from tuner.models.chat import open_chat
from tuner.models.load import load_model
from tuner.models.locate import locate
from tuner.models.merge import outputs
from tuner.models.save import save_model
from tuner.models.tiny import tiny_model_folder
from tuner.models.to_gguf.export import export_lora
from tuner.models.to_gguf.llama_cpp_ids import TEXTS
from tuner.models.to_gguf.modelfile import modelfile
from tuner.models.to_gguf.vocabulary import begins_with_bos
from tuner.models.to_gguf.write import write_gguf

PROMPT = "Hello world, what is 12 + 34? It is 46 is 46 is 46, and 你好 is a greeting."
NEW = 16


@pytest.fixture(scope="module")
def families(tmp_path_factory, ask_llama_cpp):
    """Case → (tokenizer, logits, greedy answer) here, and llama.cpp's of the file in fp32 and in q8_0."""
    folder = tmp_path_factory.mktemp("families")
    here, questions = {}, []
    for name in CASES:
        model = write_case(name, folder / name)
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        ids = torch.tensor([tokenizer.encode(PROMPT)])
        with torch.no_grad():
            logits = model(ids).logits[0]
            # no token ends it, so that its length is known
            answer = model.generate(ids, do_sample=False, max_new_tokens=NEW, eos_token_id=-1)[
                0, ids.shape[1] :
            ]
        here[name] = (tokenizer, logits, answer.tolist())
        for storage in ("fp32", "q8_0"):
            file = folder / f"{name}-{storage}.gguf"
            write_gguf(folder / name, file, name=name, storage=storage)
            texts = [*TEXTS, PROMPT] if storage == "fp32" else []
            questions.append(
                {
                    "model": str(file),
                    "rows": ids.tolist(),
                    "texts": texts,
                    "prompts": ids.tolist(),
                    "new": NEW,
                }
            )
    answers = iter(ask_llama_cpp(questions))
    return {name: (*here[name], next(answers), next(answers)) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_models_own(families, name):
    _, logits, answer, fp32, q8_0 = families[name]
    # sums of a hundred fp32 products in another order; llama.cpp reads Gemma's GELU from a table in fp16, to 2^-11
    tolerance = 1e-2 if name.startswith("gemma") else 1e-3
    assert torch.allclose(torch.tensor(fp32["logits"][0]), logits, rtol=0, atol=tolerance)
    assert fp32["answers"][0] == answer[: len(fp32["answers"][0])]
    # weights in steps of 1/127 of a block's largest, activations too
    assert torch.nn.functional.cosine_similarity(torch.tensor(q8_0["logits"][0]), logits).min() > 0.98


@pytest.mark.parametrize("name", CASES)
def test_texts_are_read_as_the_same_tokens(families, name):
    tokenizer, _, _, fp32, _ = families[name]
    texts = [*TEXTS, PROMPT]
    for text, ids, begun in zip(texts, fp32["ids"], fp32["begin"], strict=True):
        assert ids == tokenizer.encode(text, add_special_tokens=False), text
        assert begun == tokenizer.encode(text), text


@pytest.mark.parametrize("name", ["llama3", "internlm2", "qwen2", "gemma"])
def test_an_adapter_changes_the_base_as_here(tmp_path, ask_llama_cpp, name):
    write_case(name, tmp_path / "base")
    model = Model(path=str(tmp_path / "base"))
    loaded = load_model(model, precision="fp32", device=torch.device("cpu"), adapter=LoRA(r=4, alpha=12))
    with torch.no_grad():
        for key, weight in loaded.model.named_parameters():
            if "lora_B" in key:  # zero in a fresh adapter
                weight.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    save_model(loaded, tmp_path / "adapter")
    write_gguf(tmp_path / "base", tmp_path / "base.gguf", name="base", storage="fp32")
    export_lora(locate(Model(path=str(tmp_path / "adapter"))), tmp_path / "lora", name="adapter")
    row = loaded.tokenizer.encode(PROMPT)
    question = {"model": str(tmp_path / "base.gguf"), "rows": [row]}
    without, adapted = ask_llama_cpp([question, question | {"lora": str(tmp_path / "lora" / "adapter.gguf")}])
    logits = outputs(loaded.model, [row])
    assert torch.allclose(torch.tensor(adapted["logits"][0]), logits, rtol=0, atol=1e-2)
    assert not torch.allclose(torch.tensor(without["logits"][0]), logits, rtol=0, atol=1.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A short run that has learned to answer in sums' form and to stop."""
    folder = tmp_path_factory.mktemp("run")
    return tuner.train(
        override(load_config("quickstart_sft"), {"max_steps": 40, "name": "short"}), runs=folder
    ).folder


@pytest.mark.parametrize(
    "quantize", [(), ("f16",), ("q8_0",), ("q4_k_m",)], ids=lambda kind: "".join(kind) or "bf16"
)
def test_a_run_chats_in_llama_cpp_as_here(run, tmp_path, tools_python, ask_llama_cpp, quantize):
    command = ["export", str(run), str(tmp_path / "out"), "--format", "gguf"]
    app([*command, *(["--quantize", *quantize] if quantize else [])], standalone_mode=False)
    chats = [[{"role": "user", "content": f"What is {number} + {number + 7}?"}] for number in range(3, 23)]
    (reply,) = ask_llama_cpp([{"model": str(tmp_path / "out" / "model.gguf"), "chats": chats}])
    chat = open_chat(str(run))
    here = [
        "".join(chat.answer([Turn("user", messages[0]["content"])], max_new_tokens=24)) for messages in chats
    ]
    same = sum(one == other for one, other in zip(here, reply["chats"], strict=True))
    assert same >= {"": 18, "f16": 18, "q8_0": 15, "q4_k_m": 8}["".join(quantize)]
    print(same)


GO = """
package main

import ("encoding/json"; "os"; "text/template")

type Message struct { Role, Content string }

func main() {
    var asked []struct { Template, System string; Messages []Message }
    json.NewDecoder(os.Stdin).Decode(&asked)
    var answers []string
    for _, one := range asked {
        file, _ := os.CreateTemp("", "")
        if err := template.Must(template.New("").Parse(one.Template)).Execute(file, one); err != nil { panic(err) }
        text, _ := os.ReadFile(file.Name())
        os.Remove(file.Name())
        answers = append(answers, string(text))
    }
    json.NewEncoder(os.Stdout).Encode(answers)
}
"""


@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go, whose text/template Ollama's templates are")
def test_the_modelfiles_template_renders_what_the_chat_template_does(tmp_path):
    turns = (("system", "Be {{ brief }}."), ("user", 'Say "hi"'), ("assistant", "hi"), ("user", "  again\n"))
    questions, expected = [], []
    for family in ("internlm2", "qwen3", "mistral", "llama", "gemma", "smollm"):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder(f"org/{family}", tmp_path / family))
        text = modelfile(tokenizer, tmp_path / family, "./model.gguf")
        source = text.partition('TEMPLATE """')[2].partition('"""')[0]
        for chat in (turns, turns[1:]):
            messages = [{"Role": role, "Content": content.strip()} for role, content in chat]
            system = messages[0]["Content"] if messages[0]["Role"] == "system" else ""
            questions.append({"Template": source, "System": system, "Messages": messages})
            plain = [{"role": role, "content": content.strip()} for role, content in chat]
            prompt = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
            # Ollama puts the begin token first where the file says so
            expected.append(
                prompt.removeprefix(tokenizer.bos_token) if begins_with_bos(tokenizer) else prompt
            )
    (tmp_path / "render.go").write_text(GO)
    finished = subprocess.run(
        ["go", "run", str(tmp_path / "render.go")],
        input=json.dumps(questions), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(finished.stdout) == expected
