"""`tuner eval` of a PPO run: its policy on its test prompts, and against others; on runs of a few steps."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import tuner
from tuner.cli.eval import evaluate
from tuner.config import (
    DPO,
    PPO,
    SFT,
    AdamW,
    Chat,
    LoRA,
    Model,
    PolicyEvaluation,
    Preferences,
    Prompts,
    Replay,
    RewardModel,
    Sampling,
    Source,
    StageConfig,
)
from tuner.errors import UserError
from tuner.models.tiny import tiny_model_folder
from tuner.stages.rl import evaluate as comparing

app = typer.Typer()
app.command("eval")(evaluate)

SHORT = {
    "adapter": LoRA(r=4),
    "precision": "fp32",
    "device": "cpu",
    "gradient_checkpointing": False,
    "max_steps": 2,
}
PACKED = {"tokens_per_step": 512, "tokens_per_pass": 512}
RULE = "def gold(answer, row):\n    return float(len(answer) % 2)\n"
CONDITIONS = ("polite", "brief")


def rows(part: str, count: int) -> tuple[Source, ...]:
    return tuple(Source(path=f"tuner:sums/{part}.jsonl", condition=name, limit=count) for name in CONDITIONS)


def configs(runs: Path) -> list[StageConfig]:
    tiny, sums = Model(path="tuner:tiny"), "tuner:sums/train.jsonl"
    preferences = Preferences(
        files=("tuner:twins/train.jsonl",), template="internlm2", max_length=128, limit=40
    )
    chat = Chat(files=(sums,), template="internlm2", max_length=64, limit=40)
    return [
        SFT(name="sft", model=tiny, data=chat, optimizer=AdamW(lr=5e-3), **SHORT, **PACKED),
        DPO(name="dpo", model=tiny, data=preferences, pairs_per_step=4, pairs_per_pass=4, **SHORT),
        RewardModel(
            name="reward",
            model=tiny,
            conditions={name: f"tuner:twins/{name}.txt" for name in CONDITIONS},
            data=preferences.model_copy(update={"files": (str(runs / "pairs.jsonl"),)}),
            **SHORT,
            **PACKED,
        ),
        PPO(
            name="ppo",
            policy=Model(path=str(runs / "sft")),
            reward=str(runs / "reward"),  # type: ignore[arg-type]
            prompts=Prompts(
                files=rows("train", 8), test_files=rows("test", 5), template="internlm2", max_length=64
            ),
            prompts_per_step=8,
            sampling=Sampling(max_new_tokens=6),
            critic_warmup=0,
            critic_lr=1e-2,
            optimizer=AdamW(lr=2e-2),
            replay=Replay(files=(sums,), test_files=(sums,), template="internlm2", max_length=64, limit=4),
            evaluation=PolicyEvaluation(rule=f"{runs / 'rule.py'}:gold"),
            tokens_per_pass=1024,
            **{name: value for name, value in SHORT.items() if name != "adapter"},
        ),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """sft, dpo, reward and ppo, each trained for two steps."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "rule.py").write_text(RULE)
    twins = Path(tuner.__file__).parent / "embedded/twins/train.jsonl"
    lines = twins.read_text(encoding="utf-8").splitlines()
    asked = [line for line in lines if json.loads(line).get("condition") in CONDITIONS]
    (folder / "pairs.jsonl").write_text("\n".join(asked[:40]) + "\n", encoding="utf-8")
    for config in configs(folder):
        tuner.train(config, runs=folder)
    return folder


def run(*arguments: object):
    return CliRunner().invoke(app, [str(one) for one in arguments])


def refused(*arguments: object) -> str:
    found = run(*arguments)
    assert isinstance(found.exception, UserError), found.output
    return str(found.exception)


def test_a_policy_alone_is_what_its_run_measured_last(runs):
    found = json.loads(run(runs / "ppo", "--json").stdout)
    kept = tuner.open_run(runs / "ppo").results
    assert kept is not None
    assert found["prompts"] == 10
    assert found["score"]["value"] == pytest.approx(kept["score"]["after"], abs=1e-5)
    assert found["gold"]["value"] == pytest.approx(kept["gold"]["after"])
    assert found["replay"] == pytest.approx(kept["replay"]["after"], rel=1e-4)
    assert [one["loss"] for one in found["positions"]] == pytest.approx(
        [one["after"] for one in kept["positions"]], rel=1e-4
    )
    assert set(found["conditions"]) == set(CONDITIONS)
    assert found["conditions"]["polite"]["prompts"] == 5
    assert "against" not in found


def test_against_runs_folders_and_other_tokenizers(runs, tmp_path):
    foreign = tiny_model_folder("meta-llama/Llama-3.2-1B", tmp_path / "llama")
    page = tmp_path / "page.html"
    others = [runs / "sft", runs / "dpo", foreign, runs / "ppo", "tuner:tiny"]
    options = [part for one in others for part in ("--against", one)]
    outcome = run(runs / "ppo", *options, "--json", "--html", page)
    assert outcome.exit_code == 0, outcome.exception
    found = json.loads(outcome.stdout)
    assert [one["name"] for one in found["against"]] == [
        "sft",
        "dpo",
        "llama",
        str(runs / "ppo"),
        "tuner:tiny",
    ]
    for one in found["against"]:
        for judge in ("score", "gold"):
            wins = one["wins"][judge]
            assert wins["wins"] + wins["ties"] + wins["losses"] == 10
            assert wins["rate"]["low"] <= wins["rate"]["value"] <= wins["rate"]["high"]
            parts = [part[judge] for part in one["wins"]["conditions"].values()]
            assert sum(part["wins"] for part in parts) == wins["wins"]
    itself = found["against"][3]["wins"]
    assert (itself["score"]["rate"]["value"], itself["score"]["ties"]) == (0.5, 10)
    assert found["against"][2]["wins"]["score"]["ties"] < 10, (
        "another tokenizer's texts are judged all the same"
    )
    sft = found["against"][0]["wins"]["score"]
    text = page.read_text(encoding="utf-8")
    assert f"ppo wins {100 * sft['rate']['value']:.0f}% [" in text
    assert "against sft by the reward model" in text


def test_said_in_the_terminal_with_its_direction(runs):
    said = run(runs / "ppo", "--against", runs / "sft").stdout
    assert said.startswith("ppo wins ")
    assert "against sft by the reward model" in " ".join(said.split())
    assert "Win rate of ppo" in said
    assert "polite" in said


def test_other_prompts(runs, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "What is 2 + 2?", "condition": "brief"}\n{"prompt": "What is 3 + 3?"}\n')
    found = json.loads(run(runs / "ppo", "--files", file, "--against", runs / "sft", "--json").stdout)
    assert found["prompts"] == 2
    assert list(found["conditions"]) == ["brief"]
    file.write_text('{"prompt": "What is 2 + 2?", "condition": "strange"}\n')
    assert "condition 'strange' is unknown" in refused(runs / "ppo", "--files", file)


def test_one_model_is_held_at_a_time(runs, monkeypatch):
    held: list[weakref.ref] = []
    load = comparing.load_model

    def watched(*given, **settings):
        gc.collect()
        assert not [one for one in held if one() is not None], "the model before is still there"
        loaded = load(*given, **settings)
        held.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(comparing, "load_model", watched)
    assert run(runs / "ppo", "--against", runs / "sft", "--against", runs / "dpo").exit_code == 0
    assert len(held) == 4


def test_what_cannot_be_compared(runs, tmp_path):
    said = refused(runs / "sft", "--against", runs / "ppo")
    assert "only a policy run (PPO, GRPO or RLOO) names the prompts, reward model and rule to compare by" in said
    assert "a reward model cannot answer" in refused(runs / "ppo", "--against", runs / "reward")
    assert "no such model folder" in refused(runs / "ppo", "--against", "runs/none")
    assert "not a run folder" in refused(tmp_path / "none", "--against", runs / "sft")
    unfinished = tmp_path / "sft"
    shutil.copytree(runs / "sft", unfinished)
    shutil.rmtree(unfinished / "model")
    assert "has not finished" in refused(runs / "ppo", "--against", unfinished)
    assert "has not finished" in refused(unfinished)
    assert "leave --html out" in refused(runs / "sft", "--html", tmp_path / "page.html")


def test_a_rule_whose_file_has_gone_is_the_runs_copy(runs, tmp_path):
    shutil.copytree(runs / "ppo", tmp_path / "ppo")
    gone = str(tmp_path / "gone.py")
    for name in ("config.json", "functions.json"):
        file = tmp_path / "ppo" / name
        file.write_text(file.read_text().replace(str(runs / "rule.py"), gone))
    found = json.loads(run(tmp_path / "ppo", "--json").stdout)
    kept = tuner.open_run(runs / "ppo").results
    assert kept is not None
    assert found["gold"]["value"] == pytest.approx(kept["gold"]["after"])


def test_a_run_without_test_prompts(runs, tmp_path):
    shutil.copytree(runs / "ppo", tmp_path / "ppo")
    file = tmp_path / "ppo/config.json"
    values = json.loads(file.read_text())
    values["prompts"]["test_files"] = []
    values["evaluation"]["rule"] = None
    file.write_text(json.dumps(values))
    assert "holds out no test prompts; name some with --files" in refused(tmp_path / "ppo")
