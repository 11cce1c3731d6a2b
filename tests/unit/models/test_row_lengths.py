"""Rows that are longer than a model goes: counted where it was trained for fewer, refused where it has no positions."""

import json

import pytest
import torch

from tuner.config import SFT, Chat, LoRA, Model, Rope
from tuner.errors import UserError
from tuner.models.load import load_model, read_model_config
from tuner.models.positions import Positions
from tuner.models.rope import reach
from tuner.models.tiny import tiny_model_folder
from tuner.stages.check import check
from tuner.stages.data_view import load_data_view


@pytest.fixture
def short(tmp_path):
    """A Llama for 24 tokens, and three rows: two of them are longer."""
    folder = tiny_model_folder("org/llama", tmp_path / "short")
    edit(folder, max_position_embeddings=24)
    texts = ("hi", "a b c d e f g h i j k l m n o p", "q r s t u v w x y z 1 2 3 4 5 6 7 8 9")
    rows = [{"prompt": text, "response": "yes"} for text in texts]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def edit(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def config(folder, **model):
    return SFT(
        model=Model(path=str(folder), **model),
        adapter=LoRA(r=4),
        data=Chat(files=(str(folder.parent / "rows.jsonl"),), template="llama3"),
    )


def test_rows_beyond_the_trained_length_are_counted_with_the_longest(short):
    (note,) = check(config(short)).notes
    assert note.startswith("2 of 3 rows are longer than the 24 tokens that the model was trained for (up to ")
    assert "rows.jsonl:3)" in note
    assert load_data_view(config(short)).rows.report.notes == [note]


def test_scaling_reaches_further(short):
    scaled = config(short, rope=Rope(scaling="yarn", factor=8.0))
    assert check(scaled).notes == ()
    for rope, reached in (
        (None, 24),
        (Rope(scaling="linear", factor=4.0), 96),
        (Rope(scaling="yarn", factor=4.0), 96),
        (Rope(scaling="dynamic", factor=4.0), 96),
    ):
        assert reach(read_model_config(Model(path=str(short), rope=rope))) == reached


def test_a_file_may_say_both_lengths(short):
    """Qwen's files name the length without YaRN, Llama 3's the one with its scaling."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 24}
    edit(short, rope_parameters=yarn)
    assert reach(read_model_config(Model(path=str(short)))) == 96
    edit(short, max_position_embeddings=128)
    assert reach(read_model_config(Model(path=str(short)))) == 128


def test_learned_positions_are_a_limit(short, monkeypatch):
    monkeypatch.setattr("tuner.models.positions._rows_of_tables", lambda model: 40)
    with pytest.raises(
        UserError, match=r"rows.jsonl:3: \d+ tokens, and the model has learned positions for 40"
    ):
        check(config(short))
    loaded = load_model(Model(path=str(short)), precision="fp32", device=torch.device("cpu"))
    assert Positions.of(loaded.transformer) == Positions(40, 24)
