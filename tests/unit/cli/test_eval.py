"""`tuner eval` of a PPO run of a few steps: its policy on its test prompts, and against other policies."""

import gc
import json
import re
import shutil
import weakref
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

import tuner
from tuner.cli.eval import evaluate
from tuner.cli.main import app as main_app
from tuner.config import (
    COOL,
    DPO,
    GRPO,
    PPO,
    SFT,
    AdamW,
    Chat,
    Evaluation,
    LoRA,
    Model,
    PolicyEvaluation,
    Preferences,
    Prompts,
    Replay,
    RewardModel,
    Round,
    Sampling,
    Source,
    StageConfig,
    to_json,
)
from tuner.errors import UserError
from tuner.models.tiny import tiny_model_folder
from tuner.stages.card_file import write_card
from tuner.stages.model_card import base_license, model_card
from tuner.stages.publish import plan_upload, upload
from tuner.stages.rl import entrants
from tuner.stages.rl import evaluate as comparing
from tuner.stages.run_models import usable_path

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


def prompt_sources(split: str, count: int) -> tuple[Source, ...]:
    return tuple(Source(path=f"tuner:sums/{split}.jsonl", condition=name, limit=count) for name in CONDITIONS)


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
                files=prompt_sources("train", 8),
                test_files=prompt_sources("test", 5),
                template="internlm2",
                max_length=64,
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
    """Folder of the runs sft, dpo, reward and ppo, each trained for two steps."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "rule.py").write_text(RULE)
    twins = Path(tuner.__file__).parent / "embedded/twins/train.jsonl"
    lines = twins.read_text(encoding="utf-8").splitlines()
    pairs = [line for line in lines if json.loads(line).get("condition") in CONDITIONS]
    (folder / "pairs.jsonl").write_text("\n".join(pairs[:40]) + "\n", encoding="utf-8")
    for config in configs(folder):
        tuner.train(config, runs=folder)
    return folder


def run(*arguments: object):
    return CliRunner().invoke(app, [*map(str, arguments), "--trust"])


def error_message(*arguments: object) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def test_a_policy_alone_gets_the_final_results_of_its_run(runs):
    evaluation = json.loads(run(runs / "ppo", "--json").stdout)
    results = tuner.open_run(runs / "ppo").results
    assert results is not None
    assert evaluation["prompts"] == 10
    assert evaluation["score"]["value"] == pytest.approx(results["score"]["after"], abs=1e-5)
    assert evaluation["gold"]["value"] == pytest.approx(results["gold"]["after"])
    assert evaluation["replay"] == pytest.approx(results["replay"]["after"], rel=1e-4)
    assert [position["loss"] for position in evaluation["positions"]] == pytest.approx(
        [position["after"] for position in results["positions"]], rel=1e-4
    )
    assert set(evaluation["conditions"]) == set(CONDITIONS)
    assert evaluation["conditions"]["polite"]["prompts"] == 5
    assert "against" not in evaluation


def test_against_runs_model_folders_and_other_tokenizers(runs, tmp_path):
    llama = tiny_model_folder("meta-llama/Llama-3.2-1B", tmp_path / "llama")
    page = tmp_path / "page.html"
    others = [runs / "sft", runs / "dpo", llama, runs / "ppo", "tuner:tiny"]
    options = [argument for other in others for argument in ("--against", other)]
    result = run(runs / "ppo", *options, "--json", "--html", page)
    assert result.exit_code == 0, result.exception
    evaluation = json.loads(result.stdout)
    assert [other["name"] for other in evaluation["against"]] == [
        "sft",
        "dpo",
        "llama",
        str(runs / "ppo"),
        "tuner:tiny",
    ]
    for other in evaluation["against"]:
        for judge in ("score", "gold"):
            wins = other["wins"][judge]
            assert wins["wins"] + wins["ties"] + wins["losses"] == 10
            assert wins["rate"]["low"] <= wins["rate"]["value"] <= wins["rate"]["high"]
            by_condition = [condition[judge] for condition in other["wins"]["conditions"].values()]
            assert sum(condition["wins"] for condition in by_condition) == wins["wins"]
    itself = evaluation["against"][3]["wins"]
    assert (itself["score"]["rate"]["value"], itself["score"]["ties"]) == (0.5, 10)
    assert evaluation["against"][2]["wins"]["score"]["ties"] < 10, (
        "answers of another tokenizer are scored, too"
    )
    sft = evaluation["against"][0]["wins"]["score"]
    text = page.read_text(encoding="utf-8")
    assert f"ppo wins {100 * sft['rate']['value']:.0f}% [" in text
    assert "against sft by the reward model" in text


def test_the_terminal_names_winner_and_opponent(runs):
    output = run(runs / "ppo", "--against", runs / "sft").stdout
    assert output.startswith("ppo wins ")
    assert "against sft by the reward model" in " ".join(output.split())
    assert "Win rate of ppo" in output
    assert "polite" in output


@pytest.fixture
def cool(runs: Path, tmp_path: Path) -> Path:
    """A run of two rounds, whose policies and patched reward model are copies of those runs."""
    folder, (*_, reward, ppo) = tmp_path / "rounds", configs(runs)
    for number in (1, 2):
        shutil.copytree(runs / "ppo", folder / f"round_{number}" / "ppo")
    shutil.copytree(runs / "reward", folder / "round_2" / "reward")
    patch = {"model": "where/it/was/round_2/reward", "share": 1.0}
    (folder / "round_2" / "reward" / "patch.json").write_text(json.dumps(patch))
    shutil.copytree(runs / "ppo" / "model", folder / "model")
    for name in ("results.json", "versions.json"):
        shutil.copy2(runs / "ppo" / name, folder)
    policy = ppo.model_copy(update={"reward": Model(path=str(runs / "gone"))})
    feedback = (f"{runs / 'rule.py'}:gold",)
    config = COOL(name="rounds", reward=reward, policy=policy, rounds=(Round(), Round()), feedback=feedback)  # type: ignore[arg-type]
    (folder / "config.json").write_text(to_json(config))
    return folder


def test_the_last_round_against_the_earlier_ones_and_the_start(cool: Path, runs: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    result = run(cool, "--against", runs / "dpo", "--json", "--html", page)
    assert result.exit_code == 0, result.exception
    evaluation = json.loads(result.stdout)
    assert [other["name"] for other in evaluation["against"]] == ["round 1", "sft", "dpo"]
    assert evaluation["against"][0]["wins"]["score"]["ties"] == 10, "both rounds have the same policy"
    text = page.read_text(encoding="utf-8")
    assert "<title>rounds against round 1, sft, dpo</title>" in text
    assert "round 2 wins 50% [" in text


def test_rounds_are_compared_on_other_prompts(cool: Path, tmp_path: Path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "What is 2 + 2?", "condition": "brief"}\n')
    assert json.loads(run(cool, "--files", file, "--json").stdout)["prompts"] == 1


def test_other_prompts(runs, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "What is 2 + 2?", "condition": "brief"}\n{"prompt": "What is 3 + 3?"}\n')
    evaluation = json.loads(run(runs / "ppo", "--files", file, "--against", runs / "sft", "--json").stdout)
    assert evaluation["prompts"] == 2
    assert list(evaluation["conditions"]) == ["brief"]
    file.write_text('{"prompt": "What is 2 + 2?", "condition": "strange"}\n')
    assert "condition 'strange' is unknown" in error_message(runs / "ppo", "--files", file)


def test_one_model_is_in_memory_at_a_time(runs, monkeypatch):
    models: list[weakref.ref] = []
    load = comparing.load_model

    def tracked_load(*arguments, **settings):
        gc.collect()
        assert not [model for model in models if model() is not None], "an earlier model is still in memory"
        loaded = load(*arguments, **settings)
        models.append(weakref.ref(loaded.model))
        return loaded

    for module in (comparing, entrants):
        monkeypatch.setattr(module, "load_model", tracked_load)
    assert run(runs / "ppo", "--against", runs / "sft", "--against", runs / "dpo").exit_code == 0
    assert len(models) == 4


def test_an_unfinished_run_is_measured_by_its_newest_checkpoint(runs, tmp_path):
    unfinished = tmp_path / "ppo"
    shutil.copytree(runs / "ppo", unfinished)
    shutil.rmtree(unfinished / "model")
    printed = run(unfinished, "--json")
    assert "newest checkpoint, step_000002" in printed.stderr
    assert printed.stdout == run(runs / "ppo", "--json").stdout
    of_first = run(runs / "ppo", "--json", "--against", unfinished / "checkpoints" / "step_000002")
    assert of_first.exit_code == 0


def test_invalid_comparisons(runs, tmp_path):
    message = error_message(runs / "sft", "--against", runs / "ppo")
    assert (
        "only a policy run (PPO, GRPO or RLOO) names the prompts, reward model and rule to compare by"
        in message
    )
    assert "a reward model cannot answer" in error_message(runs / "ppo", "--against", runs / "reward")
    assert "no such model folder" in error_message(runs / "ppo", "--against", "runs/none")
    assert "not a run folder" in error_message(tmp_path / "none", "--against", runs / "sft")
    unfinished = tmp_path / "sft"
    shutil.copytree(runs / "sft", unfinished)
    shutil.rmtree(unfinished / "model")
    shutil.rmtree(unfinished / "checkpoints")
    assert "no intact checkpoint" in error_message(runs / "ppo", "--against", unfinished)
    assert "no intact checkpoint" in error_message(unfinished)
    assert "leave --html out" in error_message(runs / "sft", "--html", tmp_path / "page.html")


@pytest.fixture
def functions(tmp_path) -> Path:
    """A file with a function for every field that takes one."""
    file = tmp_path / "functions.py"
    file.write_text(
        "def gold(answer, row):\n    return float(len(answer) % 2)\n\n\n"
        "def chat_row(row):\n    return {'messages': row['turns']}\n\n\n"
        "def prompt_row(row):\n    return {'prompt': row['question']}\n\n\n"
        "def length(answer, reference):\n    return 1 / (1 + abs(len(answer) - len(reference)))\n"
    )
    turns = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "It is 2."}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"turns": turns}) + "\n")
    (tmp_path / "questions.jsonl").write_text('{"question": "What is 1 + 1?"}\n{"question": "And 2 + 2?"}\n')
    return file


def sft_with_functions(functions: Path) -> SFT:
    rows = Source(path=str(functions.with_name("chats.jsonl")), shape=f"{functions}:chat_row")
    return SFT(
        name="own",
        model=Model(path="tuner:tiny"),
        data=Chat(files=(rows,), test_files=(rows,), template="internlm2", max_length=64),
        evaluation=Evaluation(score=f"{functions}:length", max_new_tokens=4),
        **SHORT,
        **PACKED,
    )


def grpo_with_functions(functions: Path) -> GRPO:
    rows = Source(path=str(functions.with_name("questions.jsonl")), shape=f"{functions}:prompt_row")
    return GRPO(
        name="own",
        policy=Model(path="tuner:tiny"),
        reward=f"{functions}:gold",  # type: ignore[arg-type]
        prompts=Prompts(files=(rows,), test_files=(rows,), template="internlm2", max_length=64),
        prompts_per_step=2,
        answers_per_prompt=2,
        sampling=Sampling(max_new_tokens=4),
        evaluation=PolicyEvaluation(rule=f"{functions}:gold"),
        tokens_per_pass=512,
        **SHORT,
    )


@pytest.mark.parametrize("config_of", [sft_with_functions, grpo_with_functions])
def test_functions_whose_file_is_gone_are_read_from_the_run(functions, tmp_path, config_of):
    config = config_of(functions)
    tuner.train(config, runs=tmp_path)
    before = run(tmp_path / "own", "--json").stdout
    functions.unlink()
    assert json.loads(run(tmp_path / "own", "--json").stdout) == json.loads(before)
    (tmp_path / "own/functions.json").unlink()
    assert "functions.py" in error_message(tmp_path / "own")


def test_a_reward_rule_is_missed_before_anything_is_generated(functions, tmp_path, monkeypatch):
    tuner.train(grpo_with_functions(functions), runs=tmp_path)
    functions.write_text(functions.read_text().replace("def gold", "def other"))
    file = tmp_path / "own/config.json"
    values = json.loads(file.read_text())
    values["evaluation"]["rule"] = None
    file.write_text(json.dumps(values))
    monkeypatch.setattr(comparing, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert "has no function 'gold', which reward names" in error_message(tmp_path / "own")


def test_a_run_without_test_prompts(runs, tmp_path):
    shutil.copytree(runs / "ppo", tmp_path / "ppo")
    file = tmp_path / "ppo/config.json"
    values = json.loads(file.read_text())
    values["prompts"]["test_files"] = []
    values["evaluation"]["rule"] = None
    file.write_text(json.dumps(values))
    assert "holds out no test prompts; name some with --files" in error_message(tmp_path / "ppo")


def test_tasks_before_and_after_every_stage(runs, tmp_path):
    file, page = tmp_path / "task.jsonl", tmp_path / "page.html"
    choice = {"messages": [{"role": "user", "content": "a"}], "choices": ["b", "c"], "answer": 0}
    lines = Path(tuner.__file__).parent.joinpath("embedded/sums/train.jsonl").read_text().splitlines()
    file.write_text("\n".join([*lines[:3], json.dumps(choice)]))
    options = ["--tasks", file, "--max-new-tokens", 4]
    result = CliRunner().invoke(
        app, [*map(str, [runs / "ppo", *options, "--against", runs / "dpo", "--html", page])]
    )
    assert result.exit_code == 0, result.exception
    assert "accuracy over 4 rows, 3 of them seen in training" in page.read_text(encoding="utf-8")
    evaluation = json.loads(run(runs / "ppo", *options, "--against", runs / "dpo", "--json").stdout)
    figures = evaluation["tasks"][str(file)]["accuracy"]
    assert list(figures) == ["tuner:tiny", str(runs / "sft"), str(runs / "ppo"), str(runs / "dpo")]
    assert ["change" in values for values in figures.values()] == [False, True, True, True]
    assert evaluation["contamination"][str(file)]["seen"] == 3
    alone = json.loads(run(runs / "sft", *options, "--alone", "--limit", 2, "--json").stdout)
    assert list(alone["tasks"][str(file)]["accuracy"]) == [str(runs / "sft")]
    assert alone["contamination"][str(file)]["rows"] == 2
    model = json.loads(run("tuner:tiny", *options, "--plain", "--json").stdout)
    assert (list(model["tasks"][str(file)]["accuracy"]), model["contamination"]) == (["tuner:tiny"], {})
    assert "a reward model answers no tasks" in error_message(runs / "reward", *options)
    assert "a reward model answers no tasks" in error_message(
        "tuner:tiny", *options, "--against", runs / "reward"
    )
    assert "no such file" in error_message(runs / "sft", "--tasks", tmp_path / "none.jsonl")


def test_tasks_of_every_round(cool, runs, tmp_path):
    file = tmp_path / "task.jsonl"
    file.write_text(json.dumps({"prompt": "a", "answer": "b"}))
    evaluation = json.loads(run(cool, "--tasks", file, "--max-new-tokens", 2, "--json").stdout)
    names = list(evaluation["tasks"][str(file)]["accuracy"])
    assert names == ["tuner:tiny", str(runs / "sft"), "round 1", "round 2"]


def test_a_config_for_opencompass(runs, tmp_path):
    file = tmp_path / "opencompass.py"
    options = ["--tasks", "gsm8k,math.math_gen_265cce", "--opencompass", file]
    assert run(runs / "ppo", *options).exit_code == 0
    text = file.read_text(encoding="ascii")
    assert "    from opencompass.configs.datasets.gsm8k.gsm8k_gen import *\n" in text
    assert "    from opencompass.configs.datasets.math.math_gen_265cce import *\n" in text
    values: dict = {}
    # OpenCompass itself is asked in tests/handover
    exec(text.partition("models = ")[1] + text.partition("models = ")[2], values)
    base, sft, ppo = values["models"]
    assert [model["abbr"] for model in values["models"]] == [
        "tuner:tiny",
        str(runs / "sft"),
        str(runs / "ppo"),
    ]
    assert "peft_path" not in base
    assert (ppo["path"], ppo["peft_path"]) == (base["path"], str((runs / "ppo" / "model").resolve()))
    assert ppo["tokenizer_path"] == ppo["peft_path"]
    assert "<|im_end|>" in sft["stop_words"]
    assert "no dataset of OpenCompass" in error_message(runs / "ppo", "--tasks", "a b", *options[2:])


def test_options_of_the_other_evaluation(runs):
    assert "--limit: this option is for --tasks" in error_message(runs / "sft", "--limit", 2)
    assert "--files: rows of the run's own" in error_message(runs / "sft", "--tasks", "a", "--files", "b")


def test_a_card_of_every_stage(runs, cool, tmp_path):
    cards = {
        folder.name: model_card(folder) for folder in (runs / "sft", runs / "reward", runs / "ppo", cool)
    }
    metadata = {name: yaml.safe_load(card.split("---\n")[1]) for name, card in cards.items()}
    assert metadata["sft"] == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["tuner", "sft"],
    }
    assert metadata["reward"]["pipeline_tag"] == "text-classification"
    for name, card in cards.items():
        for title in ("Base", "Data", "Figures", "Config", "How to load it", "Versions"):
            assert f"\n## {title}\n" in card, (name, title)
    results = tuner.open_run(runs / "ppo").results
    assert results is not None
    assert f"{results['score']['after']:.4f}" in cards["ppo"]
    assert "| <code>tuner:sums/train.jsonl</code> | <code>training</code> |" in cards["sft"]
    assert "AutoPeftModelForCausalLM" in cards["sft"]
    assert "tuner score" in cards["reward"]
    assert "its folder does not say its license" in cards["sft"]


def test_a_model_that_leaves_takes_its_card_along(runs, tmp_path):
    run = runs / "sft"
    own = (run / "model" / "README.md").read_text()
    assert own == model_card(run)
    text = tmp_path / "text.txt"
    text.write_text("What is 2 + 3? " * 100)
    for folder, words, summary, library in (
        ("merged", ["merge"], "A complete language model", "transformers"),
        (
            "gguf",
            ["export", "--format", "gguf", "--quantize", "q8_0"],
            "A GGUF file, matrices in q8_0",
            None,
        ),
        ("lora", ["export", "--format", "gguf-lora"], "An adapter as a GGUF file", None),
    ):
        options = [*words[1:], *([] if folder == "lora" else ["--text", str(text)])]
        main_app([words[0], str(run), str(tmp_path / folder), *options], standalone_mode=False)
        card = (tmp_path / folder / "README.md").read_text()
        assert f"\n{summary}, trained by tuner" in card
        assert yaml.safe_load(card.split("---\n")[1]).get("library_name") == library
        # the figures are the run's
        assert (
            card.partition("## Figures")[2].partition("##")[0]
            == own.partition("## Figures")[2].partition("##")[0]
        )
        assert (tmp_path / folder / "curves.png").read_bytes() == (run / "curves.png").read_bytes()


def test_a_card_of_somebodys_own_stays(runs, tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    write_card(runs / "sft", tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    assert not (tmp_path / "curves.png").exists()
    write_card("tuner:tiny", tmp_path / "of_no_run")
    assert not (tmp_path / "of_no_run").exists()


def test_the_card_of_a_checkpoint_has_no_figures_of_the_end(runs, tmp_path):
    (checkpoint,) = (runs / "ppo" / "checkpoints").iterdir()
    card = model_card(usable_path(str(checkpoint)))
    assert f"# ppo, {checkpoint.name}".replace("_", "\\_") in card
    assert card.partition("## Figures")[2].partition("##")[0].strip().endswith("None.")


def test_nothing_of_a_run_is_markup_in_its_card(runs, tmp_path):
    folder = tmp_path / "a<script>|[x](y)"
    shutil.copytree(runs / "sft", folder)
    data = json.loads((folder / "data.json").read_text())
    data["report"]["sources"][0]["path"] = "`<img src=x onerror=y>`|\nz"
    (folder / "data.json").write_text(json.dumps(data))
    card = model_card(folder)
    assert not re.search(r"<script>|<img|[^\\]\[x\]\(y\)", card)
    with pytest.raises(UserError, match="this is none; name the run"):
        model_card(tmp_path)


def test_the_license_that_a_base_states(tmp_path):
    assert base_license(tmp_path) is None
    (tmp_path / "README.md").write_text("---\ntags: [a]\nlicense: apache-2.0\n---\n# A\nlicense: other\n")
    assert base_license(tmp_path) == "apache-2.0"
    (tmp_path / "README.md").write_text('---\nlicense: "mit"\n---\n')  # as cards of ours state it
    assert base_license(tmp_path) == "mit"
    (tmp_path / "README.md").write_text("# A\nlicense: other\n")
    assert base_license(tmp_path) is None


def test_what_a_push_uploads(runs, tmp_path):
    plan = plan_upload(runs / "sft", "hf:me/sums")
    assert (plan.host, plan.repository, plan.card) == ("hf", "me/sums", model_card(runs / "sft"))
    names = {path.name for path in (runs / "sft" / "model").iterdir()} - {"README.md"}
    assert set(plan.files) == names | {"curves.png"}
    assert "adapter_model.safetensors" in names
    for wrong in ("me/sums", "hf:sums", "hf:me/sums/x", "ftp:me/sums"):
        with pytest.raises(UserError, match="no destination; write hf:owner/name"):
            plan_upload(runs / "sft", wrong)
    # tests have no network
    with pytest.raises(UserError, match="hf:me/sums: the upload failed"):
        upload(plan, private=True)
