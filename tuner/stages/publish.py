"""A run's model on the Hugging Face hub or ModelScope: what is uploaded, and the upload.

Uploads are not tested against the hosts; what would be uploaded is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tuner.errors import UserError
from tuner.models.folder_files import first_line
from tuner.stages.model_card import CARD, CURVES, model_card
from tuner.stages.run import Run

_DESTINATION = re.compile(r"(hf|modelscope):([\w.-]+/[\w.-]+)")
MESSAGE = "Upload by tuner"


@dataclass(frozen=True)
class Upload:
    """Files for a repository of a host."""

    host: Literal["hf", "modelscope"]
    repository: str
    """owner/name."""
    files: dict[str, Path]
    """Name in the repository -> the file here."""
    card: str
    """Text of README.md."""


def plan_upload(run: str | Path, destination: str) -> Upload:
    """The files of a run's model, its card and its curves. destination: hf:owner/name or modelscope:owner/name.

    Raises UserError for another destination, and where the folder is no finished run.
    """
    match = _DESTINATION.fullmatch(destination)
    if match is None:
        raise UserError(f"{destination}: no destination; write hf:owner/name or modelscope:owner/name")
    card, folder = model_card(run), Run(run)
    model = folder.model_folder
    files = {path.relative_to(model).as_posix(): path for path in sorted(model.rglob("*")) if path.is_file()}
    if (curves := folder.folder / CURVES).is_file():
        files[CURVES] = curves
    # the card takes the place of one that a library wrote
    files.pop(CARD, None)
    host: Any = match[1]
    return Upload(host, match[2], files, card)


def upload(plan: Upload, *, private: bool) -> str:
    """Upload the files; returns the repository's address. Raises UserError where the host refuses.

    The token is the one that the host's own login command has stored, or that its environment variable holds.
    """
    try:
        return _to_hub(plan, private) if plan.host == "hf" else _to_modelscope(plan, private)
    except UserError:
        raise
    # whatever a host's library raises is about the network, the account or the name
    except Exception as error:
        raise UserError(
            f"{plan.host}:{plan.repository}: the upload failed ({first_line(error)}); check the name, the network "
            "and your login"
        ) from error


def _to_hub(plan: Upload, private: bool) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    address = api.create_repo(plan.repository, private=private, exist_ok=True)
    operations = [CommitOperationAdd(name, file) for name, file in plan.files.items()]
    operations.append(CommitOperationAdd(CARD, plan.card.encode("utf-8")))
    api.create_commit(plan.repository, operations, commit_message=MESSAGE)
    return str(address)


def _to_modelscope(plan: Upload, private: bool) -> str:
    try:
        from modelscope.hub.api import HubApi  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("modelscope: its library is not installed; `pip install modelscope`") from error
    api = HubApi()
    api.create_repo(plan.repository, visibility="private" if private else "public", exist_ok=True)
    for name, content in (plan.files | {CARD: plan.card.encode("utf-8")}).items():
        source = content if isinstance(content, bytes) else str(content)
        api.upload_file(
            path_or_fileobj=source, path_in_repo=name, repo_id=plan.repository, commit_message=MESSAGE
        )
    return f"https://modelscope.cn/models/{plan.repository}"
