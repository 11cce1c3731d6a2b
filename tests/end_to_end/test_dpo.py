"""The DPO stage as a user meets it: it goes on where it stopped, and no setting is ignored in silence."""

import hashlib
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

import tuner
from tests.equivalence.conftest import in_two_processes
from tests.shallow_models import shallow
from tuner.config import (
    DPO,
    SFT,
    AdamW,
    Chat,
    Checkpoint,
    LoRA,
    Model,
    Preferences,
    Validation,
    override,
)
from tuner.data.conversation import Conversation, Turn
from tuner.data.examples import tokenize
from tuner.data.template import Template
from tuner.errors import UserError
from tuner.models.load import load_model
from tuner.resources import locate
from tuner.stages.run import Run
from tuner.training.stop_signals import Interrupted

BASE = DPO(
    name="pairs",
    model=Model(path=shallow(1)),
    adapter=LoRA(r=4),
    data=Preferences(
        files=("one.jsonl", "two.jsonl"),
        test_files=("held_out.jsonl",),
        validation_files=("held_out.jsonl",),
        template="internlm2",
        max_length=128,
    ),
    optimizer=AdamW(lr=5e-3),
    pairs_per_step=2,
    pairs_per_pass=1,
    max_steps=3,
    precision="fp32",
    gradient_checkpointing=False,
    device="cpu",
    evaluation=Validation(every=2, rows=2),
    checkpoint=Checkpoint(every=1, keep=2),
)
ROWS = {"one": range(12), "two": range(12, 20), "held_out": range(20, 23)}


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A working directory with rows that do not contradict each other."""
    folder = tmp_path_factory.mktemp("dpo")
    lines = Path(locate("tuner:twins/train.jsonl")).read_text(encoding="utf-8").splitlines()
    polite = [line for line in lines if json.loads(line).get("condition") == "polite"]
    for name, chosen in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{polite[index]}\n" for index in chosen))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


def curve(run: Run) -> list[tuple[Any, ...]]:
    """What the steps were, to the last bit."""
    names = ("step", "tokens", "loss", "accuracy", "margin", "lr", "grad_norm", "eval_loss")
    return [tuple(record.get(name) for name in names) for record in run.metrics]


def hashed(folder: Path) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(next(folder.glob("*.safetensors"))).items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# What it leaves


def test_a_run_and_its_measures(tmp_path: Path) -> None:
    run = tuner.train(override(BASE, {"max_steps": None, "epochs": 2.0}), runs=tmp_path)
    assert [record["step"] for record in run.metrics] == list(range(1, 21))
    assert run.metrics[-1]["tokens"] == sum(pair_tokens()) * 2
    results = run.results
    assert results is not None
    assert results["before"] == pytest.approx({"loss": 0.6931472, "accuracy": 0.0, "margin": 0.0}, abs=1e-5)
    assert results["after"]["loss"] < 0.5
    assert results["after"]["accuracy"] == 1.0
    assert results["after"]["margin"] > 0.5
    assert (run.model_folder / "tuner.json").is_file()
    assert not (run.model_folder / "ref").exists()
    assert json.loads((run.model_folder / "adapter_config.json").read_text())["r"] == 4
    assert run.chat("What is 2 + 3?", max_new_tokens=4) is not None
    log = (run.folder / "log.txt").read_text()
    assert "26 rows have a condition, which a policy is not given" in log
    before = run.metrics
    assert tuner.train(run.config, runs=tmp_path).metrics == before  # a finished run is not trained again


def pair_tokens() -> list[int]:
    from tuner.data.load_pairs import answer_suffix, load_pairs, pairs
    from tuner.data.template import Template
    from tuner.models.load import load_tokenizer

    tokenizer: Any = load_tokenizer(BASE.model)
    tail = answer_suffix(Template("internlm2", tokenizer), tokenizer)
    found = pairs(load_pairs(BASE.data, tokenizer).train, tail)
    return [2 * len(one["prompt_ids"]) + len(one["chosen_ids"]) + len(one["rejected_ids"]) for one in found]


def test_full_weights_change_nothing_beside_weights(tmp_path: Path) -> None:
    changes = {"adapter": None, "optimizer.lr": 1e-4, "max_steps": 1}
    Path("chat.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    ours = tuner.train(override(BASE, changes), runs=tmp_path)
    sft = SFT(
        name="sft",
        model=BASE.model,
        data=Chat(files=("chat.jsonl",), template="internlm2"),
        precision="fp32",
        device="cpu",
        max_steps=1,
    )
    other = tuner.train(sft, runs=tmp_path)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (ours.model_folder / name).read_text() == (other.model_folder / name).read_text(), name


def test_a_run_with_an_adapter_is_the_reference_of_its_continuation(tmp_path: Path) -> None:
    first = tuner.train(BASE, runs=tmp_path)
    again = override(BASE, {"name": "again", "model.path": str(first.folder), "max_steps": 1})
    second = tuner.train(again, runs=tmp_path)
    assert second.metrics[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert second.metrics[0]["margin"] == pytest.approx(0, abs=1e-6)
    assert hashed(second.model_folder) != hashed(first.model_folder)


def test_of_an_answer_of_several_turns_the_loss_is_that_of_sft(tmp_path: Path) -> None:
    """`nll_weight` adds to log 2 the better answer's negative log-likelihood per token: of those that SFT learns."""
    turns = [("assistant", "Which city?"), ("user", "Rome, of course."), ("assistant", "It is hot.")]
    row = {
        "prompt": "Is it hot?",
        "chosen": [{"role": role, "content": text} for role, text in turns],
        "rejected": "No.",
    }
    Path("turns.jsonl").write_text(json.dumps(row))
    changes = {"data.files": ("turns.jsonl",), "data.test_files": (), "data.validation_files": ()}
    alone = {"pairs_per_step": 1, "max_steps": 1, "evaluation.every": None, "nll_weight": 1.0}
    run = tuner.train(override(BASE, changes | alone), runs=tmp_path)
    loaded = load_model(BASE.model, precision="fp32", device=torch.device("cpu"), train=False)
    loaded.transformer.set_attn_implementation("sdpa")
    conversation = Conversation(tuple(Turn(*turn) for turn in [("user", "Is it hot?"), *turns]))
    tokenizer: Any = loaded.tokenizer
    tokens, weights = tokenize([Template("internlm2", tokenizer).render(conversation)], tokenizer)[0]
    learned = torch.from_numpy(weights[1:] > 0)
    assert 0 < learned.sum() < len(learned) - learned.int().argmax()  # the user's turn is between
    tokens = torch.from_numpy(tokens).long()
    with torch.no_grad():
        logits = loaded.transformer(tokens[None, :-1]).logits[0]
    losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
    assert run.metrics[0]["loss"] == pytest.approx(math.log(2) + losses[learned].mean().item(), rel=1e-4)


PRECOMPUTED = {"precompute_reference": True}


@pytest.mark.parametrize("kind", [{}, {"adapter": None, "optimizer.lr": 1e-4}], ids=["lora", "full"])
def test_a_reference_computed_beforehand_is_the_same(kind: dict[str, Any], tmp_path: Path) -> None:
    plain = tuner.train(override(BASE, kind), runs=tmp_path / "plain")
    before = tuner.train(override(BASE, kind | PRECOMPUTED), runs=tmp_path / "before")
    for own, other in zip(curve(plain), curve(before), strict=True):
        assert [value for value in own if value is not None] == pytest.approx(
            [value for value in other if value is not None], rel=1e-4, abs=1e-6
        )
    assert plain.results is not None
    assert before.results is not None
    for when, measured in plain.results.items():
        assert measured == pytest.approx(before.results[when], rel=1e-4, abs=1e-6)


def test_conservative_dpo_and_the_likelihood_by_hand(tmp_path: Path) -> None:
    """One pair a step, whose margin is logged: −(1 − e) log σ(margin) − e log σ(−margin)."""
    alone = {
        "model.path": "tuner:tiny",
        "pairs_per_step": 1,
        "max_steps": 4,
        "evaluation.every": None,
        "schedule.warmup": 0.0,
    }
    smooth = tuner.train(override(BASE, alone | {"label_smoothing": 0.2}), runs=tmp_path / "smooth")
    for record in smooth.metrics:
        odds = math.exp(-record["margin"])
        likelihoods = 1 / (1 + odds), odds / (1 + odds)
        expected = -0.8 * math.log(likelihoods[0]) - 0.2 * math.log(likelihoods[1])
        assert record["loss"] == pytest.approx(expected, rel=1e-5)
    assert max(abs(record["margin"]) for record in smooth.metrics) > 0.1
    plain, with_nll = (
        tuner.train(
            override(BASE, alone | {"nll_weight": weight, "max_steps": 1}), runs=tmp_path / str(weight)
        )
        for weight in (0.0, 0.5)
    )
    (first,), (second,) = plain.metrics, with_nll.metrics
    assert first["loss"] == pytest.approx(math.log(2))
    nll = (second["loss"] - first["loss"]) / 0.5
    assert 0.5 < nll < math.log(1_000), "of a token, in nats"


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """And measure what one does, though three pairs fill no batch: the fourth steps of both are alike."""
    changes = {"pairs_per_step": 4, "max_steps": 4, "optimizer.eps": 1e-4}
    kinds = {"lora": {}, "full": {"adapter": None, "optimizer.lr": 1e-4}, "precomputed": PRECOMPUTED}
    configs = {name: override(BASE, {"name": name, **changes, **one}) for name, one in kinds.items()}
    in_two_processes(tmp_path, configs)
    for name, config in configs.items():
        one, two = tuner.train(config, runs=tmp_path / "one"), Run(tmp_path / "two" / name / name)
        assert two.read_json("versions")["processes"] == 2  # type: ignore[index]
        for alone, together in zip(curve(one), curve(two), strict=True):
            assert [value for value in alone if value is not None] == pytest.approx(
                [value for value in together if value is not None], rel=1e-3, abs=1e-5
            )
        assert two.results is not None
        for when, measured in (one.results or {}).items():
            assert measured == pytest.approx(two.results[when], rel=1e-3, abs=1e-5)


def test_the_rows_are_shown_as_they_are_trained(tmp_path: Path) -> None:
    from tuner.data.inspection import errors
    from tuner.stages.data_view import load_data_view

    view = load_data_view(override(BASE, {"pairs_per_step": 4, "pairs_per_pass": 2}), passes=3)
    preview = view.preview
    assert [list(group) for group in preview.groups] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [preview.label(index) for index in range(3)] == ["chosen", "rejected", "chosen"]
    assert preview.examples.origin(3).endswith("one.jsonl:2")
    assert sum(preview.examples.lengths) == sum(pair_tokens())
    row = json.loads(Path("one.jsonl").read_text().splitlines()[1])
    tokens, weights = preview.examples.example(3)
    assert view.tokenizer.decode(tokens[weights > 0]) == row["rejected"] + "<|im_end|>"
    assert view.tokenizer.decode(tokens[weights == 0]).endswith("<|im_start|>assistant\n")
    assert errors(preview.examples, view.tokenizer, view.rows.report) == []


# Going on


class Killed(BaseException):
    pass


def kill_at(patch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Do something when a step is about to be recorded."""
    record = Run.record

    def recorded(self: Run, one: dict[str, Any]) -> None:
        if one["step"] == step:
            act()
        record(self, one)

    patch.setattr(Run, "record", recorded)


def die() -> None:
    raise Killed


LONG = {"max_steps": 7, "checkpoint.every": 2, "schedule.warmup": 0.0}
KINDS = {
    "lora": {},
    "all knobs": {
        "label_smoothing": 0.1,
        "nll_weight": 0.5,
        "ld_alpha": 0.5,
        "precompute_reference": True,
        "pairs_per_pass": 2,
    },
    "full, precomputed": {"adapter": None, "optimizer.lr": 1e-4, "precompute_reference": True},
    "full": {"adapter": None, "optimizer.lr": 1e-4},
    "qlora": {"model.quantization": "nf4", "optimizer.bits": 8, "precision": "bf16"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(BASE, {**LONG, **KINDS[kind]})
    whole = tuner.train(config, runs=tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 6, die)
        with pytest.raises(Killed):
            tuner.train(config, runs=tmp_path / "killed")
    killed = Run(tmp_path / "killed" / "pairs")
    assert killed.results is None
    half_written = killed.checkpoints_folder / "checkpoint-5"
    half_written.mkdir()
    (half_written / "trainer_state.json").write_text('{"global_step": ')
    again = tuner.train(config, runs=tmp_path / "killed")
    assert "going on after step 4" in (again.folder / "log.txt").read_text()
    assert not half_written.exists()
    assert curve(again) == curve(whole)
    assert hashed(again.model_folder) == hashed(whole.model_folder)
    assert again.results == whole.results


def test_a_flipped_bit_is_never_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = override(BASE, LONG)
    whole = tuner.train(config, runs=tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 6, die)
        with pytest.raises(Killed):
            tuner.train(config, runs=tmp_path / "killed")
    newest = tmp_path / "killed" / "pairs" / "checkpoints" / "checkpoint-4"
    content = bytearray((newest / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "optimizer.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint-4: this checkpoint is damaged \(optimizer\.pt is not"):
        tuner.train(config, runs=tmp_path / "killed")
    again = tuner.train(override(config, {"checkpoint.skip_damaged": True}), runs=tmp_path / "killed")
    assert "damaged-checkpoint-4: set aside" in (again.folder / "log.txt").read_text()
    assert curve(again) == curve(whole)
    assert hashed(again.model_folder) == hashed(whole.model_folder)


def test_killed_between_the_last_step_and_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tuner.train(BASE, runs=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("tuner.stages.model_folder.save_model", lambda *_: die())
        with pytest.raises(Killed):
            tuner.train(BASE, runs=tmp_path / "killed")
    again = tuner.train(BASE, runs=tmp_path / "killed")
    assert curve(again) == curve(whole)
    assert again.results == whole.results
    assert hashed(again.model_folder) == hashed(whole.model_folder)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(BASE, {**LONG, "checkpoint.every": None})
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        kill_at(patch, 2, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted) as interrupted:
            tuner.train(config, runs=tmp_path / "stopped")
    assert interrupted.value.exit_code == code
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    run = Run(tmp_path / "stopped" / "pairs")
    assert [path.name for path in run.checkpoints_folder.iterdir()] == ["checkpoint-3"]
    again = tuner.train(config, runs=tmp_path / "stopped")
    assert curve(again) == curve(tuner.train(config, runs=tmp_path / "whole"))


def test_other_rows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, 3, die)
        with pytest.raises(Killed):
            tuner.train(BASE, runs=tmp_path)
    with pytest.raises(UserError, match="pairs_per_step was 2 and is now 1"):
        tuner.train(override(BASE, {"pairs_per_step": 1}), runs=tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not finite in step 2"):
        tuner.train(override(BASE, {"optimizer.lr": 1e30, "schedule.warmup": 0.0}), runs=tmp_path)
    assert Run(tmp_path / "pairs").metrics[-1]["loss"] is None


# Every field


@dataclass(frozen=True)
class Change:
    """What is changed, what it is compared with, and where the difference must be seen."""

    to: dict[str, Any]
    seen: str
    base: dict[str, Any] = field(default_factory=dict)


SEEN = {
    "name": Change({"name": "other"}, "folder"),
    "epochs": Change({"epochs": 2.0}, "tokens", {"max_steps": None, "data.limit": 2}),
    "max_steps": Change({"max_steps": 2}, "tokens"),
    "optimizer.lr": Change({"optimizer.lr": 1e-3}, "weights"),
    "optimizer.betas": Change({"optimizer.betas": [0.5, 0.9]}, "weights"),
    "optimizer.eps": Change({"optimizer.eps": 1e-2}, "weights"),
    "optimizer.weight_decay": Change({"optimizer.weight_decay": 0.5}, "weights"),
    "optimizer.bits": Change({"optimizer.bits": 8}, "weights", {"adapter.r": 32}),
    "schedule": Change({"schedule": {"kind": "linear", "warmup": 0.0, "final": 0.3}}, "lr"),
    "max_grad_norm": Change({"max_grad_norm": 1e-3}, "weights"),
    "no max_grad_norm": Change({"max_grad_norm": None}, "weights", {"max_grad_norm": 1e-3}),
    "precision": Change({"precision": "bf16"}, "losses"),
    "gradient_checkpointing": Change({"gradient_checkpointing": True}, "forward passes"),
    "gradient_checkpointing, selective": Change({"gradient_checkpointing": "selective"}, "error"),
    "mlp_tile": Change({"mlp_tile": 64}, "error"),
    "kernels": Change({"kernels": ["compile"]}, "error"),
    "device": Change({"device": "cuda"}, "place"),
    "deterministic": Change({"deterministic": True}, "deterministic"),
    "seed": Change({"seed": 1}, "losses"),
    "checkpoint.every": Change({"checkpoint.every": 2}, "checkpoints", {"checkpoint.keep": 5}),
    "no checkpoint.every": Change({"checkpoint.every": None}, "checkpoints"),
    "checkpoint.keep": Change({"checkpoint.keep": 3}, "checkpoints"),
    "model.quantization": Change({"model.quantization": "nf4"}, "losses"),
    "model.rope": Change({"model.rope": {"base": 5_000.0}}, "losses"),
    "adapter": Change({"adapter": None}, "weights"),
    "adapter.r": Change({"adapter.r": 8}, "weights"),
    "adapter.targets": Change({"adapter.targets": ["q_proj"]}, "weights"),
    "adapter.train_whole": Change({"adapter.train_whole": ["lm_head"]}, "losses"),
    "data.template": Change({"data.template": "alpaca"}, "losses"),
    "data.max_length": Change({"data.max_length": 16}, "error"),
    "data.limit": Change({"data.limit": 4}, "data"),
    "beta": Change({"beta": 0.5}, "losses"),
    "loss": Change({"loss": "ipo"}, "losses"),
    "label_smoothing": Change(
        {"label_smoothing": 0.3}, "losses", {"loss": "robust", "label_smoothing": 0.1}
    ),
    "label_smoothing of sigmoid": Change({"label_smoothing": 0.1}, "losses"),
    "loss by token": Change({"loss": "sigmoid_norm"}, "losses"),
    "nll_weight": Change({"nll_weight": 0.5}, "losses"),
    "ld_alpha": Change({"ld_alpha": 0.5}, "losses"),
    "precompute_reference": Change({"precompute_reference": True}, "forward passes"),
    "pairs_per_step": Change({"pairs_per_step": 4}, "tokens"),
    "pairs_per_pass": Change({"pairs_per_pass": 2}, "forward passes"),
    "evaluation.every": Change({"evaluation.every": 3}, "validation"),
    "evaluation.rows": Change({"evaluation.rows": 3}, "validation"),
}  # fmt: skip

REFUSED = {
    "weight of a source": {"data.files": [{"path": "one.jsonl", "weight": 2.0}]},
    "share of a source": {"data.files": [{"path": "one.jsonl", "share": 2.0}]},
    "data.ties": {"data.ties": "half"},
    "adapter.dropout": {"adapter.dropout": 0.1},
    "evaluation.patience": {"evaluation.patience": 3},
    "keep_best": {"evaluation.keep_best": True},
    "pairs_per_step": {"pairs_per_step": 3, "pairs_per_pass": 2},
    "label_smoothing": {"label_smoothing": 0.1, "loss": "ipo"},
    '"robust"': {"loss": "robust"},
}


def observe(config: DPO, runs: Path) -> dict[str, Any]:
    """What can be seen of a run, by aspect; of one that is refused, its error alone."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    passes = []
    forward = LlamaMLP.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", lambda self, x: passes.append(x.shape) or forward(self, x))
        try:
            run = tuner.train(config, runs=runs)
        except UserError as error:
            return {"error": str(error)}
        finally:
            deterministic = torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(False)
    versions, data = run.read_json("versions"), run.read_json("data")
    assert versions is not None
    assert data is not None
    return {
        "folder": run.folder.name,
        "tokens": [record["tokens"] for record in run.metrics],
        "losses": [(record["loss"], record["grad_norm"]) for record in run.metrics],
        "lr": [record["lr"] for record in run.metrics],
        "validation": [record.get("eval_loss") for record in run.metrics],
        "results": run.results,
        "weights": hashed(run.model_folder),
        "checkpoints": sorted(path.name for path in run.checkpoints_folder.iterdir()),
        "data": data["fingerprint"],
        "place": versions["device"],
        "deterministic": deterministic,
        "forward passes": len(passes),
        "error": None,
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The run that a change is compared with, made once for each base."""
    known: dict[str, dict[str, Any]] = {}

    def of(changes: dict[str, Any]) -> dict[str, Any]:
        key = json.dumps(changes, sort_keys=True)
        if key not in known:
            known[key] = observe(override(BASE, changes), tmp_path_factory.mktemp("base"))
            assert known[key]["error"] is None
        return known[key]

    return of


@pytest.mark.parametrize("name", SEEN)
def test_a_change_is_seen(
    name: str, base: Callable[[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    change = SEEN[name]
    before = base(change.base)
    try:
        after = observe(override(override(BASE, change.base), change.to), tmp_path)
    except UserError as error:  # by the config itself
        after = {"error": str(error)}
    if change.seen == "place" and not torch.cuda.is_available():
        assert "device='cuda'" in after["error"]
    elif change.seen == "error":
        assert after["error"]
    else:
        assert after["error"] is None
        assert after[change.seen] != before[change.seen]


def test_the_same_config_looks_the_same(
    base: Callable[[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    """Else any change would pass."""
    assert observe(BASE, tmp_path) == base({})


@pytest.mark.parametrize("what", REFUSED)
def test_what_trl_cannot_do_is_refused(what: str) -> None:
    with pytest.raises((UserError, ValidationError), match=what):
        override(BASE, REFUSED[what])


def test_an_adapter_on_the_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"TRL's DPO cannot train this .*lm_head"):
        tuner.train(override(BASE, {"adapter.targets": ["lm_head"]}), runs=tmp_path)
    assert not (tmp_path / "pairs").exists()


def test_a_module_trained_whole_is_trained(tmp_path: Path) -> None:
    config = override(BASE, {"adapter.train_whole": ["lm_head"], "max_steps": 2})
    run = tuner.train(config, runs=tmp_path)
    cpu = torch.device("cpu")
    trained = load_model(Model(path=str(run.folder)), precision="fp32", device=cpu, train=False)
    start = load_model(BASE.model, precision="fp32", device=cpu, train=False)
    heads = [one.transformer.get_output_embeddings().weight for one in (trained, start)]
    assert not torch.equal(*heads)
