"""A small run on the embedded model, and ways to compare two of them."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.forked import exit_code, fork
from tests.shallow_models import shallow
from tuner.config import (
    COOL,
    PPO,
    SFT,
    AdamW,
    Candidates,
    Chat,
    Evaluation,
    LoRA,
    Model,
    Patch,
    PolicyEvaluation,
    Preferences,
    Prompts,
    Replay,
    RewardModel,
    Round,
    Sampling,
    Source,
    StageConfig,
    override,
    to_json,
)
from tuner.stages.run import Run

SHALLOW = shallow(1)
"""One layer: a run's time is nearly all Python calls per layer. Layouts, which go by layers, are tested on two."""

SMALL = SFT(
    name="small",
    model=Model(path=SHALLOW),
    adapter=LoRA(r=8, alpha=16),
    data=Chat(files=("tuner:sums/train.jsonl",), template="internlm2", max_length=64, limit=200),
    optimizer=AdamW(
        lr=5e-3, eps=1e-4
    ),  # a larger eps, or Adam makes a step of every rounding of a zero gradient
    tokens_per_step=512,
    tokens_per_pass=512,
    max_steps=5,
    precision="fp32",
    gradient_checkpointing=False,
    evaluation=Evaluation(samples=0),
)


CONDITIONS = ("brief", "detailed", "polite", "blunt", "json", "plain")
SMALL_REWARD = RewardModel(
    name="reward",
    model=Model(path=SHALLOW),
    adapter=LoRA(r=8, alpha=16),
    conditions={name: f"tuner:twins/{name}.txt" for name in CONDITIONS},
    data=Preferences(files=("tuner:twins/train.jsonl",), template="internlm2", max_length=256, limit=40),
    optimizer=AdamW(lr=5e-3, eps=1e-4),
    tokens_per_step=512,
    tokens_per_pass=512,
    max_steps=8,
    precision="fp32",
    gradient_checkpointing=False,
)
SMALL_PPO = PPO(
    name="ppo",
    policy=Model(path="filled in by the fixture"),
    reward="filled in by the fixture",
    prompts=Prompts(
        files=(
            Source(path="tuner:sums/train.jsonl", condition="brief", limit=30),
            Source(path="tuner:sums/test.jsonl", limit=10),
        ),
        template="internlm2",
        max_length=48,
    ),
    prompts_per_step=8,
    sampling=Sampling(max_new_tokens=11, top_p=0.95),
    kl=0.1,
    critic_warmup=1,
    critic_lr=5e-3,
    optimizer=AdamW(lr=1e-3, eps=1e-4),  # a larger eps, as above
    replay=Replay(
        files=(Source(path="tuner:sums/train.jsonl", limit=60),), template="internlm2", max_length=64
    ),
    tokens_per_pass=256,
    max_steps=4,
    precision="fp32",
    gradient_checkpointing=False,
    evaluation=PolicyEvaluation(samples=0),
)


TALKING = {"max_steps": 40, "data.limit": 400, "optimizer.lr": 1e-2}
"""What the small SFT run needs to come to an end with most of its answers within 11 tokens."""


@pytest.fixture
def small() -> Callable[..., SFT]:
    """The small config with some leaves changed: small({"max_steps": 3})."""
    return lambda changes=None: override(SMALL, changes or {})


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Run]:
    """Train a config in a folder of its own: train(config, "one")."""

    def trained(config: SFT, place: str = "runs") -> Run:
        import tuner

        return tuner.train(config, runs=tmp_path / place)

    return trained


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Callable[..., Run]:
    """A small run that PPO begins with, trained when it is first asked for: start("sft") or start("reward").

    Further arguments change leaves of its config.
    """
    root = tmp_path_factory.mktemp("starts")
    made: dict[str, Run] = {}

    def started(kind: str, changes: dict[str, Any] | None = None) -> Run:
        import tuner

        key = f"{kind} {changes}"
        if key not in made:
            config = {"sft": SMALL, "reward": SMALL_REWARD}[kind]
            steps = TALKING if kind == "sft" else {}
            made[key] = tuner.train(override(config, steps | (changes or {})), runs=root / str(len(made)))
        return made[key]

    return started


@pytest.fixture(scope="session")
def ppo(start) -> Callable[..., PPO]:
    """The small PPO config with some leaves changed. sft, reward: changes of the runs it begins with."""

    def made(changes: dict[str, Any] | None = None, sft: Any = None, reward: Any = None) -> PPO:
        policy, judge = start("sft", sft), start("reward", reward)
        starts = {"policy.path": str(policy.folder), "reward.path": str(judge.folder)}
        return override(SMALL_PPO, starts | (changes or {}))

    return made


COOL_TEST_FILES = [{"path": "tuner:twins/test.jsonl", "limit": 8}]


@pytest.fixture(scope="session")
def cool_reward(start) -> Run:
    """The run of the first reward model of rounds, with the checkpoint of its last step."""
    return start("reward", {"max_steps": 4, "data.test_files": COOL_TEST_FILES, "checkpoint.every": 4})


@pytest.fixture(scope="session")
def cool_sft(start) -> Run:
    """The run of the policy that rounds start from, with the checkpoint of its last step."""
    return start("sft", {"max_steps": 4, "data.limit": 200, "checkpoint.every": 4})


@pytest.fixture(scope="session")
def cool(cool_sft: Run, cool_reward: Run) -> Callable[..., COOL]:
    """Two rounds on the embedded model, some leaves changed."""
    rules = Path(__file__).with_name("cool_rules.py")
    prompts = {
        "prompts.files": [{"path": "tuner:sums/train.jsonl", "condition": "brief", "limit": 30}],
        "prompts.test_files": [{"path": "tuner:sums/test.jsonl", "condition": "brief", "limit": 6}],
    }
    reward = {"data.test_files": COOL_TEST_FILES, "data.max_length": 96, "tokens_per_pass": 192}
    policy = {
        "policy.path": str(cool_sft.folder),
        "reward.path": str(cool_reward.folder),
        "replay": None,
        "evaluation.rule": f"{rules}:is_sum",
        "tokens_per_pass": 64,
    }
    config = COOL(
        name="cool",
        reward=override(SMALL_REWARD, reward),
        policy=override(SMALL_PPO, policy | prompts),
        rounds=(
            Round(steps=3),
            Round(steps=2, patch=Patch(steps=3, max_accuracy_loss=1, min_margin=None, average=(0.5,))),
        ),
        candidates=Candidates(prompts=8, slow=16, fast=10),
        feedback=(f"{rules}:shorter",),  # type: ignore[arg-type]
        merge=False,
    )
    return lambda changes=None: override(config, {"checkpoint.every": 1} | (changes or {}))


def curve(run: Run) -> list[tuple[Any, ...]]:
    """What a run's steps were, to the last bit; without times."""
    return [(record["step"], record["tokens"], record["loss"], record["grad_norm"]) for record in run.metrics]


def weights(run: Run) -> dict[str, Any]:
    """The trained model's tensors."""
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for file in sorted(run.model_folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


TRAIN = """
import sys, tuner
from pathlib import Path
from tuner.config import from_json
for name in sys.argv[2:]:
    config = from_json(Path(sys.argv[1], f"{name}.json").read_text())
    tuner.train(config, runs=Path(sys.argv[1], "two", name))
"""
"""What each of two processes does: train the configs that are named, below the folder `two`."""


def in_two_processes(
    folder: Path, cases: Mapping[str, StageConfig], script: str = TRAIN, env: Mapping[str, str] | None = None
) -> None:
    """Train configs, by name, in two gloo processes."""
    in_processes(2, folder, cases, script, env)


def in_processes(
    count: int,
    folder: Path,
    cases: Mapping[str, StageConfig],
    script: str = TRAIN,
    env: Mapping[str, str] | None = None,
) -> None:
    """The same in any number of processes. They are children of this one, as to import everything costs each as much as
    dozens of small steps."""
    write(folder, cases, script)
    variables = {**(env or {}), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    variables["WORLD_SIZE"] = str(count)
    children = []
    for rank in range(count):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(fork(partial(run_as_rank, folder, list(cases), variables | place)))
    codes = [exit_code(child) for child in children]
    logs = [(folder / f"rank{rank}.log").read_text() for rank in range(count)]
    assert not any(codes), "\n".join(log[-3000:] for log in logs)


def run_as_rank(folder: Path, names: list[str], variables: dict[str, str]) -> None:
    """In a child: what a process of its own would do with the script."""
    from accelerate.state import AcceleratorState

    torch.set_num_threads(torch.get_num_threads())  # see forked.py: torchrun's own forks do not
    os.environ |= variables
    sys.stdout = sys.stderr = (folder / f"rank{os.environ['RANK']}.log").open("w", buffering=1)
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    sys.argv = [str(folder / "two.py"), str(folder), *names]
    AcceleratorState._reset_state(reset_partial_state=True)  # of a single process
    try:
        exec(compile((folder / "two.py").read_text(), sys.argv[0], "exec"), {"__name__": "__main__"})
    except SystemExit as ended:
        if ended.code:
            raise


def by_accelerate(
    folder: Path, cases: Mapping[str, StageConfig], env: Mapping[str, str] | None = None
) -> None:
    """Train configs, by name, in two processes that `accelerate launch` starts: of gloo, or with a GPU each."""
    write(folder, cases, TRAIN)
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    plain = ["--mixed_precision=no", "--dynamo_backend=no"]
    done = subprocess.run(
        [sys.executable, *launch, *plain, str(folder / "two.py"), str(folder), *cases],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | dict(env or {}),
    )
    assert done.returncode == 0, done.stderr[-3000:]


def write(folder: Path, cases: Mapping[str, StageConfig], script: str) -> None:
    """The files that the processes read."""
    for name, config in cases.items():
        (folder / f"{name}.json").write_text(to_json(config))
    (folder / "two.py").write_text(script)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
