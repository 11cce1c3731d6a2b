"""POLAR: the text that XTuner builds for it, rows with a reference from file to score, and a training step."""

import json

import pytest
import torch

import tuner
from tuner.config import AdamW, FocalRanking, LoRA, Model, PairEvaluation, Preferences, RewardModel
from tuner.data.conversation import Conversation, Prompt, Turn
from tuner.data.template import Template
from tuner.errors import UserError
from tuner.models.load import load_model
from tuner.models.scorer import ScoreRequest, open_scorer
from tuner.models.segment_rope import SegmentedRotary
from tuner.models.tiny import tiny_model_folder
from tuner.resources import row_examples_folder
from tuner.stages.reward.score_file import score_file

CPU = torch.device("cpu")
ROWS = row_examples_folder() / "pair_reference.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model in POLAR's published form: InternLM2ForRewardModel, dynamic scaling, a base of 5e7."""
    place = tiny_model_folder("internlm/POLAR-1_8B-Base", tmp_path_factory.mktemp("polar") / "m", score=True)
    file = place / "config.json"
    values = json.loads(file.read_text())
    assert values["architectures"] == ["InternLM2ForRewardModel"]
    values |= {"rope_theta": 5e7, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    file.write_text(json.dumps(values))
    return place


def test_the_text_is_that_of_xtuner(folder):
    """As tokenize_ref joins its parts: prompt, line break, answer, twice, around <|reward|>."""
    tokenizer = load_model(Model(path=str(folder)), precision="fp32", device=CPU, head="score").tokenizer
    template = Template("polar", tokenizer)
    assert template.needs_reference
    assert not Template("internlm2", tokenizer).needs_reference
    turns = (Turn("system", "Be brief."), Turn("user", "Capital?"), Turn("assistant", "It is Beijing."))
    rendered = template.render_row(Conversation(turns).with_reference("Beijing."))
    assert rendered.text == "<s>Be brief.\nCapital?\nBeijing.<|reward|>Be brief.\nCapital?\nIt is Beijing."
    ((begin, end, weight),) = rendered.spans
    assert (rendered.text[begin:end], weight) == ("It is Beijing.", 1.0)
    with pytest.raises(UserError, match='there is none; write "reference" in the row'):
        template.render_row(Conversation(turns))


def test_rows_with_a_reference_are_trained_on_and_scored(folder, tmp_path):
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    config = RewardModel(
        name="polar",
        model=Model(path=str(folder)),
        adapter=LoRA(r=4),
        data=Preferences(
            files=(str(tmp_path / "rows.jsonl"),), test_files=(str(ROWS),), template="polar", max_length=128
        ),
        loss=FocalRanking(gamma=0.0, barrier=0.0),
        optimizer=AdamW(lr=1e-2),
        tokens_per_step=512,
        tokens_per_pass=512,
        max_steps=3,
        precision="fp32",
        device="cpu",
        evaluation=PairEvaluation(every=3),
    )
    run = tuner.train(config, runs=tmp_path / "runs")
    losses = [record["loss"] for record in run.metrics if "loss" in record]
    assert losses[-1] < losses[0]
    with (tmp_path / "scores.jsonl").open("w") as output:
        score_file(str(run.folder), str(ROWS), output)
    scored = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    scorer = open_scorer(run.folder, device=CPU)
    assert isinstance(scorer.loaded.transformer.model.rotary_emb, SegmentedRotary)
    assert scorer.loaded.transformer.config.rope_parameters["rope_theta"] == 5e7
    # the row of one answer, and the answer to a policy's prompt, are scored as the row of both
    chosen = {"prompt": rows[1]["prompt"], "completion": rows[1]["chosen"], "reference": rows[1]["reference"]}
    prompt = Prompt((Turn("user", rows[1]["prompt"]),), reference=rows[1]["reference"])
    request = ScoreRequest.of(prompt, rows[1]["chosen"], with_reference=True)
    expected = pytest.approx(
        scored[1]["scores"][0] if "scores" in scored[1] else scored[1]["score"][0], abs=1e-5
    )
    assert scorer.score([chosen])[0] == expected
    assert scorer.score_requests([request])[0] == expected
    other = scorer.score([chosen | {"reference": "7 + 5 = 13."}])[0]
    assert other != expected
    with pytest.raises(UserError, match='row 1: no "reference"'):
        scorer.score([{name: value for name, value in chosen.items() if name != "reference"}])


def test_both_prompts_are_not_cut(folder, tmp_path):
    config = RewardModel(
        name="cut",
        model=Model(path=str(folder)),
        data=Preferences(files=(str(ROWS),), template="polar", max_length=64, too_long="cut"),
        tokens_per_pass=128,
    )
    with pytest.raises(UserError, match="writes the prompt twice"):
        tuner.train(config, runs=tmp_path)
