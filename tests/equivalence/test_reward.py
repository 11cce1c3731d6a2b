"""Reward models: a run that is killed, split, shared out or begun elsewhere is the run it would have been."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tuner
from tests.equivalence.conftest import SHALLOW, SMALL, curve, in_two_processes, weights
from tests.equivalence.test_resume import Killed, kill_at
from tests.equivalence.test_same_result import assert_close
from tuner.config import AdamW, FocalRanking, LoRA, Model, Preferences, RewardModel, override
from tuner.errors import UserError
from tuner.models.load import load_model
from tuner.models.merge import merge
from tuner.stages.run import Run

CPU = torch.device("cpu")
CONDITIONS = ("brief", "detailed", "polite", "blunt", "json", "plain")
REWARD = RewardModel(
    name="small",
    model=Model(path=SHALLOW),
    adapter=LoRA(r=8, alpha=16),
    conditions={name: f"tuner:twins/{name}.txt" for name in CONDITIONS},
    data=Preferences(files=("tuner:twins/train.jsonl",), template="internlm2", max_length=256, limit=40),
    optimizer=AdamW(lr=5e-3, eps=1e-4, weight_decay=0.01),
    tokens_per_step=512,
    tokens_per_pass=512,
    max_steps=4,
    precision="fp32",
    gradient_checkpointing=False,
)
FULL = {"adapter": None, "optimizer.lr": 1e-3}
NF4 = {"model.quantization": "nf4"}
TESTED = {"data.test_files": [{"path": "tuner:twins/test.jsonl", "limit": 16}]}
BEST = {"data.split.validation": 0.3, "evaluation.every": 1, "evaluation.keep_best": True}


@pytest.fixture
def reward() -> Callable[..., RewardModel]:
    """The config with some leaves changed."""
    return lambda changes=None: override(REWARD, changes or {})


def assert_same(one, other):
    """To the last bit: steps, held-out rows, weights, results, and what the model says of itself."""
    assert curve(one) == curve(other)
    names = {name for record in one.metrics for name in record} - {
        "seconds",
        "tokens_per_second",
        "memory_gib",
    }
    for own, their in zip(one.metrics, other.metrics, strict=True):
        assert {name: own.get(name) for name in names} == {name: their.get(name) for name in names}
    assert weights(one).keys() == weights(other).keys()
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())
    for name in ("results.json", "model/reward.json"):
        assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes()


@pytest.mark.parametrize(
    "kind",
    [
        {"adapter.dropout": 0.1, **TESTED},
        FULL,
        {"adapter.dropout": 0.1, "optimizer.lr": 0.1, **NF4, **BEST},
    ],
    ids=["lora", "full", "qlora-keep-best"],
)
def test_killed_at_every_step(reward, train, kind):
    """One run, killed in turn before or after each of its steps is saved."""
    config = reward({"checkpoint.every": 1, **kind})
    whole = train(config, "whole")
    for step in range(config.max_steps):
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, step, before_finish=step % 2 == 0)
            with pytest.raises(Killed):
                train(config, "killed")
    resumed = train(config, "killed")
    assert [record["step"] for record in resumed.metrics] == [1, 2, 3, 4]
    assert_same(whole, resumed)
    if "evaluation.keep_best" in kind:
        best = int(np.argmin([record["eval_loss"] for record in whole.metrics])) + 1
        assert best < 4  # else nothing has to be put back
        saved = load_file(whole.checkpoints_folder / f"step_{best:06d}" / "trained.safetensors")
        head = weights(whole)["base_model.model.score.weight"]
        assert torch.equal(head, saved["base_model.model.score.modules_to_save.default.weight"])


@pytest.mark.parametrize("kind", [{"adapter.dropout": 0.1}, NF4], ids=["lora", "qlora"])
def test_checkpointing_changes_no_bit(reward, train, kind):
    off, on = (train(reward(kind | {"gradient_checkpointing": flag}), str(flag)) for flag in (False, True))
    assert_same(off, on)


@pytest.mark.parametrize("kind", [FULL, NF4], ids=["full", "qlora"])
def test_any_pass_size(reward, train, kind):
    kind = kind | {"tokens_per_step": 1024, "tokens_per_pass": 1024}
    whole = train(reward(kind), "whole")
    assert {record["passes"] for record in whole.metrics} == {1}
    parts = train(reward(kind | {"data.max_length": 128, "tokens_per_pass": 256}), "parts")
    assert min(record["passes"] for record in parts.metrics) >= 4
    assert_close(whole, parts)


def test_twice_is_the_same_and_another_seed_another(reward, train):
    one, two = (train(reward({"adapter.dropout": 0.1}), place) for place in ("one", "two"))
    assert_same(one, two)
    assert curve(one) != curve(train(reward({"adapter.dropout": 0.1, "seed": 1}), "seed"))


def test_two_processes_equal_one(reward, train, tmp_path):
    """Three runs in one launch: with held-out rows and a report card, all weights, and a rank that has no pass."""
    small = {"data.max_length": 128, "tokens_per_pass": 256}
    cases = {
        "lora": reward(small | TESTED | {"data.split.validation": 0.3, "evaluation.every": 2}),
        "full": reward(small | FULL),
        "idle": reward(small | {"tokens_per_step": 256}),
    }
    in_two_processes(tmp_path, cases, env={"TUNER_CACHE": str(tmp_path / "cache")})
    for name, config in cases.items():
        one, two = train(config, f"one/{name}"), Run(tmp_path / "two" / name / "small")
        assert two.read_json("versions")["processes"] == 2
        assert_close(one, two)
    assert {record["passes"] for record in two.metrics} == {1}  # idle: nothing for the second rank
    one, two = (Run(tmp_path / place / "lora" / "small") for place in ("one", "two"))
    for own, their in zip(one.metrics, two.metrics, strict=True):
        measures = [
            name for name in ("eval_loss", "eval_accuracy", "accuracy", "score", "margin") if name in own
        ]
        assert [own[name] for name in measures] == pytest.approx(
            [their[name] for name in measures], rel=1e-3, abs=1e-4
        )
    assert one.results["reference"] == pytest.approx(two.results["reference"], rel=1e-3, abs=1e-4)
    assert one.results["overall"]["margin"] == pytest.approx(two.results["overall"]["margin"], abs=1e-3)


def test_a_finished_run_is_not_trained_again(reward, train):
    run = train(reward({"max_steps": 1}))
    before = (run.folder / "metrics.jsonl").stat().st_mtime_ns
    assert train(reward({"max_steps": 1})).results == run.results
    assert (run.folder / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditions": {"brief": "Be brief."}}, r"conditions.* was .* and is now"),
        ({"reward_token": "[UNUSED_TOKEN_131]"}, "reward_token was .*130.* and is now .*131"),
        ({"loss.gamma": 1.0}, r"loss\.gamma was 2\.0 and is now 1\.0"),
    ],
)
def test_what_is_learned_may_not_change(reward, train, changes, message):
    config = reward({"max_steps": 1})
    train(config)
    with pytest.raises(UserError, match=message):
        train(reward({"max_steps": 1, **changes}))


def test_a_changed_wording_in_a_file_is_refused(reward, train, tmp_path):
    """The config names the file; what it says is part of the data."""
    folder = tmp_path / "wordings"
    folder.mkdir()
    for name in CONDITIONS:
        (folder / f"{name}.txt").write_text(f"Be {name}.\nOnly {name} answers win.\n")
    conditions = {name: str(folder / f"{name}.txt") for name in CONDITIONS}
    config = reward({"conditions": conditions, "checkpoint.every": 1})
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 1, before_finish=True)
        with pytest.raises(Killed):
            train(config)
    (folder / "brief.txt").write_text("Make it short.\nOnly brief answers win.\n")
    with pytest.raises(UserError, match="the data changed since this run began"):
        train(config)


# What a run begins with


def first_step(run):
    return run.metrics[0]


def begins_at_zero(run, loss=FocalRanking()):  # noqa: B008 (frozen)
    """Every score is 0, so the loss is log 2 and the barrier's value there."""
    first = first_step(run)
    assert first["score"] == first["margin"] == 0
    assert first["accuracy"] == 0.5
    assert first["ranking"] == pytest.approx(math.log(2), rel=1e-6)
    assert first["penalty"] == pytest.approx(-loss.barrier * 2 * math.log(loss.bound), rel=1e-6)
    assert first["loss"] == pytest.approx(0.628770, abs=1e-6)


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> dict[str, Run]:
    """Runs that others begin with, of one or two steps."""
    folder = tmp_path_factory.mktemp("begun")
    language = {"max_steps": 2, "data.limit": 60}
    two = {"max_steps": 2}

    def train(config, name, changes):
        return tuner.train(override(config, {"name": name, **changes}), runs=folder)

    return {
        "sft": train(SMALL, "sft", language),
        "sft-nf4": train(SMALL, "sft-nf4", language | NF4),
        "sft-full": train(SMALL, "sft-full", language | FULL),
        "sft-head": train(SMALL, "sft-head", language | {"adapter.train_whole": ["lm_head"]}),
        "sft-embedding": train(SMALL, "sft-embedding", language | {"adapter.train_whole": ["embed_tokens"]}),
        "reward": train(REWARD, "reward", two),
        "reward-nf4": train(REWARD, "reward-nf4", two | NF4),
        "reward-full": train(REWARD, "reward-full", two | FULL),
    }


@pytest.mark.parametrize(
    ("start", "changes"),
    [
        ("base", {}),
        ("base", FULL),
        ("base", NF4),
        ("sft", {}),
        ("sft-nf4", {}),
        ("sft-full", {}),
        ("sft-full", FULL),
        ("sft-full", NF4),
        ("sft-embedding", {"adapter.train_whole": ["embed_tokens"]}),
    ],
)
def test_a_language_model_gets_a_zero_head(reward, train, begun, start, changes):
    path = SHALLOW if start == "base" else str(begun[start].folder)
    run = train(reward({"model.path": path, "max_steps": 1, **changes}))
    begins_at_zero(run)
    assert first_step(run)["grad_norm"] > 0


@pytest.mark.parametrize("start", ["sft", "sft-nf4", "sft-embedding"])
def test_an_sft_adapter_is_copied_and_goes_on(begun, start):
    """The reward model's hidden states are the language model's, its weights the adapter's and a head."""
    run = begun[start]
    path = Model(path=str(run.folder))
    language = load_model(path, precision="fp32", device=CPU, train=False)
    scored = load_model(path, precision="fp32", device=CPU, head="score")
    trained = {name for name, weight in scored.model.named_parameters() if weight.requires_grad}
    saved = load_file(run.model_folder / "adapter_model.safetensors")
    assert len(trained) == len(saved) + 1
    state = dict(scored.model.named_parameters())
    for name, weight in saved.items():
        inside = name.replace(".weight", ".default.weight") if "lora" in name else None
        inside = inside or name.replace("embed_tokens.", "embed_tokens.modules_to_save.default.")
        assert torch.equal(state[inside], weight)
    tokens = torch.arange(20, 60)[None]
    for loaded in (language, scored):
        loaded.transformer.set_attn_implementation("sdpa")
    with torch.no_grad():
        states = [one.transformer.get_decoder()(tokens).last_hidden_state for one in (language, scored)]
    assert torch.equal(*states)
    assert not scored.transformer.score.weight.any()


@pytest.mark.parametrize(
    ("start", "changes"),
    [
        ("reward", {}),
        ("reward-nf4", {}),
        ("reward-full", FULL),
        ("reward-full", {}),
        ("reward-full", NF4),
        ("merged", FULL),
    ],
)
def test_a_reward_run_goes_on_with_its_head(reward, train, begun, tmp_path, start, changes):
    """Its first step scores what the finished run scores, on the same rows."""
    if start == "merged":
        path = tmp_path / "merged"
        merge(begun["reward"].folder, path, dtype="fp32", texts=["How much is 12 + 7? It is 19. " * 40])
        source = begun["reward"]
    else:
        source, path = begun[start], begun[start].folder
    run = train(reward({"model.path": str(path), "max_steps": 1, **changes}))
    if changes.get("model.quantization"):  # another base: but not a fresh head
        assert abs(first_step(run)["margin"]) > 1e-4
        return
    config = override(source.config, {"max_steps": 1, "model.path": str(source.folder)})
    expected = mean_score(config, source)
    assert first_step(run)["score"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert abs(expected) > 1e-4  # a fresh head scores 0


def mean_score(config, source):
    """Of the answers of a config's first step, by a model that is only used."""
    from tuner.models.scorer import score_sequences
    from tuner.stages.data_view import load_rows
    from tuner.stages.packed_rows import plan

    data = load_rows(config)
    sequences = data.train.sequences
    answers = data.train.answers(plan(config, data).steps[0].samples)
    loaded = load_model(
        Model(path=str(source.folder)), precision="fp32", device=CPU, train=False, head="score"
    )
    tokens = [sequences.example(index)[0] for index in answers.tolist()]
    return score_sequences(loaded.model, tokens, 512, CPU).mean()


@pytest.mark.parametrize("start", ["reward", "reward-full"])
def test_a_language_stage_refuses_a_reward_model(small, train, begun, start):
    changes = {} if start == "reward" else FULL
    with pytest.raises(UserError, match="this is a reward model, and a language model is needed"):
        train(small({"model.path": str(begun[start].folder), **changes}))


def test_a_language_head_of_an_adapters_own_is_refused(reward, train, begun, tmp_path):
    run = begun["sft-head"]
    with pytest.raises(UserError, match=r"a language head of its own.*`tuner merge` the run first"):
        train(reward({"model.path": str(run.folder), "adapter.train_whole": ["lm_head"]}))
    merged = tmp_path / "merged"
    merge(run.folder, merged, dtype="fp32", texts=["How much is 12 + 7? It is 19. " * 40])
    begins_at_zero(train(reward({"model.path": str(merged), "max_steps": 1})))


def test_a_reward_adapter_needs_its_head(reward, train, begun, tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "model"
    shutil.copytree(begun["reward"].model_folder, folder)
    file = folder / "adapter_model.safetensors"
    saved = load_file(file)
    save_file({name: weight for name, weight in saved.items() if "score" not in name}, file)
    with pytest.raises(UserError, match=r"1 missing weights, such as base_model\.model\.score\.weight"):
        train(reward({"model.path": str(folder)}))


def test_continuing_does_not_lengthen_what_peft_notes(begun, tmp_path):
    """peft adds its names for heads whenever a folder is loaded."""
    from tuner.models.save import save_model

    folder = begun["reward"].model_folder
    before = json.loads((folder / "adapter_config.json").read_text())["modules_to_save"]
    save_model(load_model(Model(path=str(folder)), precision="fp32", device=CPU, head="score"), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == before


def test_the_logged_figures_are_those_of_the_run_itself(reward, train):
    """Loss, accuracy, lead and mean score of a step, from scores by transformers' own forward before it."""
    from tuner.stages.data_view import load_rows
    from tuner.stages.packed_rows import plan

    config = reward({"loss.gamma": 2.0, "max_steps": 3, "checkpoint.every": 1, "checkpoint.keep": 5})
    run = train(config)
    loaded = load_model(config.model, precision="fp32", device=CPU, adapter=config.adapter, head="score")
    saved = load_file(run.checkpoints_folder / "step_000002" / "trained.safetensors")
    state = dict(loaded.model.named_parameters())
    with torch.no_grad():
        for name, weight in saved.items():
            state[name].copy_(weight)
    loaded.transformer.set_attn_implementation("sdpa")
    data = load_rows(config)
    sequences, rows = data.train.sequences, plan(config, data).steps[2].samples
    scores = np.array([plain_score(loaded.model, sequences.example(i)[0]) for i in data.train.answers(rows)])
    chosen, rejected = scores[0::2], scores[1::2]  # twins: two answers to a row, the better first
    chance = 1 / (1 + np.exp(rejected - chosen))
    ranking = (-((1 - 2 * np.maximum(0, chance - 0.5)) ** 2) * np.log(chance)).mean()
    penalty = -0.02 * (np.log(5 + scores) + np.log(5 - scores)).mean()
    expected = {
        "ranking": ranking,
        "penalty": penalty,
        "loss": ranking + penalty,
        "accuracy": (chosen > rejected).mean(),
        "margin": (chosen - rejected).mean(),
        "score": scores.mean(),
        "pairs": len(rows),
        "answers": 2 * len(rows),
    }
    for name, value in expected.items():
        assert run.metrics[2][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@torch.no_grad()
def plain_score(model, tokens):
    """Of one sequence, by transformers' sequence classification."""
    return model(input_ids=torch.tensor(tokens)[None].long(), use_cache=False).logits.item()


def test_every_file_of_a_reward_run_is_there(reward, train):
    run = train(reward({"max_steps": 1, **TESTED}))
    names = {path.name for path in Path(run.folder).iterdir()}
    assert {"report.json", "report.html", "results.json", "metrics.jsonl", "model"} <= names
    assert {"reward.json", "chat_template.jinja", "tuner.json"} <= {
        p.name for p in run.model_folder.iterdir()
    }
