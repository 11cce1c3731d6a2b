"""The quickstart as a newcomer runs it, and all that can be done with the run it leaves."""

import html.parser
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.end_to_end.conftest import PRECISION_NOTES, Done
from tuner.config import from_json, load_config, override
from tuner.resources import locate

Tuner = Callable[..., Done]
CONFIG = ROOT / "configs" / "quickstart_sft.py"
SHORT = ("max_steps=8", "evaluation.rows=20")
NO_TEST = ("data.test_files=[]", "evaluation.score=null")
QUESTION = "What is 2 + 3?"


def real(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`tuner` in a shell: a new process with a stdout and stderr that are no terminals."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tuner", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which the quickstart was run, in short."""
    folder = tmp_path_factory.mktemp("quickstart")
    done = real("train", CONFIG, *SHORT, cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "said.json").write_text(json.dumps([done.stdout, done.stderr]))
    return folder


@pytest.fixture
def run(place: Path) -> Path:
    return place / "runs" / "quickstart_sft"


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# The run folder


def test_what_is_said(place: Path, run: Path) -> None:
    """Results on stdout, progress on stderr in whole lines; no color codes, bars, or words of a library."""
    out, err = json.loads((place / "said.json").read_text())
    results = json.loads((run / "results.json").read_text())
    assert out.splitlines() == [
        *(
            f"{name + ':':<9}score {measured['score']:.4f}  loss {measured['loss']:.4f}"
            for name, measured in results.items()
        ),
        "model:   runs/quickstart_sft/model",
        "curves:  runs/quickstart_sft/curves.png",
        "merge:   tuner merge runs/quickstart_sft FOLDER; tools that load the adapter itself use its base's chat "
        "template and end tokens",
        "next:    tuner chat runs/quickstart_sft",
    ]
    assert "\x1b" not in err
    assert "\r" not in err
    expected = (
        *PRECISION_NOTES,
        "Reading rows: ",
        "3,600 rows read from 3 sources. train: 3,400 samples, ",
        "before training: ",
        "step ",
        "after training: ",
        "finished after step 8 of 8",
    )
    assert [line for line in err.splitlines() if not line.startswith(expected)] == []


def test_the_folder_is_complete(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names == {
        *("config.json", "overrides.json", "versions.json", "data.json", "metrics.jsonl", "log.txt"),
        *("base.json", "before.json", "results.json", "curves.png", "checkpoints", "model", ".lock"),
    }
    assert from_json((run / "config.json").read_text()) == override(load_config(CONFIG), SHORT)
    assert json.loads((run / "overrides.json").read_text()) == list(SHORT)
    versions = json.loads((run / "versions.json").read_text())
    assert {"python", "tuner", "torch", "transformers", "commit", "device", "processes", "threads"} <= set(
        versions
    )
    assert versions["torch"] == torch.__version__.partition("+")[0] or versions["torch"] == torch.__version__
    data = json.loads((run / "data.json").read_text())
    assert data["fingerprint"]
    assert data["report"]["parts"]["train"]["samples"] == 3_400
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000008"]
    assert not list(run.rglob(".writing-*"))


def test_metrics_say_what_happened(run: Path) -> None:
    records = metrics(run)
    assert [record["step"] for record in records] == list(range(1, 9))
    tokens = [record["tokens"] for record in records]
    assert tokens == sorted(set(tokens))
    assert all(0.9 < record["fill"] <= 1 for record in records), "what does not fit goes on to the next step"
    assert all(record["loss"] > 0 and record["passes"] == 1 for record in records)
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert 0 < records[-1]["lr"] < 0.1 * max(record["lr"] for record in records)


def test_results_are_those_measured_before_and_after(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    assert set(results) == {"before", "after"}
    for name in results:
        assert set(results[name]) == {"score", "loss"}
        assert 0 <= results[name]["score"] <= 1
    assert results["before"] == json.loads((run / "before.json").read_text())
    assert results["after"]["loss"] < results["before"]["loss"]


def test_the_log_has_times_and_the_same_words(run: Path) -> None:
    lines = (run / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S", line) for line in lines)
    assert any("3,600 rows read from 3 sources" in line for line in lines)
    assert any("before training: score" in line for line in lines)


def test_again_is_over_at_once(place: Path, run: Path, tuner: Tuner) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    done = tuner("train", CONFIG, *SHORT, cwd=place)
    assert done.code == 0
    assert done.out == json.loads((place / "said.json").read_text())[0]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    assert done.seconds < 3


# The model


def test_the_model_loads_with_peft_and_transformers_alone(run: Path) -> None:
    """But for InternLM2's registration, by importing tuner.models; the logits are those of our own loading."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from tuner.config import Model
    from tuner.models.generate import unpacked
    from tuner.models.load import load_model
    from tuner.models.quantization import keep_unpacked

    settings = json.loads((run / "model/adapter_config.json").read_text())
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        settings["base_model_name_or_path"], quantization_config=four_bit, dtype=torch.float32
    )
    keep_unpacked(base)  # else bitsandbytes rounds to bf16 on CPUs with AVX512
    plain = PeftModel.from_pretrained(base, str(run / "model")).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(run / "model"))
    tokens = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    own = load_model(Model(path=str(run)), precision="fp32", device=torch.device("cpu"), train=False)
    with torch.no_grad(), unpacked(own.model) as transformer:
        expected = transformer(input_ids=tokens, use_cache=False).logits
        torch.testing.assert_close(
            plain(input_ids=tokens, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5
        )


def test_it_answers(place: Path, tuner: Tuner) -> None:
    done = tuner("chat", "runs/quickstart_sft", "-m", QUESTION, "--max-new-tokens", 8, cwd=place)
    assert (done.code, done.err) == (0, "")
    assert done.out.strip()
    typed = f"{QUESTION}\n/clear\n{QUESTION}\n/exit\nnever read\n"
    talk = tuner("chat", "runs/quickstart_sft", "--max-new-tokens", 8, cwd=place, typed=typed)
    assert talk.code == 0
    assert talk.out == done.out * 2, "after /clear the same question has the same answer"


def test_the_merged_model_answers_the_same(place: Path, run: Path, tuner: Tuner, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tuner.config import Model
    from tuner.models.generate import generate
    from tuner.models.load import load_model

    done = tuner("merge", run, "merged", "--dtype", "fp32", "--json")
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    assert report["tokens"] >= 256
    assert report["folding"]["mean_kl"] < 1e-6
    assert report["folding"]["agreement"] == 1.0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert type(merged).__name__ == "InternLM2ForCausalLM"
    assert any("attention.wqkv" in name for name in load_file(tmp_path / "merged/model.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"What is {a} + {b}?"}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for a, b in ((2, 3), (41, 7), (30, 52), (9, 9))
    ]
    settings: dict[str, Any] = {"max_new_tokens": 6, "end_ids": [tokenizer.eos_token_id]}
    own = load_model(Model(path=str(run)), precision="fp32", device=torch.device("cpu"), train=False)
    answers = [
        [answer.tokens.tolist() for answer in generate(model, prompts, **settings)]
        for model in (merged, own.model)
    ]
    assert answers[0] == answers[1]


def test_a_run_is_a_model_and_chains_do_not_stack(place: Path, run: Path, tuner: Tuner) -> None:
    """The next run goes on with a copy of the adapter, from where the first one ended."""
    from_run = ("train", CONFIG, f"model.path={run}", "model.quantization=null", "evaluation.rows=20")
    done = tuner(*from_run, "adapter=null", "max_steps=2", "name=second", cwd=place)
    assert done.code == 0, done.err
    first, second = (
        json.loads((place / f"runs/{name}/results.json").read_text()) for name in (run.name, "second")
    )
    assert second["before"]["loss"] == pytest.approx(first["after"]["loss"], rel=1e-6)
    saved = [
        json.loads((place / f"runs/{name}/model/adapter_config.json").read_text())
        for name in (run.name, "second")
    ]
    assert saved[0] == saved[1]
    assert saved[1]["base_model_name_or_path"] == locate("tuner:tiny")
    weights = [
        load_file(place / f"runs/{name}/model/adapter_model.safetensors") for name in (run.name, "second")
    ]
    assert {name: tensor.shape for name, tensor in weights[0].items()} == {
        name: tensor.shape for name, tensor in weights[1].items()
    }
    assert not all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    other = tuner(*from_run, "max_steps=2", "name=third", "adapter.r=4", cwd=place)
    assert other.code == 2
    assert "adapter.r=4" in other.err
    assert "tuner merge" in other.err
    assert not (place / "runs/third").exists()


# The data


def test_data_in_the_terminal(tuner: Tuner) -> None:
    done = tuner("data", CONFIG)
    assert (done.code, done.err) == (0, "")
    assert "\x1b" not in done.out, "no color codes without a terminal"
    assert "⟦" in done.out, "what the loss is taken on is marked without colors too"
    assert re.search(r"samples +3,400\b", done.out)
    assert re.search(r"train\.jsonl:\d+", done.out)


class Page(html.parser.HTMLParser):
    """What a page asks a browser for, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.asked: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.asked += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")
        ]
        self.asked += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_data_as_a_page(tuner: Tuner, tmp_path: Path) -> None:
    """Self-contained, and whatever a row or a file's name holds is text."""
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)> & \"'>"
    (tmp_path / "<u>rows.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": evil}, {"role": "assistant", "content": evil}]})
    )
    done = tuner(
        "data",
        CONFIG,
        'data.files=["<u>rows.jsonl"]',
        *NO_TEST,
        "epochs=1",
        "--html",
        "page.html",
    )
    assert (done.code, done.err) == (0, "")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "img", "link", "u", "s"} & set(page.tags), (
        "rows, file names and special tokens are text"
    )
    assert "<s><|im_start|>user" in page.text
    assert "<u>rows.jsonl:1" in page.text
    assert page.asked == []
    assert not re.search(r"https?://|@import|url\(", text)
    assert page.text.count("<script>alert(1)</script><img src=x onerror=alert(1)>") == 2


def test_data_that_would_teach_wrongly_is_exit_code_1(tuner: Tuner, tmp_path: Path) -> None:
    """A template with two BOS tokens."""
    (tmp_path / "twice.jinja").write_text(
        "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    command = ("data", CONFIG, "data.template=twice.jinja", "data.limit=3")
    done = tuner(*command)
    assert done.code == 1
    assert "error: 6 samples with two BOS tokens at the beginning" in done.out.replace("\n", " ")
    assert "train.jsonl:1" in done.out
    found = tuner(*command, "--json")
    assert found.code == 1
    assert len(json.loads(found.out)["errors"]) == 1
    assert tuner(*command, "--html", "page.html").code == 1


# Several processes


def test_two_processes_equal_one(place: Path, tuner: Tuner) -> None:
    changes = ("max_steps=3", "evaluation.rows=20", "evaluation.max_new_tokens=2", "precision=fp32")
    one = tuner("train", CONFIG, *changes, "tokens_per_pass=1024", "--runs", "one", cwd=place)
    assert one.code == 0, one.err
    two = real(
        "train", CONFIG, *changes, "tokens_per_pass=1024", "--runs", "two", "--processes", 2, cwd=place
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout == one.out.replace("one/", "two/"), "one of them speaks"
    curves = [
        [
            (record["step"], record["tokens"], record["loss"], record["grad_norm"])
            for record in metrics(place / name)
        ]
        for name in ("one/quickstart_sft", "two/quickstart_sft")
    ]
    for single, double in zip(*curves, strict=True):
        assert single[:2] == double[:2]
        assert single[2:] == pytest.approx(double[2:], rel=2e-5)
    assert json.loads((place / "two/quickstart_sft/versions.json").read_text())["processes"] == 2


def test_a_mistake_in_two_processes_is_said_once(place: Path) -> None:
    done = real("train", CONFIG, "data.template=llama3", "name=wrong", "--processes", 2, cwd=place)
    assert done.returncode == 2
    *notes, sentence = done.stderr.splitlines()
    assert notes == PRECISION_NOTES, done.stderr
    assert sentence.startswith("tuner: template 'llama3' needs")
    assert not (place / "runs/wrong").exists()
