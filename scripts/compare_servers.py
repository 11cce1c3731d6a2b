"""How trained models answer in other tools, against our own forward pass: the table of docs/serving.md.

    python scripts/compare_servers.py --folder FOLDER [--tools transformers own vllm] [--write]

Trains a short LoRA run and a short reward run on the embedded model, and hands them over as an adapter on its base, as
a merged model, as an exported one and as a classifier. On 50 prompts each tool gives the log-probabilities of all
tokens of prompts and answers, the token ids of its chats' prompts, and greedy answers; of the reward model its scores.
vLLM is that of $TUNER_VLLM_PYTHON or .venv-vllm. What is finished in FOLDER is used again. With --write the table goes
to docs/serving.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo import DOCS, ROOT, provenance, replace_part

import tuner
from tuner.config import Model, load_config, override
from tuner.data.batch import make_batch
from tuner.data.conversation import Conversation, Turn
from tuner.models.chat import ChatModel, open_chat
from tuner.models.forward import token_logprobs
from tuner.models.generate import generate
from tuner.models.merge import export, merge
from tuner.models.scorer import RewardInputs, ScoreRequest, open_scorer, prompt_of
from tuner.rollout.vllm_base import served_base

PROMPTS = 50
NEW_TOKENS = 16
TOOLS = ("transformers", "own", "vllm")
PAGE = DOCS / "serving.md"
BEGIN, END = "<!-- written by scripts/compare_servers.py -->\n", "<!-- end -->"
TITLES = {"transformers": "transformers, peft", "own": "tuner serve, own engine", "vllm": "vLLM"}
FORMS = {
    "adapter": "adapter on its base",
    "merged": "merged, own layout",
    "exported": "exported, Llama layout",
    "reward": "reward model, classifier",
}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """A question, its prompt, our greedy answer, and the log-probabilities of all tokens but the first."""

    question: str
    prompt: list[int]
    answer: str
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Line:
    """A line of the table: how far a tool is from us on one form of the model."""

    tool: str
    form: str
    prompts: str
    answers: str
    mean: float
    largest: float


@dataclass(frozen=True)
class Models:
    """The folders that are handed over."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "lora"

    @property
    def reward_run(self) -> Path:
        return self.folder / "reward"

    def path(self, form: str) -> Path:
        """What a server is given."""
        return {"adapter": self.run, "reward": self.folder / "classifier"}.get(form, self.folder / form)

    @property
    def base(self) -> Path:
        """The adapter's base in a layout that other tools read, dequantized."""
        return served_base(Model(path=str(self.run)), self.folder / "base", "fp32")

    def make(self) -> None:
        """Train and write what is not there yet."""
        short = {"precision": "fp32", "evaluation.rows": 8}
        sft = override(load_config("configs/quickstart_sft.py"), {"name": "lora", "max_steps": 30, **short})
        tuner.train(sft, runs=self.folder)
        reward = override(
            load_config("configs/quickstart_reward.py"), {"name": "reward", "max_steps": 20, **short}
        )
        tuner.train(reward, runs=self.folder)
        texts = [json.dumps(row) for row in questions()] * 8
        for form, layout in (("merged", "own"), ("exported", "llama")):
            if not self.path(form).is_dir():
                merge(self.run, self.path(form), dtype="fp32", texts=texts, layout=layout)
        if not self.path("reward").is_dir():
            export(self.reward_run, self.path("reward"), dtype="fp32", layout="llama")


def questions() -> list[str]:
    """Held-out sums, and questions that the model has not learned."""
    file = ROOT / "tuner" / "embedded" / "sums" / "test.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()[: PROMPTS // 2]
    sums = [json.loads(line)["messages"][0]["content"] for line in lines]
    words = (
        "king",
        "dog",
        "sea",
        "bread",
        "stone",
        "river",
        "city",
        "night",
        "hand",
        "word",
        "law",
        "wood",
        "gold",
    )
    open_ones = [text for word in words for text in (f"What is a {word}?", f"Tell me of the {word}, 二.")]
    return [*sums, *open_ones][:PROMPTS]


def our_rows(chat: ChatModel) -> list[Row]:
    """Questions with what tuner makes of them."""
    asked = questions()
    prompts = [chat.template.render_prompt(Conversation((Turn("user", text),))) for text in asked]
    answers = generate(chat.loaded.model, prompts, max_new_tokens=NEW_TOKENS, end_ids=chat.end_ids)
    rows = []
    for question, prompt, answer in zip(asked, prompts, answers, strict=True):
        tokens = [*prompt, *answer.tokens.tolist()]
        weights = np.r_[0.0, np.ones(len(tokens) - 1)].astype(np.float32)
        with torch.no_grad():
            logprobs, _ = token_logprobs(
                chat.loaded.model, make_batch([(np.array(tokens, np.int32), weights)])
            )
        text = str(chat.loaded.tokenizer.decode(answer.content.tolist(), skip_special_tokens=True))
        rows.append(Row(question, prompt, text, tokens, logprobs.tolist()))
    return rows


def our_scores(models: Models) -> tuple[list[np.ndarray], np.ndarray]:
    """Tokens and scores of questions with an answer, by the reward run itself."""
    scorer = open_scorer(models.reward_run)
    conversations = [
        Conversation((Turn("user", text), Turn("assistant", "It is good."))) for text in questions()
    ]
    requests = [ScoreRequest(each, None, prompt_of(each)) for each in conversations]
    sequences = RewardInputs(scorer.loaded.tokenizer, scorer.record, scorer.template).make(requests)
    return sequences, scorer.score_tokens(sequences)


def line(
    tool: str, form: str, gaps: np.ndarray, prompts: int | None = None, answers: int | None = None
) -> Line:
    counts = ["" if count is None else f"{count} of {PROMPTS}" for count in (prompts, answers)]
    gaps = np.abs(gaps)
    return Line(tool, form, counts[0], counts[1], float(gaps.mean()), float(gaps.max()))


# Plain transformers and peft, as its users load a folder


def by_transformers(models: Models, form: str, rows: Sequence[Row]) -> Line:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(models.base if form == "adapter" else models.path(form))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer_folder = models.run / "model" if form == "adapter" else models.path(form)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    ends = model.generation_config.eos_token_id
    if form == "adapter":
        model = PeftModel.from_pretrained(model, str(models.run / "model"))
        settings = json.loads((models.run / "model" / "generation_config.json").read_text())
        ends = settings["eos_token_id"]
    gaps, same_prompts, same_answers = [], 0, 0
    for row in rows:
        message = [{"role": "user", "content": row.question}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        same_prompts += ids == row.prompt
        with torch.no_grad():
            output = model.generate(
                torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=ends,
                pad_token_id=0, attention_mask=torch.ones(1, len(ids)),
            )  # fmt: skip
            logits = model(torch.tensor([row.tokens])).logits[0, :-1].log_softmax(-1)
        answer = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        same_answers += answer == row.answer
        logprobs = logits.gather(-1, torch.tensor(row.tokens[1:])[:, None])[:, 0].numpy()
        gaps.append(logprobs - np.array(row.logprobs))
    return line("transformers", form, np.concatenate(gaps), same_prompts, same_answers)


def scores_by_transformers(models: Models, sequences: Sequence[np.ndarray], scores: np.ndarray) -> Line:
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(
        models.path("reward"), dtype=torch.float32
    )
    with torch.no_grad():
        theirs = [float(model(torch.tensor(tokens[None]).long()).logits) for tokens in sequences]
    return line("transformers", "reward", np.array(theirs) - scores)


# Servers


@contextmanager
def server(models: Models, form: str, engine: str) -> Iterator[str]:
    """`tuner serve` of a form of the model; yields its address."""
    command = [sys.executable, "-m", "tuner", "serve", str(models.path(form)), "--engine", engine]
    command += ["--name", "compared", "--port", "0", "--max-length", "256"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        cwd=models.folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    try:
        for text in process.stdout:
            lines.append(text)
            if match := re.search(r"is served at (http://127\.0\.0\.1:\d+)", text):
                break
        else:
            sys.exit(f"{' '.join(command)} did not start:\n{''.join(lines[-30:])}")
        yield match[1]
    finally:
        process.terminate()
        process.communicate()


def ask(url: str, path: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        url + path, json.dumps({"model": "compared", **body}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.loads(response.read())


def by_server(url: str, tool: str, form: str, rows: Sequence[Row]) -> Line:
    gaps, same_prompts, same_answers = [], 0, 0
    for row in rows:
        messages = [{"role": "user", "content": row.question}]
        chat = ask(
            url, "/v1/chat/completions", messages=messages, temperature=0, max_tokens=NEW_TOKENS,
            return_token_ids=True,
        )  # fmt: skip
        same_prompts += chat["prompt_token_ids"] == row.prompt
        same_answers += chat["choices"][0]["message"]["content"] == row.answer
        scored = ask(
            url, "/v1/completions", prompt=row.tokens, echo=True, logprobs=0, max_tokens=1, temperature=0
        )
        logprobs = scored["choices"][0]["logprobs"]["token_logprobs"][1 : len(row.tokens)]
        gaps.append(np.array(logprobs) - np.array(row.logprobs))
    return line(tool, form, np.concatenate(gaps), same_prompts, same_answers)


def scores_by_server(url: str, tool: str, sequences: Sequence[np.ndarray], scores: np.ndarray) -> Line:
    answer = ask(url, "/classify", input=[tokens.tolist() for tokens in sequences])
    theirs = [item["probs"][0] for item in sorted(answer["data"], key=lambda item: item["index"])]
    return line(tool, "reward", np.array(theirs) - scores)


def measured(models: Models, tools: Sequence[str]) -> list[Line]:
    """All lines; those of earlier calls are read from the folder."""
    kept = models.folder / "lines.json"
    lines = [Line(**values) for values in json.loads(kept.read_text())] if kept.is_file() else []
    rows = our_rows(open_chat(str(models.run), device=CPU))
    sequences, scores = our_scores(models)
    for tool in tools:
        for form in FORMS:
            is_own_layout = tool == "transformers" and form == "merged"  # transformers has no InternLM2
            if is_own_layout or any((each.tool, each.form) == (tool, form) for each in lines):
                continue
            if tool == "transformers":
                new = (
                    scores_by_transformers(models, sequences, scores)
                    if form == "reward"
                    else by_transformers(models, form, rows)
                )
            else:
                with server(models, form, tool) as url:
                    new = (
                        scores_by_server(url, tool, sequences, scores)
                        if form == "reward"
                        else by_server(url, tool, form, rows)
                    )
            print(new, flush=True)
            lines.append(new)
            kept.write_text(json.dumps([asdict(each) for each in lines]))
    return lines


def table(lines: Sequence[Line]) -> str:
    head = "| tool | model | prompt ids equal | greedy answers equal | mean gap | largest gap |"
    order = [(tool, form) for tool in TOOLS for form in FORMS]
    ordered = sorted(lines, key=lambda each: order.index((each.tool, each.form)))
    return "\n".join(
        [
            head,
            "|---|---|---|---|---|---|",
            *(
                f"| {TITLES[each.tool]} | {FORMS[each.form]} | {each.prompts} | {each.answers} | {each.mean:.1e} | "
                f"{each.largest:.1e} |"
                for each in ordered
            ),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = Models(arguments.folder.absolute())
    models.folder.mkdir(parents=True, exist_ok=True)
    models.make()
    text = table(measured(models, arguments.tools))
    print(text)
    if arguments.write:
        source = provenance("python scripts/compare_servers.py --folder FOLDER --write")
        replace_part(PAGE, BEGIN, END, f"{text}\n\n{source}\n")


if __name__ == "__main__":
    main()
