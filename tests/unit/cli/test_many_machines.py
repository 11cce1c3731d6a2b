"""The scripts of docs/many_machines.md, run with stand-ins for ssh, srun and torchrun that write down what they get."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "many_machines.md").read_text(encoding="utf-8")
HOSTS, SLURM, RESTARTS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
(SKY,) = (yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S))
RECORD = """#!/bin/bash
echo "$(basename "$0") $RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR:$MASTER_PORT: ${@@Q}" >> $RECORD
"""
STAND_INS = {
    **dict.fromkeys(("ssh", "torchrun", "tuner"), RECORD),
    "scontrol": '#!/bin/bash\n[ "$*" = "show hostnames node-[1-4]" ] && printf "node-1\\nnode-2\\n"\n',
    # the second rank of the second of four machines
    "srun": '#!/bin/bash\n[ "$1" = --kill-on-bad-exit=1 ] && shift && SLURM_PROCID=9 SLURM_LOCALID=1 "$@"\n',
}


@pytest.fixture
def calls(tmp_path: Path):
    """Run a script; returns for each call of a stand-in its name with the rank's place, and its arguments."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in STAND_INS.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(script: str, *arguments: str, **variables: str) -> list[tuple[str, list[str]]]:
        file, record = tmp_path / "script.sh", tmp_path / "record"
        file.write_text(script)
        environment = {"PATH": f"{tools}:{os.environ['PATH']}", "RECORD": str(record)} | variables
        subprocess.run(["bash", str(file), *arguments], env=environment, cwd=tmp_path, check=True, timeout=60)
        lines = [line.partition(": ") for line in sorted(record.read_text().splitlines())]
        return [(place, shlex.split(given)) for place, _, given in lines]

    return run


def assert_trains(arguments: list[str], *settings: str) -> None:
    assert arguments[0] == "train"
    assert (ROOT / arguments[1]).is_file()
    assert arguments[2:] == list(settings)


def test_accelerate_on_a_list_of_hosts(calls, tmp_path):
    from accelerate.commands.launch import launch_command_parser

    (tmp_path / "hosts").write_text("one\ntwo\n")
    started = calls(HOSTS, "hosts", "configs/internlm2_20b_qlora.py", "parallel.shard=8")
    assert len(started) == 2
    for _, (no_input, host, command) in started:
        assert no_input == "-n"
        folder, accelerate = command.split(" && ")
        assert folder == f"cd '{tmp_path}'"
        words = shlex.split(accelerate)
        assert words[:2] == ["accelerate", "launch"]
        given = launch_command_parser().parse_args(words[2:])
        assert given.machine_rank == ["one", "two"].index(host)
        assert (given.num_machines, given.num_processes, given.main_process_ip) == (2, 16, "one")
        assert given.module
        assert given.training_script == "tuner"
        assert_trains(given.training_script_args, "parallel.shard=8")


def test_slurm_starts_the_ranks_themselves(calls):
    ((place, arguments),) = calls(SLURM, SLURM_JOB_NODELIST="node-[1-4]", SLURM_NTASKS="32")
    assert place == "tuner 9 1 32 node-1:29500"
    assert_trains(arguments, "parallel.shard=8")
    for line in re.findall("^#SBATCH (.*)$", SLURM, re.MULTILINE):
        assert re.fullmatch(r"--[a-z-]+=\S+", line)


def test_skypilot(calls):
    # the fields of a task in SkyPilot 0.14's schema (sky/utils/schemas.py, get_task_schema)
    assert SKY.keys() == {"name", "resources", "num_nodes", "workdir", "file_mounts", "setup", "run"}
    variables = {
        "NODE_IPS": "10.0.0.1\n10.0.0.2",
        "NUM_NODES": "2",
        "NODE_RANK": "1",
        "NUM_GPUS_PER_NODE": "8",
    }
    ((_, arguments),) = calls(SKY["run"], **{f"SKYPILOT_{name}": value for name, value in variables.items()})
    given = torchrun(arguments)
    assert (given.node_rank, given.nnodes, given.nproc_per_node) == (1, "2", "8")
    assert (given.master_addr, given.master_port) == ("10.0.0.1", 29500)
    assert_trains(given.training_script_args, "parallel.shard=8", "--runs", "/runs")


def test_restarts(calls):
    ((_, arguments),) = calls(RESTARTS)
    given = torchrun(arguments)
    assert (given.max_restarts, given.shutdown_timeout) == (3, 600)
    assert_trains(given.training_script_args)


def torchrun(arguments: list[str]):
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(arguments)
    assert given.module
    assert given.training_script == "tuner"
    return given
