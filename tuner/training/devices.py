"""The accelerate door: where a run computes, in what precision, and how its processes add up.

There is no DDP wrapper: it expects as many backward passes on every rank, and averages gradients over ranks. Here a
rank may have more passes than another, or none (unless ranks hold a model in shards: see `Share`), every pass divides
its loss by the global total of its step, and gradients are summed once per update.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Literal, Self, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from tuner.config.parallel import Parallel
from tuner.config.stage_config import TrainingConfig
from tuner.data.packing import Share
from tuner.errors import UserError
from tuner.models.arithmetic import product_precision
from tuner.models.cuda_allocator import let_segments_grow
from tuner.training import heartbeat
from tuner.training.launch_settings import layout
from tuner.training.mesh import Mesh
from tuner.training.resident_memory import peak_resident_kib, reset_peak_resident

T = TypeVar("T")
K = TypeVar("K")

PATIENCE = timedelta(days=2)
"""How long ranks wait for one that works. One that is gone or hangs is named by the heartbeat, within a minute."""
BUCKET_ELEMENTS = 2**24
"""Gradients summed over ranks in one call: 64 MiB of fp32."""
CPU_KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
"""Compiled kernels that oneDNN and torch keep. bf16 products on a CPU compile one for each shape, which packed passes
hardly ever repeat: with the libraries' 1,024, memory grows for hundreds of steps. A layer needs fewer than 64."""


class Devices:
    """The processes and devices of a run, behind one Accelerator."""

    def __init__(
        self,
        *,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        precision: Literal["bf16", "fp32"] = "bf16",
        deterministic: bool = False,
        parallel: Parallel | None = None,
    ) -> None:
        """Join the processes that were launched. parallel: their layout; None: each holds a model whole.

        Raises UserError when there are too few GPUs, or where the processes cannot be laid out so.
        """
        on_gpu = device != "cpu" and torch.cuda.is_available()
        if device == "cuda" and not on_gpu:
            raise UserError(
                "device='cuda': torch sees no GPU here; install a CUDA build of torch, or write device=cpu"
            )
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if on_gpu and local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{local_rank + 1} processes or more, but {torch.cuda.device_count()} GPUs: one process per GPU"
            )
        if deterministic:
            # cuBLAS is deterministic only with a fixed workspace, read at its first call
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if on_gpu:
            let_segments_grow()
        else:
            for name, capacity in CPU_KERNEL_CACHES.items():  # read at the first product
                os.environ.setdefault(name, capacity)
        torch.use_deterministic_algorithms(deterministic)
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        # before the processes meet, which takes as long as the last of them takes to start
        heartbeat.start(int(os.environ.get("RANK", "0")), launched, spins=on_gpu)
        # after the heartbeat's fork, as it may ask the GPU
        device_here = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
        self.products = product_precision(device_here, precision)
        """Precision of matrix products."""
        _meet_again("nccl" if on_gpu else "gloo", launched)
        # A notebook, or a round of a run, may have trained in another precision before.
        AcceleratorState._reset_state(reset_partial_state=launched == 1)
        self._accelerator = Accelerator(
            cpu=not on_gpu,
            mixed_precision="bf16" if self.products == "bf16" else "no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        if self.world > 1:
            atexit.register(_leave)
        if launched != self.world:
            raise UserError(
                f"{launched} processes were launched, but accelerate joins {self.world}: run `accelerate config`"
            )
        self.mesh = Mesh.of(parallel or Parallel(), self.rank, self.world, self.device)
        """Which processes hold a model, or compute a row, together."""

    @classmethod
    def of(cls, config: TrainingConfig) -> Self:
        """The devices that a stage's config names, and its layout of the processes."""
        return cls(
            device=config.device,
            precision=config.precision,
            deterministic=config.deterministic,
            parallel=layout(config),
        )

    @classmethod
    def unsharded(cls, config: TrainingConfig) -> Self:
        """The same for a model that every process holds whole, as one that has been trained is measured."""
        layout(config)  # whatever the launcher says of shards is taken away, and refused where it cannot hold
        return cls(device=config.device, precision=config.precision, deterministic=config.deterministic)

    @property
    def device(self) -> torch.device:
        return self._accelerator.device

    @property
    def rank(self) -> int:
        return self._accelerator.process_index

    @property
    def world(self) -> int:
        return self._accelerator.num_processes

    @property
    def share(self) -> Share:
        """This process's part of the passes that are dealt to all."""
        return self.mesh.share

    @property
    def is_main(self) -> bool:
        return self._accelerator.is_main_process

    @property
    def place(self) -> dict[str, str | int]:
        """Device, products' precision, processes and threads, which must stay the same to resume bit for bit."""
        kind = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        threads = torch.get_num_threads()
        return {"device": kind, "products": self.products, "processes": self.world, "threads": threads}

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in the run's precision."""
        return self._accelerator.autocast()

    def main_first(self) -> AbstractContextManager[None]:
        """The main process goes first, the others follow: for work that leaves a cache behind."""
        return self._accelerator.main_process_first()

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self._accelerator.wait_for_everyone()

    def synchronize(self) -> None:
        """Wait until this device has done the work that was queued for it; no other rank's, but for exchanges with it.

        The heartbeat takes it for a wait for other ranks, which it does not of a wait elsewhere (`.item()`).
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def sum(self, values: dict[K, float]) -> dict[K, float]:
        """Each value summed over all ranks; a rank that lacks a name adds nothing to it.

        Ranks that compute their rows together have the same values, which count once.
        """
        # not all_reduce, which needs the same names on every rank; added in the order of ranks, all get the
        # same bits
        return sum_by_name(self.gather([values] if self.mesh.leads_row else []))

    def gather(self, items: list[Any]) -> list[Any]:
        """The lists of all ranks joined, by rank; the same on every rank."""
        return gather_object(items) if self.world > 1 else items

    def maxima(self, values: list[int]) -> list[int]:
        """The largest of each value over ranks, which have as many; one exchange, where `gather` makes two."""
        if self.world == 1:
            return values
        largest = torch.tensor(values, device=self.device)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return largest.tolist()

    def share_out(self, count: int, work: Callable[[list[int]], Sequence[T]]) -> list[T]:
        """Results for the indices 0 to `count`, in their order and on every rank; each rank computes a share of them.

        work: takes some of the indices, and returns a result for each.
        """
        share = list(range(count))[self.rank :: self.world]
        return self._in_order(list(zip(share, work(share), strict=True)) if share else [])

    def by_pass(
        self, passes: Sequence[Sequence[int]], work: Callable[[Sequence[int]], Sequence[T]]
    ) -> list[T]:
        """Results for the indices in some passes, by index and on every rank; each rank makes its share of the passes.

        work: makes a pass, perhaps an empty one, and returns a result for each of its indices.
        """
        results = [pair for share in self.share.of(passes) for pair in zip(share, work(share), strict=True)]
        return self._in_order(results if self.mesh.leads_row else [])

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over ranks, in flat buckets.

        A gradient that a rank lacks counts as zero: a rank without a pass has none, and the others wait for it all the
        same. One that all ranks lack stays None, as in one process: at zeros the optimizer would still decay the
        weight, and move it by momentum.
        """
        if self.world > 1:
            self._sum_gradients(parameters, None)

    def sum_over_replicas(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """The same for this rank's parts of weights in shards, over the ranks that hold the same parts."""
        if parameters and self.mesh.replicas is not None:
            self._sum_gradients(parameters, self.mesh.replicas.get_group())

    def sum_over_shards(self, value: torch.Tensor) -> torch.Tensor:
        """A scalar summed over the ranks that hold the weights together with this one."""
        assert self.mesh.shards is not None
        total = value.to(self.device, copy=True)
        torch.distributed.all_reduce(total, group=self.mesh.shards.get_group())
        return total

    def _sum_gradients(self, parameters: Sequence[torch.nn.Parameter], group: Any) -> None:
        ranks_with_gradient = torch.tensor(
            [float(parameter.grad is not None) for parameter in parameters], device=self.device
        )
        torch.distributed.all_reduce(ranks_with_gradient, group=group)
        counts: list[float] = ranks_with_gradient.tolist()
        parameters = [parameter for parameter, count in zip(parameters, counts, strict=True) if count]
        # a call per parameter would pay for the latency of each of hundreds of small adapters; a single call
        # would need a second copy of all gradients at once
        for bucket in _buckets(parameters):
            flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in bucket])
            torch.distributed.all_reduce(flat, group=group)
            sizes = [parameter.numel() for parameter in bucket]
            for parameter, summed in zip(bucket, flat.split(sizes), strict=True):
                parameter.grad = summed.view_as(parameter)

    def _in_order(self, results: list[tuple[int, T]]) -> list[T]:
        """The results of all ranks, each with its index, in the order of the indices."""
        return [result for _, result in sorted(self.gather(results), key=lambda pair: pair[0])]

    def memory_gib(self) -> float:
        """Peak memory of this process since `reset_peak_memory`: the GPU's allocator, or resident memory on CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return peak_resident_kib() / 2**20

    def free_gib(self) -> float | None:
        """Memory of the GPU that nothing holds; None on a CPU."""
        return free_gib(self.device)

    def reset_peak_memory(self) -> None:
        """Let the peak begin anew: a process may train one run after another."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        reset_peak_resident()


def free_gib(device: torch.device) -> float | None:
    """Memory of a GPU that nothing holds, in GiB; None for a CPU. What this process has let go counts as free."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0] / 2**30


def _meet_again(backend: str, world: int) -> None:
    """Where torchrun has started the ranks again, have them meet under names of their own.

    torchrun keeps the store in which ranks meet, and in it the addresses of those before, to which they would connect
    (https://github.com/pytorch/pytorch/issues/135712). Raises UserError on several machines, whose counts of restarts
    differ.
    """
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    shares_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if world == 1 or not restarts or not shares_store or torch.distributed.is_initialized():
        return
    if os.environ.get("LOCAL_WORLD_SIZE") != str(world):
        raise UserError(
            "torchrun has started the ranks again, in the store of those before: set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on every machine"
        )
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = PrefixStore(f"tuner/restart/{restarts}", TCPStore(address, port, is_master=False))
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)


def _leave() -> None:
    """Take this process out of its group before it ends: gloo's threads, left running, can abort the exit (134)."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def sum_by_name(parts: Iterable[Mapping[K, float]]) -> dict[K, float]:
    """Several parts' values summed by name; a part that lacks a name adds nothing to it."""
    totals: dict[K, float] = {}
    for part in parts:
        for name, value in part.items():
            totals[name] = totals.get(name, 0.0) + value
    return totals


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """The parameters in their order, in lists of at most BUCKET_ELEMENTS elements or of one parameter."""
    buckets: list[list[torch.nn.Parameter]] = [[]]
    room = BUCKET_ELEMENTS
    for parameter in parameters:
        if buckets[-1] and parameter.numel() > room:
            buckets.append([])
            room = BUCKET_ELEMENTS
        buckets[-1].append(parameter)
        room -= parameter.numel()
    return [bucket for bucket in buckets if bucket]
