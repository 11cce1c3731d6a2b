"""The script that measures GPUs (benchmarks/gpu), without one: what it does with cases, and its cases in small."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import attention, correctness, shapes
from benchmarks.gpu.attention import by_flash
from benchmarks.gpu.case import Case, Measurement, NotHereError, Place, at_least, at_most
from benchmarks.gpu.catalog import CASES
from benchmarks.gpu.rows import END, Rows, surroundings
from benchmarks.gpu.runner import Runner
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.training import measure_training
from tests.conftest import ROOT
from tests.gpu.test_emulated import flash_2, torch_2_11
from tuner.config import Model
from tuner.data.load_examples import load_examples
from tuner.data.load_prompts import load_prompts
from tuner.models.load import load_model, load_tokenizer
from tuner.stages.data_view import load_rows
from tuner.stages.packed_rows import plan

SCRIPT = ROOT / "benchmarks" / "gpu" / "run.py"
HERE = surroundings(on_gpu=False, is_dry=True)
CPU = torch.device("cpu")


def two_values(place):
    yield Measurement("size", 2.0, "GiB", predicted=1.5)
    yield Measurement("speed", 3.0, "tokens/s")


def fails(place):
    yield Measurement("size", 2.0, "GiB")
    raise RuntimeError("the card\nsays no")


def crashes(place):
    yield Measurement("size", 2.0, "GiB")
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(place):
    child = subprocess.Popen(["sleep", "600"])
    (place.models / "sleeper").write_text(str(child.pid))
    yield Measurement("size", 2.0, "GiB")
    time.sleep(600)


def is_not_here(place):
    raise NotHereError("the library is not installed")
    yield


def doubles(place):
    yield Measurement("speed", 2 * place.earlier["right.a", "speed"], "tokens/s")


@pytest.fixture
def run(tmp_path):
    """Run cases in a call of their own; returns its rows. All calls share a file."""

    def ran(*cases, seconds=100.0, here=HERE, names=None, again=False):
        rows = Rows(tmp_path / "measured.jsonl", here)
        place = Place(CPU, here.is_dry, tmp_path, tmp_path)
        by_name = {case.name: case for case in cases}
        runner = Runner(by_name, rows, place, tmp_path, time.monotonic() + seconds)
        return rows, runner.run(names or list(by_name), again=again)

    return ran


def outcomes(rows: Rows) -> dict[str, str]:
    return {row["case"]: row["outcome"] for row in rows.new if row["name"] == END}


def test_a_row_says_all_that_decides_a_value(run, tmp_path):
    bounds = {"size": at_most(1.9), "speed": at_least(3)}
    run(Case("right.a", "", two_values, 1, bounds))
    size, speed, end = map(json.loads, (tmp_path / "measured.jsonl").read_text().splitlines())
    assert (size["measured_gib"], size["predicted_gib"], size["limit"], size["ok"]) == (
        2,
        1.5,
        "≤ 1.9",
        False,
    )
    assert (speed["value"], speed["unit"], speed["ok"]) == (3, "tokens/s", True)
    assert (end["name"], end["outcome"], end["error"]) == (END, "measured", None)
    for row in (size, speed, end):
        assert row.keys() >= {
            "date",
            "card",
            "driver",
            "versions",
            "commit",
            "code",
            "command",
            "case",
            "dry",
        }
        assert row["versions"]["torch"] == torch.__version__


def test_a_value_that_is_no_number_is_in_no_bound():
    assert not at_most(1).holds(math.nan)
    assert not at_least(1).holds(math.nan)


def test_sizes_of_a_dry_run_are_not_judged(run):
    rows, _ = run(Case("memory.a", "", two_values, 1, {"size": at_most(0)}))
    assert [row["ok"] for row in rows.new] == [None, None, None]


@pytest.mark.parametrize(
    ("measure", "error"),
    [(fails, "RuntimeError: the card says no"), (crashes, "its process ended by signal SIGKILL")],
)
def test_a_case_that_fails_has_a_row_and_the_others_go_on(run, measure, error):
    rows, _ = run(Case("right.a", "", measure, 1), Case("right.b", "", two_values, 1))
    assert outcomes(rows) == {"right.a": "failed", "right.b": "measured"}
    first, end = rows.new[:2]
    assert (first["name"], first["value"]) == ("size", 2.0)  # measured before it
    assert end["error"] == error


def test_a_case_that_hangs_is_stopped_with_what_it_has_started(run, tmp_path):
    rows, _ = run(Case("right.a", "", hangs, 1), seconds=8)
    assert rows.new[0]["value"] == 2.0
    assert outcomes(rows) == {"right.a": "failed"}
    assert rows.new[1]["error"].startswith("stopped after")
    sleeper = Path("/proc", (tmp_path / "sleeper").read_text(), "stat")
    deadline = time.monotonic() + 10
    while sleeper.is_file() and sleeper.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_is_missing_is_no_failure(run):
    rows, _ = run(
        Case("right.a", "", is_not_here, 1),
        Case("right.b", "", two_values, 1, needs=("no_such_module.inside",)),
    )
    assert outcomes(rows) == {"right.a": "not installed", "right.b": "not installed"}
    errors = [row["error"] for row in rows.new]
    assert errors == ["the library is not installed", "no_such_module.inside cannot be imported"]


def test_a_later_call_goes_on(run):
    cases = (Case("right.a", "", two_values, 1), Case("right.b", "", fails, 1))
    run(cases[0])
    assert outcomes(run(*cases)[0]) == {"right.b": "failed"}
    assert outcomes(run(*cases)[0]) == {}
    assert outcomes(run(*cases, names=["right.b"], again=True)[0]) == {"right.b": "failed"}


@pytest.mark.parametrize("changes", [{"card": "another"}, {"code": "another"}, {"is_dry": False}])
def test_what_was_measured_elsewhere_is_measured_again(run, changes):
    case = Case("right.a", "", two_values, 1)
    run(case, here=replace(HERE, **changes))
    assert outcomes(run(case)[0]) == {"right.a": "measured"}


def test_a_case_that_does_not_fit_is_left_for_a_later_call(run):
    here = replace(HERE, is_dry=False)
    long, short = Case("right.long", "", two_values, 50), Case("right.short", "", two_values, 10)
    rows, left = run(long, short, seconds=40, here=here)
    assert left == ["right.long"]
    assert outcomes(rows) == {"right.short": "measured"}
    # a model that is still to be made takes its time as well
    shaped = replace(short, name="right.shaped", shapes=("internlm2_20b",))
    assert run(shaped, seconds=60, here=here)[1] == ["right.shaped"]


def test_values_that_are_compared_are_of_one_call(run):
    """What a case is compared with is measured again in its call, and its time counts."""
    case = Case("compare.a", "", doubles, 1, beside=("right.a",))
    first = Case("right.a", "", two_values, 30)
    run(first)
    rows, _ = run(first, case)
    assert outcomes(rows) == {"right.a": "measured", "compare.a": "measured"}
    assert rows.values["compare.a", "speed"] == 6.0
    here = replace(HERE, is_dry=False)
    run(first, here=here)
    assert run(first, case, here=here, seconds=20)[1] == ["compare.a"]


# Cases


def flash_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
            softmax_scale=None, causal=False, qv=None, window_size=(-1, -1), deterministic=False):  # fmt: skip
    return flash_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal)


def flash_4(q, k, v, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, seqused_q=None, page_table=None,
            softmax_scale=None, causal=False, window_size=(None, None), deterministic=False):  # fmt: skip
    longest = int(cu_seqlens_q.diff().max())
    out = flash_2(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, longest, causal=causal)
    return out, None  # and the logsumexp


def leaking(q, k, v, offsets, longest):
    """Attention over the whole row, whatever the samples are."""
    return attention._sdpa(q, k, v, offsets[[0, -1]], longest)


def measured_attention(monkeypatch, tmp_path, attend) -> dict[str, float]:
    monkeypatch.setattr(attention, "_attend", lambda backend, place: attend)
    place = Place(CPU, True, tmp_path, tmp_path)
    return {value.name: value.value for value in attention.measure("emulated", place)}


@pytest.mark.parametrize("release", [flash_2, flash_3, flash_4])
def test_the_kernels_of_each_release_are_called_by_their_parameters(release, monkeypatch, tmp_path):
    values = measured_attention(monkeypatch, tmp_path, by_flash(release))
    assert values.keys() == CASES["right.attention_flash_2"].bounds.keys()
    assert all(CASES["right.attention_flash_2"].bounds[name].holds(value) for name, value in values.items())


def test_a_kernel_that_mixes_samples_misses_the_bounds(monkeypatch, tmp_path):
    values = measured_attention(monkeypatch, tmp_path, leaking)
    bounds = CASES["right.attention_sdpa"].bounds
    assert {name for name, value in values.items() if bounds[name].holds(value)} == set()


def test_a_base_that_is_not_the_quantized_one_misses_the_bounds(monkeypatch, tmp_path):
    def halved(transformer):
        dequantize(transformer)
        for name, weight in transformer.named_parameters():
            if "layers.1.mlp.down_proj" in name and "lora" not in name:
                weight.data *= 0.5

    dequantize = correctness.dequantize
    monkeypatch.setattr(correctness, "dequantize", halved)
    bounds = CASES["right.nf4"].bounds
    values = list(correctness.nf4(None, Place(CPU, True, tmp_path, tmp_path)))
    missed = {
        value.name for value in values if value.name in bounds and not bounds[value.name].holds(value.value)
    }
    assert missed >= {"loss_fp32", "gradient_fp32", "gradient_bf16"}


def test_the_kernel_of_older_releases_takes_as_many_key_heads(monkeypatch, tmp_path):
    """torch 2.11's, behind tuner's own call of it."""
    from torch.nn.attention import varlen as torch_varlen

    from tuner.models import varlen

    monkeypatch.setattr(torch_varlen, "varlen_attn", torch_2_11)
    monkeypatch.setattr(varlen, "has_kernels", lambda device: True)
    varlen._varlen_shares_heads.cache_clear()
    place = Place(CPU, True, tmp_path, tmp_path)
    values = {value.name: value.value for value in attention.measure("torch_varlen", place)}
    varlen._varlen_shares_heads.cache_clear()
    assert values["packed_forward"] < 5e-3


def test_shapes_have_the_published_numbers_of_weights():
    numbers = {name: shape.bytes / 2e9 for name, shape in SHAPES.items()}
    assert numbers == pytest.approx(
        {
            "internlm2_1_8b": 1.889,
            "internlm2_7b": 7.738,
            "internlm2_20b": 19.861,
            "llama3_1b": 1.236,
            "llama3_8b": 8.030,
            "qwen2_5_7b": 7.616,
        },
        rel=1e-3,
    )


def test_the_catalog_fits_together():
    order = list(CASES)
    for case in CASES.values():
        assert all(order.index(beside) < order.index(case.name) for beside in case.beside)
        assert set(case.shapes) <= SHAPES.keys()
        assert case.seconds <= 8 * 60  # of one call


@pytest.mark.parametrize(
    "name", [name for name in CASES if getattr(CASES[name].measure, "func", None) is measure_training]
)
def test_the_rows_of_a_training_fill_its_steps(name, tmp_path, monkeypatch):
    """At its real size, where rows that are too short or too few would flatter its memory and its speed."""
    monkeypatch.setattr(shapes, "_write_weights", lambda shape, folder, device: None)
    training = CASES[name].measure.args[0]
    config = training.config(Place(CPU, False, tmp_path / "models", tmp_path))
    stream = plan(config, load_rows(config))
    assert len(stream) == training.steps
    for step in range(training.steps):
        lengths = [batch.offsets.diff().tolist() for batch in stream.batches(step)]
        assert lengths == [[training.sample] * training.samples] * training.passes


def test_the_prompts_of_ppo_are_as_long_as_they_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "_write_weights", lambda shape, folder, device: None)
    policy = CASES["policy.ppo_7b"].measure.args[0]
    config = policy.config(tmp_path / "reward", Place(CPU, False, tmp_path / "models", tmp_path))
    prompts = load_prompts(config.prompts, load_tokenizer(config.policy), None).train
    assert len(prompts) == policy.steps * policy.prompts
    assert min(prompts.lengths) > 900
    replayed = load_examples(config.replay.data, load_tokenizer(config.policy)).train
    assert replayed.lengths.sum() >= config.replay.ratio * policy.steps * policy.prompts * 2048


def test_a_random_model_is_loaded_with_its_weights(tmp_path, monkeypatch):
    """As it is made on a card, of a small shape: in InternLM2's own layout, which only the loader reads."""
    sizes = {**SHAPES["internlm2_7b"].sizes, "vocab_size": 2_048, "hidden_size": 64, "intermediate_size": 96}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(SHAPES, "internlm2_7b", replace(SHAPES["internlm2_7b"], sizes=sizes))
    place = Place(CPU, False, tmp_path, tmp_path)
    folder = shapes.model_folder("internlm2_7b", place)
    loaded = load_model(Model(path=str(folder)), precision="fp32", device=CPU)
    assert loaded.transformer.config.vocab_size == 2_048
    weight = loaded.transformer.get_parameter("model.layers.1.self_attn.k_proj.weight")
    assert weight.shape == (32, 64)
    assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert shapes.model_folder("internlm2_7b", place) == folder  # made once


def test_models_make_room_for_each_other(tmp_path, monkeypatch):
    """Where the disk has no room for one more, others go; not that which is being made."""
    for name in ("one", "two", "new"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(shapes.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**9))
    shapes._make_room(tmp_path, tmp_path / "new", 5 * 10**8)
    assert {folder.name for folder in tmp_path.iterdir()} == {"one", "two", "new"}
    shapes._make_room(tmp_path, tmp_path / "new", 10**9)
    assert {folder.name for folder in tmp_path.iterdir()} == {"new"}


def test_the_card_is_asked_without_torch(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.159.04'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    here = surroundings(on_gpu=True, is_dry=False)
    assert (here.card, here.driver) == ("NVIDIA H200", "580.159.04")


def dry(folder: Path, *arguments: str) -> list[dict]:
    """The rows of a dry run of the script as a command."""
    command = [sys.executable, str(SCRIPT), "--dry", "--rows", str(folder / "dry.jsonl"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (folder / "dry.jsonl").read_text().splitlines()]


def unmeasured(rows: list[dict]) -> dict[str, str]:
    return {row["case"]: row["error"] for row in rows if row["name"] == END and row["outcome"] != "measured"}


def unbounded(rows: list[dict]) -> dict[str, set[str]]:
    """Bounds of the measured cases that no value of theirs was held against."""
    names: dict[str, set[str]] = {}
    for row in rows:
        names.setdefault(row["case"], set()).add(row["name"])
    missing = {case: set(CASES[case].bounds) - names[case] for case in names if case not in unmeasured(rows)}
    return {case: bounds for case, bounds in missing.items() if bounds}


def test_a_few_cases_in_small(tmp_path):
    cases = ("right.attention_sdpa", "right.generate_nf4", "speed.nf4_7b_4k", "policy.generate_7b")
    rows = dry(tmp_path, "--only", *cases)
    assert unmeasured(rows) == {}
    assert unbounded(rows) == {}
    peak = next(row for row in rows if (row["case"], row["name"]) == ("speed.nf4_7b_4k", "peak"))
    assert peak["predicted_gib"] > 0
    assert {row["case"] for row in rows} == {*cases, "speed.matrix_peak"}


def test_every_case_in_small(tmp_path):
    rows = dry(tmp_path)
    assert {row["case"] for row in rows} == CASES.keys()
    needing = ("right.attention_torch", "right.attention_flash", "peers.unsloth", "peers.vllm", "compare.")
    needing += ("right.kernel_liger", "speed.nf4_7b_4k_liger")
    assert [case for case in unmeasured(rows) if not case.startswith(needing)] == []
    assert unbounded(rows) == {}
    assert [row for row in rows if row["ok"] is False] == []


def test_a_case_as_an_interpreter_of_its_own(run):
    case = CASES["speed.matrix_peak"]
    done, _ = run(replace(case, first=("json",)))
    assert outcomes(done) == {case.name: "measured"}


def test_what_cases_are_forked_from_has_not_touched_the_gpu():
    """bitsandbytes asks the GPU what it is when it is imported; peft and transformers' Trainer import it."""
    script = (
        "import sys, torch; from benchmarks.gpu import catalog, runner; runner.preload(torch.device('cuda'));"
        "sys.exit('bitsandbytes' in sys.modules or 'tuner.stages.rl.loop' not in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_a_cpu_is_no_place_for_real_sizes(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "--dry" in done.stderr
