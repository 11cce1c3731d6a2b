"""Bad input ends with exit code 2 and one sentence that says where, what, and what to do; nothing is left behind."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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
        (b"config = 3", ("bad.py", "found an object of type int")),
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
            ("bad.py:7", "shape: a function", "top level of a module", "lambdas cannot be saved"),
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
    assert_one_sentence(done, "evaluation.score: 'exakt' is not a function", "write file.py:name, or 'exact'")
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
        (ROWS.encode() + b"[1, 2]\n", ("bad.jsonl:41", "a row is a JSON object, not int", "write {...}")),
        (
            rb'{"\u001b]0;title\u0007": 1, "\u202e": 2}',
            ("bad.jsonl:1", r"keys: \x1b]0;title\x07, \u202e)", "it needs messages"),
        ),
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
            ("bad.jsonl:1", "no token to take the loss on", "take the row out"),
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
        ('["rows.tsv"]', ("rows.tsv", "files end in .jsonl", "rename or convert")),
        ('["rows.csv"]', ("rows.csv:2", "this row's shape is unknown (keys: a, b)")),
        (
            '[{"path": "rows.jsonl", "shape": "chatml"}]',
            ("shape 'chatml'", "not a row shape", "there are: messages"),
        ),
        (
            '[{"path": "rows.jsonl", "shape": "none.py:none"}]',
            ("shape 'none.py:none'", "no such file", "write"),
        ),
        ('[{"path": "rows.jsonl", "shape": "mine.py:none"}]', ("mine.py", "no function 'none'", "shape")),
    ],
)
def test_bad_files(tuner: Tuner, folder: Path, files: str, parts: tuple[str, ...]) -> None:
    for name in ("rows.csv", "rows.tsv"):
        (folder / name).write_text("a,b\n1,2\n")
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


def test_a_template_that_leaves_earlier_answers_out(tuner: Tuner, folder: Path) -> None:
    (folder / "forgets.jinja").write_text(
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.role }}: {{ m.content }}</s>"
        "{% endif %}{% endfor %}"
    )
    turns = (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    (folder / "rows.jsonl").write_text(messages(*turns))
    done = tuner("train", "mine.py", "data.template=forgets.jinja")
    assert_one_sentence(
        done, "rows.jsonl:1", "turn 2 (assistant)", "does not write all of its text", "use another template"
    )


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
    env = {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}
    done = tuner("train", "mine.py", env=env)
    assert_one_sentence(done, "fsdp_offload_params=true", "stay on the devices", "in `accelerate config`")
    done = tuner("train", "mine.py", env={"ACCELERATE_USE_DEEPSPEED": "true"})
    assert_one_sentence(done, "DeepSpeed", "choose multi-GPU or FSDP in `accelerate config`")
    assert_nothing_is_left(folder)


def test_a_layout_that_processes_do_not_fill(tuner: Tuner, folder: Path) -> None:
    done = tuner("train", "mine.py", "parallel.shard=2")
    assert_one_sentence(done, "parallel.shard=2: 1 process cannot be", "--processes", "lower it")
    done = tuner("check", "mine.py", "parallel.shard=2", "--gpus", "3")
    assert_one_sentence(done, "parallel.shard=2: 3 processes cannot be divided into groups of 2")
    assert_nothing_is_left(folder)


def test_models_that_cannot_be_held_in_shards(tuner: Tuner, folder: Path) -> None:
    done = tuner("check", "mine.py", "parallel.shard=2", "model.quantization=int8")
    assert_one_sentence(done, "is in 8 bit", 'quantization="nf4"')
    done = tuner("train", "quickstart_dpo", "parallel.shard=2")
    assert_one_sentence(done, "parallel.shard=2: TRL's trainers hold the model whole", "leave parallel out")
    done = tuner("train", "quickstart_dpo", "parallel.sequence=2")
    assert_one_sentence(
        done, "parallel.sequence=2: TRL's trainers", "rows of their own", "leave parallel out"
    )
    assert_nothing_is_left(folder)


def test_models_whose_rows_cannot_be_shared(tuner: Tuner, folder: Path) -> None:
    done = tuner("check", "mine.py", "parallel.sequence=3")
    assert_one_sentence(done, "parallel.sequence=3", "4 attention heads", "choose a divisor of the first")
    assert_nothing_is_left(folder)


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
from tuner.stages.run import Run
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
    done = tuner("train", "mine.py", "optimizer.lr=1e-4", "max_steps=1")
    assert_one_sentence(
        done,
        "runs/mine was begun with another config",
        "max_steps was 2 and is now 1",
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
    assert_one_sentence(tuner("train", "mine.py"), "not valid JSON", "restore it")


def test_a_damaged_checkpoint(tuner: Tuner, folder: Path) -> None:
    assert tuner("train", "mine.py", "checkpoint.every=1").code == 0
    run = folder / "runs/mine"
    (run / "results.json").unlink()
    (run / "checkpoints/step_000002/optimizer.safetensors").write_bytes(b"cut")
    done = tuner("train", "mine.py", "checkpoint.every=1")
    assert_last_sentence(done, "step_000002: this checkpoint is damaged", "checkpoint.skip_damaged=true")
    assert tuner("train", "mine.py", "checkpoint.every=1", "checkpoint.skip_damaged=true").code == 0


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


# PPO

POLICY_CONFIG = """
from tuner.config import PPO, Model, PolicyEvaluation, Prompts, Sampling, Source

config = PPO(
    policy=Model(path="runs/talks"),
    reward="runs/scores",
    prompts=Prompts(
        files=("prompts.jsonl",), test_files=("prompts.jsonl",), template="internlm2", max_length=64
    ),
    prompts_per_step=4,
    sampling=Sampling(max_new_tokens=4),
    critic_warmup=1,
    tokens_per_pass=256,
    max_steps=2,
    precision="fp32",
    gradient_checkpointing=False,
    evaluation=PolicyEvaluation(rows=2, samples=0),
)
"""

SCORES_CONFIG = """
from tuner.config import AdamW, LoRA, Model, Preferences, RewardModel

config = RewardModel(
    model=Model(path="tuner:tiny"),
    adapter=LoRA(r=4),
    conditions={"right": "True sums win.", "short": "Short answers win."},
    data=Preferences(files=("pairs.jsonl",), template="internlm2", max_length=96),
    optimizer=AdamW(lr=1e-3),
    tokens_per_step=512,
    tokens_per_pass=512,
    max_steps=1,
    precision="fp32",
    gradient_checkpointing=False,
)
"""

RULES = """
import math

def good(answer, row): return 0.5
def one(answer): return 0.5
def broken(answer, row): return 1 / 0
def none(answer, row): return None
def word(answer, row): return "high"
def nan(answer, row): return math.nan
def high(answer, row): return 2
def keyed(answer, row): return row["gold"]
number = 3
"""

ASKED = [{"prompt": f"What is {number} + 2?", "condition": "right"} for number in range(12)]


def write(file: Path, rows: Sequence[Mapping[str, object]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the runs that PPO starts from, which are trained once."""
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def ppo(tuner: Tuner, folder: Path, trained: Path) -> Path:
    """A working directory with a good PPO config, and all that it names."""
    if not (trained / "runs").is_dir():
        (trained / "talks.py").write_text(CONFIG)
        (trained / "scores.py").write_text(SCORES_CONFIG)
        (trained / "rows.jsonl").write_text(ROWS)
        pair = {"prompt": "What is 1 + 2?", "chosen": "3", "rejected": "4", "condition": "right"}
        write(trained / "pairs.jsonl", [pair, pair | {"condition": "short"}] * 4)
        for name in ("talks", "scores"):
            done = tuner("train", f"{name}.py", cwd=trained)
            assert done.code == 0, done.err
    shutil.copytree(trained / "runs", folder / "runs")
    (folder / "mine.py").write_text(POLICY_CONFIG)
    (folder / "rules.py").write_text(RULES)
    write(folder / "prompts.jsonl", ASKED)
    return folder


def assert_no_run_is_left(folder: Path) -> None:
    assert sorted(path.name for path in folder.glob("runs/*")) == ["scores", "talks"]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("policy.path=runs/nowhere", ("runs/nowhere: no such model folder", "train the run it belongs to")),
        ("reward.path=runs/nowhere", ("runs/nowhere: no such model folder", "train the run it belongs to")),
        ("reward=runs/nowhere", ("runs/nowhere: no such model folder", "train the run it belongs to")),
        ("reward.path=runs/talks", ("runs/talks", "no reward model", "train one from it first")),
        ("policy.path=runs/scores", ("runs/scores", "a reward model", "language model is needed", "name")),
        ("policy.path=tuner:tiny", ('roles="shared"', "has none", 'adapter=LoRA(), or write roles="separate"')),
        ('critic_adapter={"r": 8}', ("critic_adapter", "reward model's own", "leave critic_adapter out")),
        ("prompts.template=alpaca", ("runs/scores: the chat templates", "differ", 'critic_from="policy"')),
        ("prompts.template=chat", ("template 'chat'", "no such template", "one of alpaca")),
        ("prompts.max_length=3", ("no row is left", "too long", "raise max_length")),
        ("epochs=0.01", ("0.01 epochs of 12 prompts", "give more of either")),
        ('prompts.files=["none.jsonl"]', ("none.jsonl", "no such file")),
        (
            'prompts.files=[{"path": "rows.jsonl", "condition": "kind"}]',
            ("rows.jsonl:1", "condition 'kind' is unknown", "right, short", "correct it"),
        ),
        ('replay={"files": ["prompts.jsonl"], "max_length": 64}', ("prompts.jsonl:1", "shape is unknown")),
        ('replay={"files": ["rows.jsonl"], "max_length": 64}', ("rows.jsonl:1", "a conversation", "raw text")),
        ("evaluation.rule=rules.py:absent", ("rules.py: has no function 'absent'", "evaluation.rule")),
        ("evaluation.rule=rules.py:number", ("rules.py: has no function 'number'", "evaluation.rule")),
        ("evaluation.rule=absent.py:good", ("evaluation.rule 'absent.py:good'", "no such file", "write")),
    ],
)  # fmt: skip
def test_a_ppo_config_that_does_not_fit_together(
    tuner: Tuner, ppo: Path, change: str, parts: tuple[str, ...]
) -> None:
    assert_one_sentence(tuner("train", "mine.py", change), *parts)
    assert_no_run_is_left(ppo)
    assert_one_sentence(tuner("check", "mine.py", change), *parts)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("tokens_per_pass=67", ("prompts.max_length (64)", "max_new_tokens (4)", "(67)", "raise the last to 68")),
        ('replay={"files": ["rows.jsonl"], "max_length": 300}', ("replay.max_length (300)", "(256)", "lower")),
        ('adapter={"r": 4, "dropout": 0.1}', ("adapter.dropout", "write 0")),
        ('critic_adapter={"r": 4, "dropout": 0.1}', ("critic_adapter.dropout", "write 0")),
        ("mini_batches=5", ("mini_batches (5)", "prompts_per_step (4)", "change one")),
        ("policy.quantization=nf4", ("policy.quantization='nf4'", "add adapter=LoRA()")),
        ("sampling.temperature=0", ("sampling.temperature", "greater than 0")),
        ("sampling.top_p=1.5", ("sampling.top_p", "less than or equal to 1")),
        ("evaluation.rule=exact", ("evaluation.rule", "'exact' is not a function", "file.py:name")),
        ("prompts.split.validation=0.1", ("no validation part", "split.test")),
        (
            'replay={"files": ["rows.jsonl"], "max_length": 64, "split": {"validation": 0.1}}',
            ("no validation part", "split.test"),
        ),
        ("data.limit=3", ("no 'data'",)),
        ("model.path=x", ("no 'model'",)),
    ],
)  # fmt: skip
def test_a_ppo_override_that_is_refused(
    tuner: Tuner, folder: Path, change: str, parts: tuple[str, ...]
) -> None:
    (folder / "mine.py").write_text(POLICY_CONFIG)
    assert_one_sentence(tuner("train", "mine.py", change), *parts)
    assert_nothing_is_left(folder)


def test_a_rule_without_prompts_to_measure(tuner: Tuner, folder: Path) -> None:
    (folder / "mine.py").write_text(POLICY_CONFIG)
    done = tuner("train", "mine.py", "prompts.test_files=[]", "evaluation.rule=rules.py:good")
    assert_one_sentence(done, "evaluation.rule needs test prompts", "add prompts.test_files")


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (
            [*ASKED, {"prompt": "x", "condition": "kind"}],
            (":13", "condition 'kind' is unknown", "right, short", "correct it"),
        ),
        ([*ASKED, {"text": "raw"}], (":13", 'it needs "prompt"', "it has text")),
        ([*ASKED, {"prompt": ""}], (":13", "no user turn", "take the row out")),
        (
            [*ASKED, {"prompt": [{"role": "system", "content": "x"}]}],
            (":13", "no user turn", "take the row out"),
        ),
        ([{"text": "raw"}], (":1", "shape is unknown", "text", "prompt")),
        ([], ("the file is empty", "put rows in it")),
    ],
)
def test_bad_prompts(tuner: Tuner, ppo: Path, rows: list[dict[str, object]], parts: tuple[str, ...]) -> None:
    write(ppo / "bad.jsonl", rows)
    for verb in ("train", "check", "data"):
        assert_one_sentence(tuner(verb, "mine.py", 'prompts.files=["bad.jsonl"]'), "bad.jsonl", *parts)
    assert_no_run_is_left(ppo)


@pytest.mark.parametrize(
    ("rule", "parts"),
    [
        ("broken", ("failed on", "ZeroDivisionError", "correct it")),
        ("none", ("failed on", "TypeError", "correct it")),
        ("word", ("failed on", "could not convert", "correct it")),
        ("keyed", ("failed on", "KeyError: 'gold'", "correct it")),
        ("nan", ("returned nan for", "from 0 to 1", "correct it")),
        ("high", ("returned 2.0 for", "from 0 to 1", "correct it")),
    ],
)
def test_a_rule_that_gives_no_score(tuner: Tuner, ppo: Path, rule: str, parts: tuple[str, ...]) -> None:
    done = tuner("train", "mine.py", f"evaluation.rule=rules.py:{rule}")
    assert_last_sentence(done, "prompts.jsonl:1", f"evaluation.rule 'rules.py:{rule}'", *parts)
    assert_no_run_is_left(ppo)


def test_a_rule_of_other_arguments(tuner: Tuner, ppo: Path) -> None:
    for verb in ("train", "check"):
        done = tuner(verb, "mine.py", "evaluation.rule=rules.py:one")
        assert_one_sentence(done, "evaluation.rule 'rules.py:one'", "too many", "write def one(answer, row)")
    assert_no_run_is_left(ppo)


def test_a_reward_model_with_another_vocabulary(tuner: Tuner, ppo: Path) -> None:
    file = ppo / "runs/scores/model/tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["le"], vocabulary["ch"] = vocabulary["ch"], vocabulary["le"]
    file.write_text(json.dumps(values))
    for verb in ("train", "check"):
        done = tuner(verb, "mine.py")
        assert_one_sentence(done, "runs/scores: the tokenizers", "differ", 'write critic_from="policy"')
    assert_no_run_is_left(ppo)
    assert tuner("train", "mine.py", "critic_from=policy").code == 0


EACH_STEP = ("train", "mine.py", "checkpoint.every=1", "checkpoint.keep=9")


@pytest.fixture
def stopped(tuner: Tuner, ppo: Path) -> Path:
    """The folder of a PPO run that was killed after its first step."""
    done = tuner(*EACH_STEP)
    assert done.code == 0, done.err
    run = ppo / "runs/mine"
    (run / "results.json").unlink()
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints/step_000002")
    return run


def test_what_may_change_when_a_ppo_run_goes_on(tuner: Tuner, stopped: Path) -> None:
    done = tuner(*EACH_STEP, "kl=0.5", "sampling.max_new_tokens=5")
    assert_one_sentence(
        done,
        "runs/mine was begun with another config",
        "sampling.max_new_tokens was 4 and is now 5",
        "kl was 0.01 and is now 0.5",
        "put it back to go on",
    )
    done = tuner(*EACH_STEP, "tokens_per_pass=128", "sampling.cache_gib=0.1", "gradient_checkpointing=true")
    assert done.code == 0, done.err
    assert "resumed after step 1 of 2" in done.err


@pytest.mark.parametrize(("run", "what"), [("talks", "policy"), ("scores", "reward")])
def test_a_run_that_ppo_started_from_was_trained_again(
    tuner: Tuner, stopped: Path, run: str, what: str
) -> None:
    """Its base is the same, and its adapter is another."""
    file = stopped.parent / run / "model/adapter_model.safetensors"
    before = file.read_bytes()
    weights = load_file(file)
    name = max(weights)
    save_file({**weights, name: weights[name] + 1}, file, {"format": "pt"})
    done = tuner(*EACH_STEP)
    assert_last_sentence(done, "runs/mine", f"the {what} changed since this run began", "put the old back")
    was, now = re.findall(r"(?:was|is) (\w{12})[,)]", done.err.splitlines()[-1])
    assert was != now
    file.write_bytes(before)
    assert tuner(*EACH_STEP).code == 0


def test_verbs_on_a_ppo_run(tuner: Tuner, ppo: Path) -> None:
    """A policy that PPO has trained is a policy, and no reward model."""
    assert tuner("train", "mine.py", "evaluation.rule=rules.py:good").code == 0
    said = tuner("chat", "runs/mine", "-m", "What is 1 + 2?", "--max-new-tokens", 4)
    assert said.code == 0
    assert said.out.strip()
    assert_one_sentence(tuner("score", "runs/mine", "rows.jsonl"), "runs/mine", "no reward model")
    for verb in ("merge", "export"):
        done = tuner(verb, "runs/mine", verb)
        assert (done.code, done.err) == (0, "")
        assert "same most likely token" in done.out
    assert tuner("chat", "merge", "-m", "What is 1 + 2?", "--max-new-tokens", 4).code == 0
    again = ("train", "mine.py", "name=again")
    assert_one_sentence(tuner(*again, "reward.path=runs/mine"), "runs/mine", "no reward model")
    assert tuner(*again, "policy.path=runs/mine").code == 0, "it is a policy to go on from"


def test_verbs_on_a_ppo_config(tuner: Tuner, ppo: Path) -> None:
    shown = tuner("show", "mine.py")
    assert (shown.code, shown.err) == (0, "")
    assert "prompts_per_step" in shown.out
    checked = tuner("check", "mine.py")
    assert (checked.code, checked.err) == (0, "")
    assert "12 prompts (12 right)" in checked.out
    assert checked.out.splitlines()[-1] == "ready to train"
    looked = tuner("data", "mine.py")
    assert (looked.code, looked.err) == (0, "")
    assert "<|im_start|>assistant" in looked.out
    assert json.loads(tuner("data", "mine.py", "--json").out)["parts"]["train"]["samples"] == 12
    assert tuner("data", "mine.py", "--html", "page.html").code == 0
    assert "prompts.jsonl:" in (ppo / "page.html").read_text()
    assert_no_run_is_left(ppo)


# A real process, with its imports: nothing that a library says on the way comes between


def test_a_condition_that_a_reward_model_of_the_hub_does_not_know(ppo: Path) -> None:
    """Refused where the prompts are read, and not only when the first answers are scored."""
    cached = ppo / "hub" / "models--org--scores"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(ppo / "runs" / "scores" / "model", cached / "snapshots" / ("0" * 40))
    write(ppo / "prompts.jsonl", [*ASKED, {"prompt": "What is 3 + 2?", "condition": "kind"}])
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(ppo / "hub"),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tuner", "train", "mine.py", "reward=org/scores"]
    done = subprocess.run(command, cwd=ppo, env=environment, capture_output=True, text=True, timeout=120)
    assert_one_sentence(
        Done(done.returncode, done.stdout, done.stderr, 0.0),
        *("prompts.jsonl:13", "condition 'kind' is unknown", "right, short", "correct it"),
    )
    assert_no_run_is_left(ppo)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            "model.path=org/name",
            ("org/name: neither a folder here nor to be had", "check the name, the network"),
        ),
        (
            'data.files=["org/name"]',
            ("org/name: this dataset could not be loaded from the hub", "check its name"),
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
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=90)
    assert_one_sentence(Done(done.returncode, done.stdout, done.stderr, 0.0), *parts)
    assert_nothing_is_left(folder)
