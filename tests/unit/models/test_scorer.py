"""Scores are those of each conversation alone, in whatever company, and asked about as in training."""

import datetime
import io
import json
import random
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import tuner
from tests.equivalence.test_reward import REWARD
from tuner.config import override
from tuner.data.conversation import Conversation, Turn
from tuner.errors import UserError
from tuner.evaluation.held_out_pairs import HeldOutPairs, score_comparisons
from tuner.models import scorer as module
from tuner.models.roles import Roles
from tuner.models.scorer import open_scorer, score_sequences
from tuner.stages.data_view import load_rows
from tuner.stages.reward.score_file import score_file
from tuner.training.devices import Devices

CPU = torch.device("cpu")
KINDS = {
    "lora": {},
    "qlora": {"model.quantization": "nf4"},
    "full": {"adapter": None, "optimizer.lr": 5e-3},
}
ROWS = (
    {"prompt": "What is a broom?", "chosen": "A tool.", "rejected": "A tool for sweeping. It has hairs."},
    {
        "prompt": "Is 3 odd?",
        "answers": ["No.", "Yes, it is.", "Yes."],
        "ranks": [3, 1, 2],
        "condition": "blunt",
    },
    {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "你好。" * 30}]},
    {
        "prompt": [
            {"role": "system", "content": "You are a child."},
            {"role": "user", "content": "How much?"},
        ],
        "chosen": "Two.",
        "rejected": "Two and two, so it is four, as everyone knows.",
        "condition": "detailed",
    },
)


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    """A run of a few steps, with held-out rows."""
    changes = {
        "name": request.param,
        "data.limit": 12,
        "data.test_files": [{"path": "tuner:twins/test.jsonl", "limit": 16}],
        "max_steps": 3,
    }
    config = override(REWARD, changes | KINDS[request.param])
    return tuner.train(config, runs=tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def scorer(run):
    return open_scorer(str(run.folder), tokens_per_pass=256)


@pytest.fixture
def file(tmp_path):
    """The pairs, lists and conversations above, each shape in a file of its own."""

    def written(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return written


def sequences_of(run, part="train"):
    sequences = getattr(load_rows(run.config), part).sequences
    return [np.array(sequences.example(index)[0]) for index in range(len(sequences))]


@torch.no_grad()
def plain_scores(scorer, sequences, side=None):
    """By transformers' sequence classification: one by one unpadded, or as one padded batch."""
    model, pad = scorer.loaded.model, scorer.loaded.tokenizer.pad_token_id
    scorer.loaded.transformer.set_attn_implementation("sdpa")
    scorer.loaded.transformer.config.pad_token_id = pad  # what goes with an adapter is the tokenizer alone
    try:
        rows = [torch.from_numpy(tokens).long() for tokens in sequences]
        if side is None:
            return np.array([model(input_ids=row[None], use_cache=False).logits.item() for row in rows])
        tokens = torch.full((len(rows), max(map(len, rows))), pad)
        mask = torch.zeros_like(tokens)
        for place, row in enumerate(rows):
            part = slice(-len(row), None) if side == "left" else slice(0, len(row))
            tokens[place, part], mask[place, part] = row, 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
        return output.logits[:, 0].numpy()
    finally:
        scorer.loaded.transformer.set_attn_implementation("varlen")


def test_a_score_depends_on_nothing_beside_its_conversation(run, scorer):
    """Trap 10: passes of any size, other mates, another order; and transformers' own figures."""
    sequences = sequences_of(run)
    expected = plain_scores(scorer, sequences)
    assert expected.std() > 0.01
    for side in ("right", "left"):
        np.testing.assert_allclose(plain_scores(scorer, sequences, side), expected, atol=1e-5, rtol=0)
    model = scorer.loaded.model
    for tokens_per_pass in (1, 200, 10_000):
        actual = score_sequences(model, sequences, tokens_per_pass, CPU)
        np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)
    order = random.Random(0).sample(range(len(sequences)), len(sequences) // 2)
    actual = score_sequences(model, [sequences[index] for index in order], 300, CPU)
    np.testing.assert_allclose(actual, expected[order], atol=1e-5, rtol=0)
    assert score_sequences(model, [], 300, CPU).shape == (0,)


def test_held_out_rows_are_scored_alike(run, scorer):
    """The trainer's own measure, and the scores of the report card."""
    config = run.config
    devices = Devices.of(config)
    roles = Roles.of("reward", scorer.loaded, devices.autocast)
    data = load_rows(config, scorer.loaded.tokenizer).test
    expected = plain_scores(scorer, sequences_of(run, "test"))
    settings = override(config, {"loss.gamma": 0.0})
    for tokens_per_pass in (512, 4096):
        actual = score_comparisons(data, roles, devices, tokens_per_pass)
        np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)
        measured = HeldOutPairs(
            data, roles, devices, settings.evaluation, settings.loss, tokens_per_pass
        ).metrics()
        leads = expected[0::2] - expected[1::2]
        loss = np.log1p(np.exp(-leads)).mean() - 0.02 * (np.log(5 + expected) + np.log(5 - expected)).mean()
        assert measured["loss"] == pytest.approx(loss, abs=1e-5)
        assert measured["accuracy"] == (leads > 0).mean()
    assert run.results["reference"]["mean"] == pytest.approx(expected.mean(), abs=1e-5)
    assert run.results["reference"]["standard_deviation"] == pytest.approx(expected.std(), abs=1e-5)
    assert scorer.record.reference.answers == len(expected)
    assert run.results["overall"]["accuracy"] == pytest.approx((leads > 0).mean())


def spy(monkeypatch, call):
    """(result, the token sequences that were scored) of a call."""
    scored_sequences = []

    def spying(model, sequences, *rest, **settings):
        scored_sequences.extend(np.array(tokens) for tokens in sequences)
        return score_sequences(model, sequences, *rest, **settings)

    monkeypatch.setattr(module, "score_sequences", spying)
    return call(), scored_sequences


def test_rows_are_scored_in_the_inputs_of_training(run, monkeypatch, file):
    """The same tokens to the last: template, drawn wording, reward token; answers in the order of the file."""
    from tuner.resources import locate

    lines = open(locate("tuner:twins/train.jsonl"), encoding="utf-8").readlines()[:12]  # noqa: SIM115
    path = file(*map(json.loads, lines))
    output = io.StringIO()
    count, sequences = spy(
        monkeypatch, lambda: score_file(str(run.folder), path, output, tokens_per_pass=300)
    )
    assert count == 12
    trained = sequences_of(run)
    assert len(sequences) == len(trained) == 24
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(sequences, trained, strict=True))
    conditions = {json.loads(line).get("condition") for line in lines}
    assert len(conditions) > 2
    scores = [score for line in output.getvalue().splitlines() for score in json.loads(line)["scores"]]
    expected = plain_scores(open_scorer(str(run.folder)), trained)
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=0)


def test_answers_of_several_turns_are_asked_about_in_the_words_of_their_row(run, monkeypatch, file):
    """A prompt draws the wording, and where an answer begins is the row's to say."""
    call = [
        {"role": "assistant", "content": "Let me see."},
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": "Two."},
    ]
    rows = [
        {
            "prompt": f"What is {number}?",
            "chosen": call,
            "rejected": [{"role": "assistant", "content": "No."}],
            "condition": "brief",
        }
        for number in range(6)
    ]
    path = file(*rows)
    _, sequences = spy(monkeypatch, lambda: score_file(str(run.folder), path, io.StringIO()))
    trained = sequences_of_file(run, path)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(sequences, trained, strict=True))


def sequences_of_file(run, path):
    config = override(run.config, {"data.files": [path], "data.test_files": []})
    sequences = load_rows(config).train.sequences
    return [np.array(sequences.example(index)[0]) for index in range(len(sequences))]


def scored(run, path, **options):
    output = io.StringIO()
    score_file(str(run.folder), path, output, **options)
    return [json.loads(line) for line in output.getvalue().splitlines()]


def test_a_file_of_rows_comes_back_with_scores(run, scorer, file):
    """Preferences and conversations; whatever the order of the rows and the size of a pass."""
    pair, ranked, talk, own = ROWS
    for row in (pair, ranked, own):
        (scored_row,) = scored(run, file(row))
        assert {name: scored_row[name] for name in row} == row
        answers = row.get("answers") or [row["chosen"], row["rejected"]]
        prompt = row["prompt"]
        turns = [Turn(**turn) for turn in prompt] if isinstance(prompt, list) else [Turn("user", prompt)]
        alone = [
            scorer.score([Conversation((*turns, Turn("assistant", answer)))], row.get("condition"))[0]
            for answer in answers
        ]
        np.testing.assert_allclose(scored_row["scores"], alone, atol=1e-5, rtol=0)
        assert len(set(scored_row["scores"])) == len(answers)
    (scored_row,) = scored(run, file(talk))
    assert scored_row["score"] == pytest.approx(scorer.score([talk])[0], abs=1e-5)
    assert "scores" not in scored_row
    many = [
        {**pair, "prompt": f"What is {number}?", "condition": name}
        for number in range(9)
        for name in ("brief", "json")
    ]
    one = scored(run, file(*many), tokens_per_pass=1)
    other = scored(run, file(*reversed(many)))
    np.testing.assert_allclose(
        [row["scores"] for row in one], [row["scores"] for row in reversed(other)], atol=1e-5, rtol=0
    )
    assert np.abs(np.diff([row["scores"][0] for row in one])).max() > 1e-3  # and the rows do differ


def test_windows_and_streams_change_nothing(run, scorer, file, monkeypatch):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Hi {n}."},
                {"role": "assistant", "content": "Yes. " * (n + 1)},
            ]
        }
        for n in range(13)
    ]
    whole = scorer.score(rows)
    assert whole.shape == (13,)
    assert whole.dtype == np.float64
    from tuner.stages.reward import score_file as scoring

    monkeypatch.setattr(module, "WINDOW", 4)
    monkeypatch.setattr(scoring, "WINDOW", 3)
    np.testing.assert_allclose(list(scorer.stream(iter(rows))), whole, atol=1e-5, rtol=0)
    np.testing.assert_allclose([row["score"] for row in scored(run, file(*rows))], whole, atol=1e-5, rtol=0)
    assert scorer.score([]).shape == (0,)


def test_standardized_scores(run, scorer, file):
    reference = run.results["reference"]
    (plain,), (standard,) = scored(run, file(ROWS[1])), scored(run, file(ROWS[1]), standardize=True)
    expected = (np.array(plain["scores"]) - reference["mean"]) / reference["standard_deviation"]
    np.testing.assert_allclose(standard["scores"], expected, atol=1e-6)


def test_a_condition_changes_the_score_and_is_of_the_config(run, scorer, file):
    row = {key: value for key, value in ROWS[1].items() if key != "condition"}
    (plain,), (named,) = scored(run, file(row)), scored(run, file(row), condition="brief")
    assert plain["scores"] != named["scores"]
    (own,) = scored(run, file({**row, "condition": "brief"}), condition="json")
    assert own["scores"] == named["scores"]  # the row's own goes first
    with pytest.raises(
        UserError, match=r"rows\.jsonl:2: condition 'curt' is not in the config.*brief, detailed"
    ):
        scored(run, file(row, {**row, "condition": "curt"}))
    with pytest.raises(UserError, match="row 2: condition 'curt'"):
        scorer.score([ROWS[2], {**ROWS[2], "condition": "curt"}])


def test_a_condition_that_is_no_name_is_refused(run, scorer, file):
    talk = {**ROWS[2], "condition": ["brief"]}
    with pytest.raises(UserError, match=r"rows\.jsonl:1: \"condition\" is the name of one, not \['brief'\]"):
        scored(run, file(talk))
    with pytest.raises(UserError, match=r"row 1: \"condition\" is the name of one"):
        scorer.score([talk])


def test_cells_that_json_has_no_form_of_are_written_as_texts(run, tmp_path):
    path = tmp_path / "rows.parquet"
    cells = {"day": datetime.date(2026, 1, 2), "price": Decimal("1.50"), "blob": b"x"}
    row = {"prompt": "What is 1?", "completion": "One.", **cells}
    pq.write_table(pa.Table.from_pylist([row]), path)
    (scored_row,) = scored(run, str(path))
    assert {name: scored_row[name] for name in cells} == {
        "day": "2026-01-02",
        "price": "1.50",
        "blob": "b'x'",
    }


def test_the_unasked_is_refused(run, scorer, file):
    with pytest.raises(UserError, match=r"rows\.jsonl:1: a text, and conversations are scored"):
        scored(run, file({"text": "Once."}))
    with pytest.raises(UserError, match="row 1: a text, and conversations are scored"):
        scorer.score([{"text": "Once."}])


def test_a_run_without_held_out_rows_has_no_mean(file, tmp_path):
    run = tuner.train(override(REWARD, {"max_steps": 1}), runs=tmp_path)
    with pytest.raises(UserError, match="leave --standardize out"):
        scored(run, file(ROWS[1]), standardize=True)


@pytest.mark.parametrize(
    ("path", "message"),
    [("tuner:tiny", "this is no reward model"), ("./nowhere", "no such model folder")],
)
def test_what_is_no_reward_model(path, message):
    with pytest.raises(UserError, match=message):
        open_scorer(path)


def test_a_run_in_bf16_can_be_scored_in_fp32(tmp_path):
    """On the weights it has: 4-bit codes of what was rounded to bf16, products in fp32."""
    changes = {"precision": "bf16", "model.quantization": "nf4", "max_steps": 2, "data.limit": 12}
    run = tuner.train(override(REWARD, changes), runs=tmp_path)
    sequences = sequences_of(run)
    own, exact = (open_scorer(str(run.folder), precision=precision) for precision in (None, "fp32"))
    assert (own.loaded.precision, exact.loaded.precision) == ("bf16", "fp32")
    by_precision = {}
    for name, one in {"own": own, "exact": exact}.items():
        with one._autocast():
            by_precision[name] = score_sequences(one.loaded.model, sequences, 300, CPU)
    np.testing.assert_allclose(by_precision["exact"], plain_scores(exact, sequences), atol=1e-5, rtol=0)
    assert 1e-5 < np.abs(by_precision["own"] - by_precision["exact"]).max() < 0.1
