"""From a config's model to the folders it is read from."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tuner import config
from tuner.config.model import MODELSCOPE, refuse_missing_model
from tuner.errors import MissingError, UserError
from tuner.models.adapter_file import FILE as ADAPTER_FILE
from tuner.models.adapter_file import read_adapter_file
from tuner.models.base_record import BaseReference, Record, read_record
from tuner.models.fingerprint import fingerprint
from tuner.models.folder_files import first_line
from tuner.models.model_file import FILE as MODEL_FILE
from tuner.models.model_file import read_model_file
from tuner.resources import locate as locate_shipped

MODEL_FOLDER = "model"
"""Where a run folder keeps its model."""

_WEIGHTS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "tokenizer*")
_CODE = ("*.py",)
# second copies of the weights in many hub repositories
_DUPLICATES = ("consolidated*", "original/*", "*/*.safetensors", "*.gguf")


@dataclass(frozen=True)
class Location:
    """The folders of a model, and a reference to its base."""

    base_folder: Path
    """Folder with the configuration and weights of the base."""

    adapter_folder: Path | None
    """PEFT folder of an adapter trained on that base, if any."""

    reference: BaseReference
    """The base with its quantization and rope, those of the adapter's training or else the config's."""

    adapter: config.Adapter | None
    """Settings of the saved adapter; None where tuner did not write it."""

    def with_reference(self, **changes: Any) -> "Location":
        """The same location, its base loaded with these values of BaseReference."""
        return replace(self, reference=replace(self.reference, **changes))

    def shares_base_with(self, other: "Location") -> bool:
        """Whether both have the same base, held alike; by its path where no weights are at hand."""
        bases = self.reference, other.reference
        fields = ["quantization", "rope", "precision", "embedding_rows"]
        fields.append("fingerprint" if all(base.fingerprint for base in bases) else "path")
        return all(getattr(bases[0], name) == getattr(bases[1], name) for name in fields)

    @property
    def folder(self) -> Path:
        """The adapter's folder, or else the base's: chat template and reward record are read from it."""
        return self.adapter_folder or self.base_folder

    @property
    def has_score(self) -> bool:
        """Whether it is a reward model, with a scalar head in the base or beside the adapter."""
        if self.adapter_folder is not None:
            return read_adapter_file(self.adapter_folder).task_type == "SEQ_CLS"
        return self.base_has_score

    @property
    def base_has_score(self) -> bool:
        """Whether the base itself has a scalar head."""
        return read_model_file(self.base_folder).has_score

    @property
    def precision(self) -> Literal["bf16", "fp32"]:
        """Precision in which an adapter's base was held in training; of a complete model, that of its file."""
        if self.adapter_folder is not None:
            return self.reference.precision
        return read_model_file(self.base_folder).precision

    @property
    def tokenizer_folder(self) -> Path:
        """The adapter's own tokenizer where it has one: tokens may have been added."""
        adapter = self.adapter_folder
        if adapter is not None and any(adapter.glob("tokenizer*")):
            return adapter
        return self.base_folder


def locate(
    model: config.Model, precision: Literal["bf16", "fp32"] = "bf16", *, weights: bool = True
) -> Location:
    """Find a model: `tuner:...`, a run folder, an adapter's folder, a full model's folder, or a hub name.

    weights: False fetches configuration and tokenizer only, leaves the fingerprint empty (an adapter's is the recorded
    one), and accepts a folder without weights. Raises MissingError when the model is missing, and UserError when an
    adapter's base is not the one it was trained on, or the config names another quantization or rope than the adapter
    was trained with.
    """
    folder, revision = _folder(model.path, model, weights)
    if model.revision is not None and revision is None:
        raise UserError(
            f"model.revision={model.revision!r}: {model.path} is a folder, not a hub name; leave it out"
        )
    if not Path(folder, ADAPTER_FILE).is_file():
        _check_is_model(folder, model.path, weights)
        reference = BaseReference(
            path=model.path,
            revision=revision,
            fingerprint=fingerprint(folder) if weights else "",
            quantization=_quantization(model, folder),
            rope=model.rope,
            precision=precision,
            found_at=None if revision else str(folder.resolve()),
        )
        return Location(folder, None, reference, None)
    return _locate_adapter(model, folder, precision, weights)


def _locate_adapter(
    model: config.Model, folder: Path, precision: Literal["bf16", "fp32"], weights: bool
) -> Location:
    record = read_record(folder)
    if record is None:
        base = model.model_copy(update={"path": _base_of_foreign(folder), "revision": None})
        location = locate(base, precision, weights=weights)
        return Location(location.base_folder, folder, location.reference, None)
    _check_inherits(model, record, folder)
    base_folder = _base_folder(model, record, folder, weights)
    _check_is_model(base_folder, record.base.path, weights)
    current = fingerprint(base_folder) if weights else record.base.fingerprint
    if current != record.base.fingerprint:
        raise UserError(
            f"{folder}: its adapter was trained on another {record.base.path} than is in {base_folder} now "
            f"(fingerprint {record.base.fingerprint[:12]}, found {current[:12]}); restore it, or train again"
        )
    return Location(base_folder, folder, record.base, record.adapter)


def _folder(path: str, model: config.Model, weights: bool) -> tuple[Path, str | None]:
    """The local folder of a path, and the commit where it came from the hub."""
    folder = Path(locate_shipped(path))
    if Path(folder, MODEL_FOLDER).is_dir():
        return folder / MODEL_FOLDER, None
    # written when a run starts, so a folder with it and without a model is a run under way or stopped
    if Path(folder, "versions.json").is_file():
        raise UserError(
            f"{path}: this run has not finished, so it has no model of its own; `tuner train --stop` makes one of it, "
            "and each of its checkpoints is one for the commands that take a model"
        )
    if folder.is_dir():
        return folder, None
    if folder.exists():
        raise UserError(f"{path}: a model is a folder or a hub name, and this is a file; name its folder")
    refuse_missing_model(path)
    if path.startswith(MODELSCOPE):
        return _download_from_modelscope(path, model, weights)
    return _download(path, model, weights)


def _download(name: str, model: config.Model, weights: bool) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    code = _CODE if model.trust_remote_code else ()
    try:
        folder = snapshot_download(
            name,
            revision=model.revision,
            allow_patterns=[*_WEIGHTS, *code],
            ignore_patterns=[*_DUPLICATES, *(() if weights else ("*.safetensors",))],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise MissingError(
            f"{name}: neither a folder here nor to be had from the Hugging Face hub ({first_line(error)}); "
            "check the name, the network and your access, or give the path of a folder"
        ) from error
    # the hub's cache names a snapshot's folder by its commit
    return Path(folder), Path(folder).name


def _download_from_modelscope(name: str, model: config.Model, weights: bool) -> tuple[Path, str]:
    try:
        from modelscope import snapshot_download  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"{name}: ModelScope's library is not installed; `pip install modelscope`, or give the path of a folder"
        ) from error
    code = _CODE if model.trust_remote_code else ()
    revision = model.revision or "master"
    try:
        folder = snapshot_download(
            name.removeprefix(MODELSCOPE),
            revision=revision,
            allow_patterns=[*_WEIGHTS, *code],
            ignore_patterns=[*_DUPLICATES, *(() if weights else ("*.safetensors",))],
        )
    # its library raises errors of requests, of its own and of the system
    except Exception as error:
        raise MissingError(
            f"{name}: not to be had from ModelScope ({first_line(error)}); check the name, the network and your "
            "access, or give the path of a folder"
        ) from error
    return Path(folder), revision


def _base_folder(model: config.Model, record: Record, folder: Path, weights: bool) -> Path:
    """Folder of an adapter's base: by its name, or else where it was when the adapter was trained."""
    base = record.base
    # the commit of its training: the branch may have moved since
    named = model.model_copy(update={"revision": base.revision})
    elsewhere = Path(base.found_at) if base.found_at else None
    try:
        return _folder(base.path, named, weights)[0]
    except UserError as error:
        if elsewhere is not None and elsewhere.is_dir():
            return elsewhere
        raise MissingError(f"{folder}: the base of its adapter is missing: {error}") from error


def _base_of_foreign(folder: Path) -> str:
    base = read_adapter_file(folder).base_model_name_or_path
    if not base:
        raise UserError(f"{folder / ADAPTER_FILE}: names no base model; train again or restore it")
    return base


def stored_quantization(folder: Path) -> Literal["nf4", "int8"] | None:
    """How the weights in a model folder are quantized already; None where they are not.

    Raises UserError for a quantization that is not bitsandbytes' NF4 or LLM.int8().
    """
    values = read_model_file(folder).quantization_config
    if values is None:
        return None
    if values.get("quant_method", "bitsandbytes") == "bitsandbytes":
        if values.get("load_in_8bit"):
            return "int8"
        if values.get("load_in_4bit") and values.get("bnb_4bit_quant_type") == "nf4":
            return "nf4"
    raise UserError(
        f"{folder / MODEL_FILE}: its weights are quantized in another way ({values.get('quant_method')!r}) than NF4 or "
        'LLM.int8() by bitsandbytes; name the model that is not quantized, and write quantization="nf4"'
    )


def _quantization(model: config.Model, folder: Path) -> Literal["nf4", "int8"] | None:
    """Quantization of a base: the config's, or that of its file."""
    stored = stored_quantization(folder)
    if stored is None or model.quantization in (None, stored):
        return stored or model.quantization
    raise UserError(
        f"model.quantization={model.quantization!r}: the weights in {folder} are quantized already, to {stored}; "
        "leave it out"
    )


def _check_is_model(folder: Path, path: str, weights: bool) -> None:
    if not Path(folder, MODEL_FILE).is_file():
        raise UserError(f"{path}: no config.json in {folder}, so it is not a model folder; check the path")
    read_model_file(folder)
    if weights and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{path}: no *.safetensors in {folder}; convert the weights to safetensors, others are not read"
        )


def _check_inherits(model: config.Model, record: Record, folder: Path) -> None:
    if model.resize_embeddings and record.base.embedding_rows is None:
        raise UserError(
            f"model.resize_embeddings=True: the adapter in {folder} was trained without new rows; leave it out, or "
            "`tuner merge` the run first and name the merged folder"
        )
    for name in ("quantization", "rope"):
        requested, trained_with = getattr(model, name), getattr(record.base, name)
        if requested is not None and requested != trained_with:
            raise UserError(
                f"model.{name}={requested!r}: the adapter in {folder} was trained with {trained_with!r}; "
                f"leave {name} out, or `tuner merge` the run first and name the merged folder"
            )
