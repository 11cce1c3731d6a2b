"""Models named `modelscope://owner/name`. There is no network here: the library is played by a function."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tuner.config import Model
from tuner.config.model import refuse_missing_model
from tuner.errors import UserError
from tuner.models.locate import locate
from tuner.resources import locate as locate_shipped

NAME = "modelscope://Shanghai_AI_Laboratory/internlm2-7b"


def test_it_is_fetched_by_its_name_and_revision(monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}

    def snapshot_download(model_id: str, **options: Any) -> str:
        asked.update(options, model_id=model_id)
        return locate_shipped("tuner:tiny")

    monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace(snapshot_download=snapshot_download))
    location = locate(Model(path=NAME, revision="v1.0"))
    assert (asked["model_id"], asked["revision"]) == ("Shanghai_AI_Laboratory/internlm2-7b", "v1.0")
    assert "*.py" not in asked["allow_patterns"], "code is fetched by the user's word only"
    assert location.base_folder == Path(locate_shipped("tuner:tiny"))
    reference = location.reference
    assert (reference.path, reference.revision, reference.found_at) == (NAME, "v1.0", None)
    locate(Model(path=NAME, trust_remote_code=True), weights=False)
    assert asked["revision"] == "master"
    assert "*.py" in asked["allow_patterns"]
    assert "*.safetensors" in asked["ignore_patterns"]


def test_without_the_library_or_with_a_wrong_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    refuse_missing_model(NAME)
    with pytest.raises(UserError, match="ModelScope's library is not installed"):
        locate(Model(path=NAME))
    with pytest.raises(UserError, match="no such model folder"):
        locate(Model(path="modelscope://../x"))
