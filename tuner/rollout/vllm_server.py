"""A vLLM server as a process of its own, from an environment of its own: started, watched, ended."""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tuner.errors import UserError
from tuner.models.tool_python import tool_environment
from tuner.printable import printable
from tuner.rollout.vllm_client import KEY

PYTHON = "TUNER_VLLM_PYTHON"
"""Environment variable with the python of vLLM's environment."""
DEFAULT_PYTHON = ".venv-vllm/bin/python"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank."""
BASE = "base"
"""The name under which the server knows its model."""
GRACE = 20.0
"""Seconds that a server has to end by itself."""
POLL = 0.2
_CPU_CACHE_GIB = "1"
SHARE = 0.5
"""Part of the free GPU memory that a server beside the trainer takes at its start: the optimizer's state and the
activations of the first step are still to come."""
_LEAST = 0.05
"""Part of a GPU's memory below which no server is started: a model's weights alone take more."""
_REASON = re.compile(r"\b(ValueError|OutOfMemoryError): ")
"""What the first cause of a death looks like in vLLM's log; a `raise ValueError(` of a traceback has no colon."""


def find_python(named: str | None) -> Path:
    """The python of vLLM's environment: the named one, that of $TUNER_VLLM_PYTHON, or DEFAULT_PYTHON.

    Raises UserError where there is none. Whether vLLM is installed there is seen when it starts.
    """
    path = Path(named or os.environ.get(PYTHON) or DEFAULT_PYTHON).expanduser()
    if not path.is_file() or not os.access(path, os.X_OK):
        raise UserError(
            f"{path}: no python of vLLM's environment there; `make vllm` makes it in tuner's repository; elsewhere, "
            f"install vLLM into an environment of its own and name its python by engine.python, --python or ${PYTHON}"
        )
    return path.absolute()  # not resolved: a link's target does not know its environment


def max_rank(rank: int) -> int:
    """The least rank that vLLM can be started with for adapters of this rank. Raises UserError above its largest."""
    if rank > RANKS[-1]:
        raise UserError(
            f"an adapter of rank {rank} is more than vLLM loads ({RANKS[-1]}): lower adapter.r, or write engine=local"
        )
    return next(largest for largest in RANKS if largest >= rank)


def usable_port(port: int = 0) -> int:
    """A port on 127.0.0.1 that nothing listens on now; 0: any. Raises UserError where another program uses it."""
    with socket.socket() as probe:
        # as the server does: else a port that was just given up would count as used
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(
                f"--port {port}: cannot be used ({error.strerror}); name another, or 0"
            ) from error
        return probe.getsockname()[1]


@dataclass(frozen=True)
class ServerSettings:
    """How a server is started, whichever model it serves."""

    python: Path
    precision: Literal["bf16", "fp32"]
    max_rank: int | None
    """Largest rank of adapters; None: the server loads none."""
    processed_logprobs: bool
    """Whether log-probabilities are those after temperature, as sampling at another temperature than 1 needs; they are
    then of what top_p and top_k leave."""
    max_length: int | None
    """Tokens of prompt and answer together; None: as many as the model allows."""
    on_gpu: bool
    port: int
    arguments: Sequence[str] = ()
    shares_gpu: bool = False
    """Whether this process trains on the server's GPU, of which vLLM would take 0.9 by default, and refuse to start."""

    def command(self, model: Path) -> list[str]:
        """The command line that serves a model folder."""
        # -I: neither our PYTHONPATH nor the folder of the script, whose modules are none of vLLM's
        command = [str(self.python), "-I", str(Path(__file__).with_name("vllm_child.py")), str(os.getpid())]
        command += ["--model", str(model), "--served-model-name", BASE]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--dtype", "bfloat16" if self.precision == "bf16" else "float32"]
        command += ["--logprobs-mode", "processed_logprobs" if self.processed_logprobs else "raw_logprobs"]
        # else generation_config.json sets penalties and further end tokens of its own
        command += ["--generation-config", "vllm"]
        command += ["--disable-uvicorn-access-log"]  # a line for every answer of every step
        if self.max_length is not None:
            command += ["--max-model-len", str(self.max_length)]
        if self.max_rank is not None:
            command += ["--enable-lora", "--max-lora-rank", str(self.max_rank)]
        if not self.on_gpu:
            command += ["--enforce-eager"]  # compiling takes minutes there, and saves little
        elif self.shares_gpu and not any(map(_names_memory, self.arguments)):
            command += ["--gpu-memory-utilization", f"{free_share():.2f}"]
        return [*command, *self.arguments]

    def environment(self, key: str | None) -> dict[str, str]:
        """The server's environment variables: this process's, without what a launcher told it of its rank."""
        changes = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if self.max_rank is not None:
            changes["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
        if key is not None:  # not on the command line, which every user of the machine can read
            changes[KEY] = key
        if not self.on_gpu:
            changes |= {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", _CPU_CACHE_GIB)}
        return {**tool_environment(), **changes}


def free_share() -> float:
    """Part of the GPU's memory for a server beside this process, which trains on it: SHARE of what is free.

    Raises UserError where that is too little for a model.
    """
    import torch

    torch.cuda.empty_cache()  # what the allocator only keeps is free
    free, total = torch.cuda.mem_get_info()
    share = math.floor(100 * SHARE * free / total) / 100
    if share < _LEAST:
        raise UserError(
            f"engine=VLLM(): the GPU that trains has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, too little "
            "for a server beside the trainer; write engine=local, name a server on another GPU by engine.url, or set "
            'engine.arguments=("--gpu-memory-utilization=...",) yourself'
        )
    return share


def _names_memory(argument: str) -> bool:
    return argument.replace("_", "-").startswith("--gpu-memory-utilization")  # vLLM takes both spellings


class VLLMServer:
    """One server process and its children; they end with this process, also where it is killed."""

    def __init__(self, settings: ServerSettings, log: Path | None) -> None:
        """log: file that the server's output is appended to; None: it goes where this process's goes."""
        self.settings, self.log = settings, log
        self.key = os.environ.get(KEY) or secrets.token_urlsafe(24)
        """Whoever has an account on this machine could otherwise make the server load a folder of theirs."""
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        """Bytes that the log had when the server was started."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings.port}"

    @property
    def pid(self) -> int | None:
        """The process number, which is also that of its group; None where it is not running."""
        return self._process.pid if self.is_running and self._process is not None else None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, model: Path) -> None:
        """Start serving a model folder, in place of the one before; `wait` waits until it answers."""
        self.close()
        output = None if self.log is None else self.log.open("ab")
        self._log_start = 0 if output is None else output.tell()
        try:
            self._process = subprocess.Popen(
                self.settings.command(model),
                env=self.settings.environment(self.key),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                # a group of its own: Ctrl-C lets the run finish its step, which needs the server
                start_new_session=True,
            )
        finally:
            if output is not None:
                output.close()

    def wait(self, is_ready: Callable[[], bool], patience: float) -> None:
        """Wait until the server answers. Raises UserError where it dies first, or not within `patience` seconds."""
        deadline = time.monotonic() + patience
        while not is_ready():
            if not self.is_running:
                raise UserError(f"vLLM did not start: {self.last_words()}")
            if time.monotonic() > deadline:
                self.close()
                raise UserError(
                    f"vLLM did not answer within {patience:g} s of its start; raise engine.patience, or see "
                    f"{self.log or 'its output'}"
                )
            time.sleep(POLL)

    def join(self) -> int:
        """Wait until the server ends; returns its exit code."""
        assert self._process is not None
        return self._process.wait()

    def close(self) -> None:
        """End the server and all its processes."""
        process, self._process = self._process, None
        if process is None:
            return
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        _signal_group(process.pid, signal.SIGKILL)  # its workers, too, where it died without them
        process.wait()

    def last_words(self) -> str:
        """What the log says of its end, in one line: the first cause, to which vLLM's last lines refer."""
        if self.log is None:
            return "see its output above"
        try:
            text = self.log.read_bytes()[self._log_start :].decode(errors="replace")
        except OSError:
            text = ""
        lines = text.splitlines()[-200:]
        causes = [line for line in lines if _REASON.search(line)]
        telling = causes[:1] or [line for line in lines if "Error" in line or "error" in line]
        line = (telling or lines or ["it said nothing"])[-1]
        return f"{printable(line.strip())[-300:]} (all of it: {self.log})"


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return
