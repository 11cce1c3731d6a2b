"""All that a run needs to resume bit for bit: taken from a run, and put back into one. No pickles: tensors and JSON.

Of weights in shards every process saves its rows, and a resumed one reads those that it then holds, in whatever layout
they were saved.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tuner.errors import UserError
from tuner.training.parts import Part, Rows

_HEADER = "tuner"
"""Key of a file's metadata under which the rows of its tensors stand, as JSON."""
_RANDOM = "random.safetensors"


@dataclass(frozen=True)
class TensorFile:
    """The tensors of one file, in host memory."""

    tensors: Mapping[str, torch.Tensor]
    rows: Mapping[str, Rows] = field(default_factory=dict[str, Rows])
    """Name of a weight, or index of one in the optimizer -> the rows of it that are here; without an entry: all."""
    state: Any = None
    """The parts of the optimizer's state that are no tensors, where those of other processes may differ."""

    def write(self, path: Path) -> None:
        header = {_HEADER: json.dumps({"rows": self.rows, "state": self.state})} if self.rows else None
        save_file(dict(self.tensors), path, metadata=header)


@dataclass(frozen=True)
class Snapshot:
    """What one process saves of a run."""

    files: dict[str, TensorFile]
    """By file name. None where another process saves the same."""
    state: dict[str, Any]
    """JSON: `counters`, and the parts of optimizer and generator states that are no tensors."""


class SavedWeights:
    """The trained weights in a checkpoint, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises what safetensors does for files that it cannot read."""
        self._files = _files(folder, "trained")

    @property
    def names(self) -> set[str]:
        return {name for file in self._files for name in file.names}

    def read(self, name: str, rows: Rows | None = None) -> torch.Tensor:
        """Some rows of a weight; None: all of them. Raises KeyError for a name that there is not."""
        pieces = [_Piece(file, name, file.rows.get(name)) for file in self._files if name in file.names]
        if not pieces:
            raise KeyError(name)
        return _read_rows(pieces, rows)


class SavedRun:
    """A checkpoint's content, of which tensors are read when they are asked for."""

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        """state: the JSON that was saved with it. Raises what safetensors does for files that it cannot read."""
        self.state = state
        """JSON, as in Snapshot."""
        self.trained = SavedWeights(folder)
        self._optimizer, self._random = _files(folder, "optimizer"), _File(folder / _RANDOM)

    def optimizer(self, parts: Sequence[Part]) -> dict[str, Any]:
        """The optimizer's `state_dict` of parts of the weights. Raises UserError where it cannot be cut so."""
        of_main = self.state["optimizer"]
        shown = dict(zip(of_main["keys"], of_main["values"], strict=True))
        in_files = [_saved_states(file, shown["state"]) for file in self._optimizer]
        state: dict[int, Any] = {}
        for index, part in enumerate(parts):
            saved = [states[index] for states in in_files if index in states]
            # of an empty part none: its optimizer has none
            if saved and part.own.numel():
                state[index] = _state_of(saved, part)
        return {"state": state, "param_groups": _join_tensors({}, shown["param_groups"])}

    def generators(self) -> dict[str, Any]:
        """Generator states by rank."""
        tensors = {name: self._random.read(name) for name in self._random.names}
        return _join_tensors(tensors, self.state["random"])


def snapshot(
    parts: Mapping[str, Part],
    optimizer: torch.optim.Optimizer,
    generators: list[dict[str, Any]],
    counters: dict[str, Any],
    *,
    number: int = 1,
    count: int = 1,
) -> Snapshot:
    """Copy what this process saves of a run to host memory. generators: `generator_state()` of every rank.

    number, count: which of the processes this is that hold the weights together. The first saves what all have.
    """
    saves = {id(part) for part in parts.values() if number == 1 or part.rows is not None}
    trained = {name: part for name, part in parts.items() if id(part) in saves}
    indices = {index: part for index, part in enumerate(_in_order(parts, optimizer)) if id(part) in saves}
    of_optimizer: dict[str, Any] = optimizer.state_dict()
    # in the order of the weights, and not in that in which they were first updated: a resumed run saves the same
    of_optimizer["state"] = {
        index: of_optimizer["state"][index] for index in indices if index in of_optimizer["state"]
    }
    tensors, rest = _split_tensors(of_optimizer)
    place = "" if count == 1 else f"-{number:05d}-of-{count:05d}"
    files = {
        f"trained{place}.safetensors": TensorFile(
            _on_host({name: part.own for name, part in trained.items() if part.own.numel()}),
            _rows_of(trained),
        ),
        f"optimizer{place}.safetensors": TensorFile(
            _on_host(tensors),
            _rows_of({str(index): part for index, part in indices.items()}),
            dict(zip(rest["keys"], rest["values"], strict=True))["state"],
        ),
    }
    tensors, of_generators = _split_tensors({str(rank): state for rank, state in enumerate(generators)})
    if number == 1:
        files[_RANDOM] = TensorFile(_on_host(tensors))
    state = {"counters": counters, "optimizer": rest, "random": of_generators, "trained": list(parts)}
    return Snapshot(files, state)


def restore(
    saved: SavedRun, parts: Mapping[str, Part], optimizer: torch.optim.Optimizer, rank: int
) -> dict[str, Any]:
    """Load a checkpoint into a run; returns its counters. Raises UserError when it is of another model, or its
    optimizer's state cannot be cut as the run is laid out."""
    # the order too: an optimizer's state_dict numbers its weights
    if saved.state["trained"] != list(parts):
        raise UserError("this checkpoint trains other weights than the config does: was the model replaced?")
    restore_weights(saved, parts)
    optimizer.load_state_dict(saved.optimizer(_in_order(parts, optimizer)))
    generators = saved.generators()
    if str(rank) in generators:
        set_generator_state(generators[str(rank)])
    return saved.state["counters"]


def restore_weights(saved: SavedRun, parts: Mapping[str, Part]) -> None:
    """Set this process's parts of the weights to those of a checkpoint."""
    with torch.no_grad():
        for name, part in parts.items():
            part.own.copy_(saved.trained.read(name, part.rows))


def generator_state() -> dict[str, Any]:
    """State of every random generator of this process, as nested dicts and lists."""
    _, numpy_keys, *numpy_rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": {
            "keys": torch.from_numpy(np.asarray(numpy_keys).astype(np.int64)),
            "rest": numpy_rest,
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_generator_state(state: dict[str, Any]) -> None:
    """Restore what `generator_state` returned, also after JSON has turned its tuples into lists."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, rest = state["numpy"]["keys"], state["numpy"]["rest"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class _File:
    """A file of tensors, read piece by piece."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, "pt")
        self.names = frozenset[str](self._file.keys())
        header = json.loads((self._file.metadata() or {}).get(_HEADER, "{}"))
        self.rows = {name: Rows(*rows) for name, rows in header.get("rows", {}).items()}
        self.state: Any = header.get("state")

    def read(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)

    def read_rows(self, name: str, first: int, end: int) -> torch.Tensor:
        return self._file.get_slice(name)[first:end]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())


def _files(folder: Path, name: str) -> list[_File]:
    """The files of a checkpoint's `trained` or `optimizer` tensors: one, or one of each process that saved a part."""
    paths = [*folder.glob(f"{name}.safetensors"), *folder.glob(f"{name}-*-of-*.safetensors")]
    if not paths:
        raise FileNotFoundError(f"there is no {name}.safetensors")
    return [_File(path) for path in sorted(paths)]


@dataclass(frozen=True)
class _Piece:
    """Some rows of a tensor, in a file."""

    file: _File
    name: str
    """In the file."""
    rows: Rows | None
    """None: all."""


def _read_rows(pieces: Sequence[_Piece], wanted: Rows | None) -> torch.Tensor:
    """Some rows of a tensor; None: all of it. Nothing else is read."""
    pieces = sorted(pieces, key=lambda piece: piece.rows or Rows(0, 0))
    if wanted is None:
        read = [piece.file.read(piece.name) for piece in pieces]
    else:
        read: list[torch.Tensor] = []
        for piece in pieces:
            rows = piece.rows or Rows(0, wanted.end)
            first, end = max(rows.first, wanted.first), min(rows.end, wanted.end)
            if first < end:
                read.append(piece.file.read_rows(piece.name, first - rows.first, end - rows.first))
        if not read:  # no rows: empty, but of the right shape
            read.append(pieces[0].file.read_rows(pieces[0].name, 0, 0))
    return read[0] if len(read) == 1 else torch.cat(read)


@dataclass(frozen=True)
class _SavedState:
    """The optimizer's state of some rows of a weight, in a file."""

    file: _File
    rows: Rows | None
    """None: all."""
    tree: Any
    """The state, with {"tensor": name in the file} in the place of tensors; see `_split_tensors`."""


def _saved_states(file: _File, of_main: Any) -> dict[int, _SavedState]:
    """The optimizer's states in a file, by the index of the weight. of_main: what of them is no tensor, where the file
    does not say."""
    states = of_main if file.state is None else file.state
    return {
        index: _SavedState(file, file.rows.get(str(index)), tree)
        for index, tree in zip(states["keys"], states["values"], strict=True)
    }


def _state_of(saved: Sequence[_SavedState], part: Part) -> Any:
    """The optimizer's state of a part of a weight, from what processes saved of its rows."""
    whole = Rows(0, len(part.weight)) if part.weight.ndim else None
    for state in saved:
        if (state.rows or whole) == (part.rows or whole):  # as it was saved, whatever it consists of
            return _state_value([state], part, None)
    return _state_value(saved, part, part.rows or whole)


def _state_value(saved: Sequence[_SavedState], part: Part, wanted: Rows | None) -> Any:
    """The optimizer's state of a part, or a value in it; wanted: its rows; None: as it was saved."""
    tree = saved[0].tree
    if not isinstance(tree, dict):
        return tree
    if "keys" in tree:
        if any(state.tree["keys"] != tree["keys"] for state in saved):
            raise _not_cut()
        return {
            key: _state_value([replace(state, tree=state.tree["values"][i]) for state in saved], part, wanted)
            for i, key in enumerate(tree["keys"])
        }
    pieces = [_Piece(state.file, state.tree["tensor"], state.rows) for state in saved]
    if wanted is None or not pieces[0].file.shape(pieces[0].name):  # such as the count of steps
        return pieces[0].file.read(pieces[0].name)
    for piece in pieces:
        height = len(part.weight) if piece.rows is None else piece.rows.end - piece.rows.first
        if piece.file.shape(piece.name) != (height, *part.weight.shape[1:]):
            raise _not_cut()
    return _read_rows(pieces, wanted)


def _not_cut() -> UserError:
    """The state of 8-bit optimizers has scales of blocks of 256 numbers, and of small parts is in 32 bits."""
    return UserError(
        "this checkpoint's optimizer state is in 8 bits, and can only be divided as it was: go on with the "
        "parallel.shard that it was saved with"
    )


def _in_order(parts: Mapping[str, Part], optimizer: torch.optim.Optimizer) -> list[Part]:
    """The parts in the order in which an optimizer's state numbers them."""
    by_weight = {id(part.own): part for part in parts.values()}
    return [by_weight[id(weight)] for group in optimizer.param_groups for weight in group["params"]]


def _rows_of(parts: Mapping[str, Part]) -> dict[str, Rows]:
    return {name: part.rows for name, part in parts.items() if part.rows is not None}


def _on_host(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # copy=True: on CPU `to` returns the same memory, and training would go on inside the snapshot;
    # contiguous, as safetensors writes nothing else
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _split_tensors(tree: Any, prefix: str = "") -> tuple[dict[str, torch.Tensor], Any]:
    """Nested dicts and lists as (tensors by path, the same tree with {"tensor": path} in their place).

    Dicts become {"keys": [...], "values": [...]}: JSON has no integer keys.
    """
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}, {"tensor": prefix}
    if not isinstance(tree, dict | list | tuple):
        return {}, tree
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    tensors: dict[str, torch.Tensor] = {}
    values = []
    for key in keys:
        below, rest = _split_tensors(tree[key], f"{prefix}.{key}" if prefix else str(key))
        tensors |= below
        values.append(rest)
    return tensors, {"keys": list(keys), "values": values} if isinstance(tree, dict) else values


def _join_tensors(tensors: Mapping[str, torch.Tensor], tree: Any) -> Any:
    if isinstance(tree, list):
        return [_join_tensors(tensors, item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    values = (_join_tensors(tensors, value) for value in tree["values"])
    return dict(zip(tree["keys"], values, strict=True))
