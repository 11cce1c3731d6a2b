"""Bad input ends with exit code 2 and one sentence that says where, what, and what to do; nothing is left behind."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT
from tests.end_to_end.conftest import Done
from tuner.resources import locate

Tuner = Callable[..., Done]

CONFIG = """
from tuner.config import SFT, AdamW, Chat, Evaluation, LoRA, Model, Source

config = SFT(
    model=Model(path="tuner:tiny"),
    adapter=LoRA(r=4),
    data=Chat(files=("rows.jsonl",), template="internlm2", max_length=128),
    optimizer=AdamW(lr=1e-3),
    tokens_per_step=256,
    tokens_per_pass=256,
    max_steps=2,
    precision="fp32",
    gradient_checkpointing=False,
)
"""


def messages(*turns: tuple[str, str]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


ROWS = "".join(
    f"{messages(('user', f'question {number}'), ('assistant', f'answer {number}'))}\n" for number in range(40)
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Path:
    """A working directory with a good config and good rows."""
    (tmp_path / "mine.py").write_text(CONFIG)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    return tmp_path


def assert_one_sentence(done: Done, *parts: str) -> None:
    """Exit code 2; on stderr one line, which holds these parts in this order; nothing on stdout."""
    assert done.out == ""
    assert len(done.err.splitlines()) == 1, done.err
    assert_last_sentence(done, *parts)


def assert_last_sentence(done: Done, *parts: str) -> None:
    """The same behind the progress of what went well."""
    assert done.code == 2, done
    assert "Traceback" not in done.err
    line = done.err.splitlines()[-1]
    assert line.startswith("tuner: ")
    place = 0
    for part in parts:
        assert part in line[place:], line
        place = line.index(part, place) + len(part)


def assert_nothing_is_left(folder: Path) -> None:
    assert not list(folder.glob("runs/*"))


# The command itself


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("trian", "mine.py"), ("no such command 'trian'", "`tuner --help`")),
        (("train",), ("train: missing argument 'config'", "`tuner train --help`")),
        (("train", "mine.py", "--epochs", "3"), ("train: no such option: --epochs", "--help")),
        (("train", "mine.py", "--processes", "0"), ("'--processes'", "greater than or equal to 1")),
        (("data", "mine.py", "--passes", "many"), ("'--passes'", "integer")),
        (("chat", "runs/mine", "--temperature", "-1"), ("'--temperature'",)),
    ],
)
def test_a_wrong_command(tuner: Tuner, arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    assert_one_sentence(tuner(*arguments), *parts)


def test_no_command_shows_help_and_is_no_success(tuner: Tuner) -> None:
    done = tuner()
    assert done.code == 2
    assert "Usage: tuner" in done.out
    assert done.err == ""


@pytest.mark.parametrize("verb", ["train", "check", "show", "configs", "copy", "data", "chat", "merge"])
def test_every_verb_has_help(tuner: Tuner, verb: str) -> None:
    done = tuner(verb, "--help")
    assert done.code == 0
    assert f"Usage: tuner {verb}" in done.out


# Config files


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ("bad.py", "empty", "config = SFT(...)")),
        (b"\n \n", ("bad.py", "empty")),
        ('x = 1\ny = "é"\n'.encode("latin-1"), ("bad.py:2", "not UTF-8", "save it as UTF-8")),
        (b"\0\0\1", ("bad.py", "binary data", "name a config file")),
        (b"x = 1\nconfig = SFT(", ("bad.py:2", "not valid Python", "was never closed", "correct it")),
        (b"x = 1", ("bad.py", "a config file ends with `config = SFT(...)`", "found no such value")),
        (b"config = 3", ("bad.py", "found a int")),
        (b"\nimport no_such_module", ("bad.py:2", "No module named 'no_such_module'", "correct this file")),
        (b"import sys\nsys.exit(0)", ("bad.py:2", "SystemExit")),
        (
            b"from tuner.config import SFT\nconfig = SFT(modle=3)",
            ("bad.py:2", "SFT has no field 'modle'", "did you mean 'model'?"),
        ),
        (
            CONFIG.replace("r=4", "r=4, alfa=3").encode(),
            ("bad.py:6", "LoRA has no field 'alfa'", "did you mean 'alpha'?"),
        ),
        (CONFIG.replace("model=Model", "modle=Model").encode(), ("bad.py:4", "did you mean 'model'?")),
        (CONFIG.replace('"rows.jsonl",', "").encode(), ("bad.py", "files", "at least 1 item")),
        (
            CONFIG.replace('("rows.jsonl",)', '"rows.jsonl"').encode(),
            ("write a tuple, as in ('rows.jsonl',)",),
        ),
        (CONFIG.replace("lr=1e-3", 'lr="1e-3"').encode(), ("bad.py:8", "lr", "valid number", "'1e-3'")),
        (
            CONFIG.replace('"rows.jsonl",', 'Source(path="rows.jsonl", shape=lambda row: row),').encode(),
            ("bad.py:7", "shape: a function", "top of a module", "lambdas cannot be saved"),
        ),
    ],
)
def test_a_bad_config_file(tuner: Tuner, folder: Path, content: bytes, parts: tuple[str, ...]) -> None:
    (folder / "bad.py").write_bytes(content)
    assert_one_sentence(tuner("train", "bad.py"), *parts)
    assert_nothing_is_left(folder)


@pytest.mark.parametrize("verb", ["train", "check", "show", "data"])
def test_a_missing_config_file(tuner: Tuner, verb: str) -> None:
    assert_one_sentence(
        tuner(verb, "quickstart_stf.py"), "no such config file", "did you mean quickstart_sft?"
    )


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("max_step=3", ("no field 'max_step'", "did you mean 'max_steps'?")),
        ("optimzer.lr=3", ("no 'optimzer'", "did you mean 'optimizer'?")),
        ("optimizer.learning=3", ("AdamW has no field 'learning'", "it has: lr, ")),
        ("lr=3", ("no field 'lr'", "did you mean 'optimizer.lr'?")),
        ("max_steps", ("override 'max_steps'", "write key=value")),
        ("max_steps=0", ("max_steps", "greater than or equal to 1", "not 0")),
        ("optimizer.lr=-1", ("optimizer.lr", "greater than 0", "not -1")),
        ("optimizer.lr=nan", ("optimizer.lr", "'nan'")),
        ("seed=true", ("seed", "valid integer", "True")),
        ("tokens_per_pass=300", ("tokens_per_pass (300)", "tokens_per_step (256)", "lower the first")),
        ("data.max_length=300", ("data.max_length (300)", "tokens_per_pass (256)", "raise the second")),
        ('{"a": 1}', ("write key=value",)),
        ("name=../elsewhere", ("name", "'../elsewhere'")),
        ("data.files=[]", ("data.files", "at least 1 item")),
        ("data.files.1=x.jsonl", ("no '1' here", "there are: 0")),
        ("data.split.test=1.5", ("data.split.test", "less than 1")),
        ("evaluation.keep_best=true", ("keep_best", "validation rows", "add data.split=")),
        ("model.rope.factor=2", ("model.rope is None", "set it whole")),
        ('model.rope={"factor": 2.0}', ("model.rope", "scaling and factor together")),
        ("freeze={}", ("freeze", "freezes nothing", "write all_but_last_layers=8")),
        ("schedule.kind=step", ("schedule", "'cosine', 'linear', 'constant'")),
        ("precision=fp16", ("precision", "'bf16' or 'fp32'", "'fp16'")),
    ],
)
def test_a_bad_override(tuner: Tuner, folder: Path, change: str, parts: tuple[str, ...]) -> None:
    assert_one_sentence(tuner("train", "mine.py", change), *parts)
    assert_nothing_is_left(folder)


def test_quantised_weights_without_an_adapter(tuner: Tuner) -> None:
    done = tuner("train", "mine.py", "adapter=null", "model.quantization=nf4")
    assert_one_sentence(done, "model.quantization='nf4'", "only train an adapter", "add adapter=LoRA()")


def test_a_part_that_is_not_there(tuner: Tuner) -> None:
    done = tuner("train", "mine.py", "adapter=null", "adapter.r=3")
    assert_one_sentence(done, "adapter is None", "has no 'r'", "set it whole")


def test_a_score_that_is_none(tuner: Tuner, folder: Path) -> None:
    done = tuner("train", "mine.py", "evaluation.score=exakt", 'data.test_files=["rows.jsonl"]')
    assert_one_sentence(done, "evaluation.score: 'exakt' is no function", "write file.py:name, or 'exact'")
    assert_one_sentence(tuner("check", "mine.py", "evaluation.score=exakt"), "'exakt'")
    assert_nothing_is_left(folder)
    (folder / "scores.py").write_text("def broken(answer, reference):\n    return 1 / 0\n")
    command = (
        "train",
        "mine.py",
        'data.test_files=["rows.jsonl"]',
        "data.limit=2",
        "evaluation.max_new_tokens=1",
    )
    done = tuner(*command, "evaluation.score=scores.py:broken")
    assert_last_sentence(done, "scores.py:broken", "ZeroDivisionError", "correct it")
    done = tuner(*command, "evaluation.score=scores.py:missing")
    assert_last_sentence(done, "scores.py", "no function 'missing'", "evaluation.score")
    assert_nothing_is_left(folder)


# Rows


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ("bad.jsonl", "empty", "put rows in it")),
        (b"\n\n", ("bad.jsonl", "empty")),
        (ROWS.encode() + '{"messages": "é"}\n'.encode("latin-1"), ("bad.jsonl:41", "not UTF-8", "save it")),
        (
            ROWS.encode() + b'{"messages": [\n',
            ("bad.jsonl:41", "broken JSON at column 15", "one whole JSON object"),
        ),
        (ROWS.encode() + b"[1, 2]\n", ("bad.jsonl:41", "not list", "write {...}")),
        (b'{"question": "a", "answer": "b"}', ("bad.jsonl:1", "keys: question, answer", "it needs messages")),
        (
            (ROWS + messages(("alien", "a"), ("assistant", "b"))).encode(),
            ("bad.jsonl:41", "unknown role 'alien'", "the roles are system, user, assistant"),
        ),
        (
            messages(("user", "a"), ("user", "b")).encode(),
            ("bad.jsonl:1", "no assistant turn", "add one or take"),
        ),
        (
            b'{"messages": [{"role": "assistant", "content": "a", "learn": false}]}',
            ("bad.jsonl:1", "nothing to learn", "take the row out"),
        ),
        (
            (ROWS + messages(("user", "a " * 200), ("assistant", "b"))).encode(),
            (
                "bad.jsonl:41",
                "more than max_length 128",
                'raise max_length, shorten the row, or set too_long="drop"',
            ),
        ),
        (b'{"text": "raw"}', ("bad.jsonl:1", "raw text", "use data=Text(...)")),
        (
            b'{"weight": 0, ' + ROWS.splitlines()[0].encode()[1:],
            ("no row is left to train on", "1 switched off"),
        ),
    ],
)
def test_bad_rows(tuner: Tuner, folder: Path, content: bytes, parts: tuple[str, ...]) -> None:
    (folder / "bad.jsonl").write_bytes(content)
    change = 'data.files=["bad.jsonl"]'
    assert_one_sentence(tuner("train", "mine.py", change), *parts)
    assert_nothing_is_left(folder)
    assert_one_sentence(tuner("check", "mine.py", change), *parts)
    assert_one_sentence(tuner("data", "mine.py", change), *parts)


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ('["missing.jsonl"]', ("missing.jsonl", "no such file", "correct the path")),
        ('["missing/*.jsonl"]', ("missing/*.jsonl", "no file matches", "correct the path")),
        ('["."]', ("this is a folder", "name the files in it")),
        ('["rows.csv"]', ("rows.csv", "files end in .jsonl", "rename or convert")),
        (
            '[{"path": "rows.jsonl", "shape": "chatml"}]',
            ("shape: 'chatml' is no function", "file.py:name, or 'messages'"),
        ),
        (
            '[{"path": "rows.jsonl", "shape": "none.py:none"}]',
            ("shape 'none.py:none'", "no such file", "write"),
        ),
        ('[{"path": "rows.jsonl", "shape": "mine.py:none"}]', ("mine.py", "no function 'none'", "shape")),
    ],
)
def test_bad_files(tuner: Tuner, folder: Path, files: str, parts: tuple[str, ...]) -> None:
    (folder / "rows.csv").write_text("a,b\n1,2\n")
    assert_one_sentence(tuner("train", "mine.py", f"data.files={files}"), *parts)
    assert_nothing_is_left(folder)


# Templates


def test_an_unknown_template(tuner: Tuner, folder: Path) -> None:
    done = tuner("train", "mine.py", "data.template=internlm3")
    assert_one_sentence(done, "template 'internlm3'", "no such template", "one of alpaca, chatml")
    assert_nothing_is_left(folder)


def test_a_template_whose_special_tokens_the_tokenizer_lacks(tuner: Tuner) -> None:
    done = tuner("train", "mine.py", "data.template=llama3")
    assert_one_sentence(done, "template 'llama3'", "<|eot_id|>", "splits into pieces", "use the template of")


def test_a_template_that_is_not_prefix_stable(tuner: Tuner, folder: Path) -> None:
    """It forgets earlier answers, as some models' own templates forget earlier thoughts."""
    (folder / "forgets.jinja").write_text(
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.role }}: {{ m.content }}</s>"
        "{% endif %}{% endfor %}"
    )
    turns = (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    (folder / "rows.jsonl").write_text(messages(*turns))
    done = tuner("train", "mine.py", "data.template=forgets.jinja")
    assert_one_sentence(done, "rows.jsonl:1", "not prefix-stable", "turn 2 (assistant)", "use one of")


def test_a_template_that_is_no_template(tuner: Tuner, folder: Path) -> None:
    (folder / "broken.jinja").write_text("{% for m in messages %}\n{{ m.content }")
    done = tuner("train", "mine.py", "data.template=broken.jinja")
    assert_one_sentence(done, "template 'broken.jinja', line 2", "correct the template")


# Models


@pytest.fixture
def model(folder: Path) -> Path:
    """A copy of the embedded model, to be damaged."""
    return Path(shutil.copytree(locate("tuner:tiny"), folder / "model"))


def damaged(model: Path, how: str) -> None:
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    match how:
        case "missing":
            del tensors["model.layers.0.attention.wo.weight"]
            save_file(tensors, weights, {"format": "pt"})
        case "unexpected":
            tensors["model.layers.99.attention.wo.weight"] = tensors[
                "model.layers.0.attention.wo.weight"
            ].clone()
            save_file(tensors, weights, {"format": "pt"})
        case "misshapen":
            tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
            save_file(tensors, weights, {"format": "pt"})
        case "cut":
            os.truncate(weights, 1_000)
        case "no weights":
            weights.unlink()
        case "no config":
            (model / "config.json").unlink()
        case "broken config":
            (model / "config.json").write_text("{")
        case "unknown family":
            (model / "config.json").write_text('{"model_type": "perceptron"}')
        case "no tokenizer":
            (model / "tokenizer.json").unlink()
            (model / "tokenizer_config.json").unlink()
        case "broken tokenizer":
            (model / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "parts"),
    [
        ("missing", ("model: 1 missing weights", "layers.0", "restore the folder")),
        ("unexpected", ("model: 1 unexpected weights", "layers.99", "restore the folder")),
        ("misshapen", ("model: ", "norm.weight", "restore the folder")),
        ("cut", ("model: cannot be loaded", "restore the folder")),
        ("no weights", ("no *.safetensors in model", "convert the weights")),
        ("no config", ("no config.json in model", "check the path")),
        ("broken config", ("model/config.json: cannot be read", "restore it")),
        ("unknown family", ("model/config.json: cannot be read", "perceptron")),
        ("no tokenizer", ("model: no tokenizer.json", "copy the base model's tokenizer")),
        ("broken tokenizer", ("model: its tokenizer cannot be read", "restore it")),
    ],
)
def test_a_damaged_model_folder(
    tuner: Tuner, folder: Path, model: Path, how: str, parts: tuple[str, ...]
) -> None:
    damaged(model, how)
    assert_one_sentence(tuner("train", "mine.py", "model.path=model"), *parts)
    assert_nothing_is_left(folder)


def test_a_missing_model(tuner: Tuner, folder: Path) -> None:
    for path in ("./nowhere", "/nowhere", "runs/nowhere"):
        done = tuner("train", "mine.py", f"model.path={path}")
        assert_one_sentence(done, f"{path}: no such model folder", "check the path, or train the run")
    assert_one_sentence(
        tuner("train", "mine.py", "model.path=rows.jsonl"), "this is a file", "name its folder"
    )
    assert_nothing_is_left(folder)


@pytest.mark.parametrize("verb", [("chat", "-m", "hi"), ("merge", "out")])
def test_a_missing_run(tuner: Tuner, folder: Path, verb: tuple[str, ...]) -> None:
    done = tuner(verb[0], "runs/nowhere", *verb[1:])
    assert_one_sentence(done, "runs/nowhere: no such model folder", "train the run it belongs to first")
    (folder / "runs" / "begun").mkdir(parents=True)
    done = tuner(verb[0], "runs/begun", *verb[1:])
    assert_one_sentence(done, "runs/begun: no config.json", "not a model folder")


def test_targets_that_the_model_has_not(tuner: Tuner, folder: Path) -> None:
    done = tuner("train", "mine.py", 'adapter.targets=["c_attn"]')
    assert_one_sentence(done, "adapter.targets", "'c_attn'", "it has", "q_proj")
    assert_nothing_is_left(folder)


# The machine


def test_a_gpu_asked_for_and_absent(tuner: Tuner, folder: Path) -> None:
    done = tuner("train", "mine.py", "device=cuda", env={"CUDA_VISIBLE_DEVICES": ""})
    assert_one_sentence(done, "device='cuda'", "no GPU", "install a CUDA build of torch, or write device=cpu")
    assert_nothing_is_left(folder)


def test_sharding_that_would_silently_be_something_else(tuner: Tuner, folder: Path) -> None:
    done = tuner("train", "mine.py", env={"ACCELERATE_USE_FSDP": "true"})
    assert_one_sentence(done, "FSDP", "choose plain multi-GPU or multi-CPU in `accelerate config`")


@pytest.mark.parametrize("place", ["rows.jsonl", "rows.jsonl/below"])
def test_runs_that_is_no_folder(tuner: Tuner, folder: Path, place: str) -> None:
    done = tuner("train", "mine.py", "--runs", place)
    assert_one_sentence(done, place, "cannot be made", "choose another with --runs")
    assert (folder / "rows.jsonl").read_text() == ROWS


def test_output_that_cannot_be_written(tuner: Tuner, folder: Path) -> None:
    done = tuner("data", "mine.py", "--html", "nowhere/page.html")
    assert_one_sentence(done, "nowhere/page.html: cannot be written", "choose another place")
    assert_one_sentence(
        tuner("copy", "quickstart_sft", "mine.py"), "mine.py exists already", "name another file"
    )
    assert (folder / "mine.py").read_text() == CONFIG


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 2 MiB: room for a run's beginning and a checkpoint or two."""
    place = folder / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can only be mounted by root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(tuner: Tuner, folder: Path, small_disk: Path) -> None:
    """Said in a sentence; what was saved before stays, and the run goes on once there is room."""
    command = ("train", "mine.py", "max_steps=5", "checkpoint.every=1", "checkpoint.keep=100", "--runs")
    full = tuner(*command, "disk")
    assert_last_sentence(
        full, "disk/mine", "the disk is full; free some space and run the same command again"
    )
    saved = sorted(path.name for path in small_disk.glob("mine/checkpoints/step_*"))
    assert saved
    assert not list(small_disk.glob("mine/checkpoints/.writing-*"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    again = tuner(*command, "disk")
    assert again.code == 0, again.err
    assert f"resumed after step {int(saved[-1][-6:])} of" in again.err
    assert tuner(*command, "whole").code == 0
    losses = [
        [
            json.loads(line)["loss"]
            for line in (folder / place / "mine/metrics.jsonl").read_text().splitlines()
        ]
        for place in ("disk", "whole")
    ]
    assert losses[0] == losses[1]


def test_a_disk_without_any_room(tuner: Tuner, small_disk: Path) -> None:
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    assert_one_sentence(tuner("train", "mine.py", "--runs", "disk"), "disk", "full", "free some space")
    assert list(small_disk.iterdir()) == [filler]


def test_a_full_disk_while_merging(tuner: Tuner, folder: Path, small_disk: Path) -> None:
    assert tuner("train", "mine.py").code == 0
    assert_one_sentence(
        tuner("merge", "runs/mine", "disk/merged"), "disk/merged", "cannot be written", "free space"
    )


HOLDER = """
import sys
from tuner.config import from_json
from tuner.training.run import Run
run = Run("runs/mine")
run.start(from_json(open(sys.argv[1]).read()), (), {})
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_locked_by_a_live_process(tuner: Tuner, folder: Path) -> None:
    (folder / "config.json").write_text(
        json.dumps(json.loads(tuner("show", "mine.py", "--json").out)["config"])
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, "config.json"],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    before = sorted(path.name for path in (folder / "runs/mine").iterdir())
    done = tuner("train", "mine.py")
    assert_one_sentence(done, "runs/mine", f"process {holder.pid} is training here", "wait for it")
    assert sorted(path.name for path in (folder / "runs/mine").iterdir()) == before
    holder.kill()
    holder.communicate()
    assert tuner("train", "mine.py").code == 0, "the lock goes with the process"


def test_a_changed_config_and_a_damaged_run(tuner: Tuner, folder: Path) -> None:
    assert tuner("train", "mine.py").code == 0
    before = {
        path: path.stat().st_mtime_ns for path in (folder / "runs/mine").rglob("*") if path.name != ".lock"
    }
    done = tuner("train", "mine.py", "optimizer.lr=1e-4", "max_steps=3")
    assert_one_sentence(
        done,
        "runs/mine was begun with another config",
        "max_steps was 2 and is now 3",
        "optimizer.lr was 0.001 and is now 0.0001",
        "put it back to go on",
    )
    after = {
        path: path.stat().st_mtime_ns for path in (folder / "runs/mine").rglob("*") if path.name != ".lock"
    }
    assert after == before
    assert_one_sentence(tuner("merge", "runs/mine", "runs"), "runs: is not empty", "name a new folder")
    assert_one_sentence(tuner("merge", "runs/mine", "out", "--dtype", "int3"), "--dtype int3", "bf16 or fp32")
    (folder / "runs/mine/model/adapter_model.safetensors").write_bytes(b"cut")
    assert_one_sentence(
        tuner("chat", "runs/mine", "-m", "hi"), "runs/mine/model", "restore it or train again"
    )
    (folder / "runs/mine/config.json").write_text("{")
    assert_one_sentence(tuner("train", "mine.py"), "no JSON", "restore it")


def test_a_damaged_checkpoint(tuner: Tuner, folder: Path) -> None:
    assert tuner("train", "mine.py", "checkpoint.every=1").code == 0
    run = folder / "runs/mine"
    (run / "results.json").unlink()
    (run / "checkpoints/step_000002/optimizer.safetensors").write_bytes(b"cut")
    done = tuner("train", "mine.py", "checkpoint.every=1")
    assert_last_sentence(done, "step_000002: this checkpoint cannot be read", "remove the folder to go on")
    shutil.rmtree(run / "checkpoints/step_000002")
    assert tuner("train", "mine.py", "checkpoint.every=1").code == 0


@pytest.mark.parametrize("there_before", [True, False])
def test_a_start_that_failed_binds_nothing(tuner: Tuner, folder: Path, there_before: bool) -> None:
    """The same name may be used again, with the mistake put right; also in a folder that was there before."""
    if there_before:
        (folder / "runs/mine").mkdir(parents=True)
    assert tuner("train", "mine.py", "data.template=llama3").code == 2
    assert tuner("train", "mine.py").code == 0


def test_merging_full_weights(tuner: Tuner) -> None:
    assert tuner("train", "mine.py", "adapter=null", "max_steps=1").code == 0
    assert_one_sentence(
        tuner("merge", "runs/mine", "out"), "runs/mine: has no adapter", "use the folder as it is"
    )


def test_a_model_without_a_template_cannot_chat(tuner: Tuner, model: Path) -> None:
    (model / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert_one_sentence(tuner("chat", "model", "-m", "hi"), "no chat template")


# A real process, with its imports: nothing that a library says on the way comes between


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            "model.path=org/name",
            ("org/name: neither a folder here nor to be had", "check the name, the network"),
        ),
        (
            'data.files=["org/name"]',
            ("org/name: this dataset could not be had from the hub", "check its name"),
        ),
    ],
)
def test_an_unreachable_hub(folder: Path, change: str, parts: tuple[str, ...]) -> None:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(folder),
    }
    command = [sys.executable, "-m", "tuner", "train", "mine.py", change]
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=25)
    assert_one_sentence(Done(done.returncode, done.stdout, done.stderr, 0.0), *parts)
    assert_nothing_is_left(folder)
