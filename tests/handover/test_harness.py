"""tuner's engine under lm-evaluation-harness against the harness's own `hf` model, on the same rows and weights.

Needs lm-evaluation-harness beside tuner: `pip install 'tuner[eval]'`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tuner.config import Model
from tuner.data.template import Template
from tuner.evaluation.task_model import TaskModel, open_task_model
from tuner.models.tokenizer import read_tokenizer
from tuner.resources import locate

pytestmark = pytest.mark.handover

QUESTIONS = [f"What is {number} + {7 * number % 50}?" for number in range(3, 43)]
TASKS = {
    "generated": """output_type: generate_until
generation_kwargs: {until: ["."], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
""",
    "continued": """output_type: loglikelihood
target_delimiter: ""
metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc, aggregation: mean}]
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
""",
    "chosen": """output_type: multiple_choice
metric_list: [{metric: acc, aggregation: mean}, {metric: acc_norm, aggregation: mean}]
doc_to_text: "{{question}}"
doc_to_choice: ["{{answer}}", "no", "It is a long way to an answer"]
doc_to_target: 0
""",
    "rolling": """output_type: loglikelihood_rolling
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
doc_to_text: ""
doc_to_target: "{{question}} {{answer}}"
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a ChatML template, and tasks whose answers are its own for every other row."""
    folder = tmp_path_factory.mktemp("harness")
    shutil.copytree(locate("tuner:tiny"), folder / "model")
    template = Template("chatml", read_tokenizer(folder / "model")).published  # type: ignore[arg-type]
    (folder / "model" / "chat_template.jinja").write_text(template)
    model = opened(folder)
    prompts = [model.template.prompt_text(question(text)) for text in QUESTIONS]  # type: ignore[union-attr]
    own = model.answers(
        [model.loaded.tokenizer.encode(text, add_special_tokens=False) for text in prompts], 6
    )
    rows = [
        {"question": text, "answer": answer if number % 2 else "It is 7."}
        for number, (text, answer) in enumerate(zip(QUESTIONS, own, strict=True))
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    for name, text in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.json'}}}}}\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}test_split: test\n{text}")
    return folder


def question(text: str) -> Any:
    from tuner.data.conversation import Conversation, Turn

    return Conversation((Turn("user", text),))


def opened(folder: Path, plain: bool = False) -> TaskModel:
    model = Model(path=str(folder / "model"))
    return open_task_model(model, "fp32", chat_template=None, plain=plain, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def measured(folder: Path) -> dict[tuple[str, bool], Any]:
    """(model, whether prompts are in the chat template) -> results with samples."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from tuner.evaluation.harness_model import HarnessModel

    manager = TaskManager(include_defaults=False)
    models = {
        ("hf", True): "hf",
        ("hf", False): "hf",
        ("own rules", True): HarnessModel(opened(folder), own_rules=True),
        ("own rules", False): HarnessModel(opened(folder, plain=True), own_rules=True),
        ("tuner", True): HarnessModel(opened(folder)),
        ("tuner", False): HarnessModel(opened(folder, plain=True)),
    }
    return {
        key: simple_evaluate(
            model,
            model_args=f"pretrained={folder / 'model'},dtype=float32" if model == "hf" else None,
            device="cpu",
            batch_size=8 if model == "hf" else None,
            # whole texts are not answers: they have no template
            tasks=[str(folder / f"{name}.yaml") for name in TASKS if not (key[1] and name == "rolling")],
            apply_chat_template=key[1],
            bootstrap_iters=0,
            task_manager=manager,
        )
        for key, model in models.items()
    }


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_the_harness_own_model_gives_the_same(measured: dict, task: str, chat: bool):
    if chat and task == "rolling":
        pytest.skip("whole texts are measured without a template")
    hf, ours = measured["hf", chat], measured["own rules", chat]
    for expected, sample in zip(hf["samples"][task], ours["samples"][task], strict=True):
        assert sample["arguments"] == expected["arguments"]
        for [one], [other] in zip(sample["resps"], expected["resps"], strict=True):
            if task == "generated":
                assert one == other
            else:
                values = [value if isinstance(value, tuple) else (value, None) for value in (one, other)]
                # fp32 sums of some 20 terms of up to 20, in another order
                assert values[0][0] == pytest.approx(values[1][0], abs=2e-4)
                assert values[0][1] == values[1][1]
    for key, value in hf["results"][task].items():
        if isinstance(value, float):
            assert ours["results"][task][key] == pytest.approx(value, rel=1e-4)


def test_an_answer_of_the_models_own_is_greedy_where_the_templates_line_break_is_context(measured: dict):
    def flags(model: str) -> list[bool]:
        samples = sorted(measured[model, True]["samples"]["continued"], key=lambda sample: sample["doc_id"])
        return [bool(sample["resps"][0][0][1]) for sample in samples]

    assert flags("tuner") == [bool(number % 2) for number in range(len(QUESTIONS))]
    assert sum(flags("hf")) < sum(flags("tuner")), "else the split of the harness would do"


def test_the_command(folder: Path):
    import typer

    from tuner.cli.eval import evaluate

    app = typer.Typer()
    app.command("eval")(evaluate)
    tasks = ",".join(str(folder / f"{name}.yaml") for name in ("generated", "chosen"))
    result = CliRunner().invoke(
        app, [str(folder / "model"), "--tasks", tasks, "--against", "tuner:tiny", "--limit", "10", "--json"]
    )
    assert result.exit_code == 0, result.exception
    figures = json.loads(result.stdout)["tasks"]
    assert set(figures) == {"generated", "chosen"}
    assert set(figures["chosen"]) == {"acc", "acc_norm"}
    [own, other] = figures["generated"]["exact_match"].values()
    assert own["rows"] == 10
    assert "change" in other


def test_tasks_that_are_not_there(folder: Path):
    from tuner.errors import UserError
    from tuner.evaluation.harness import HarnessTasks

    with pytest.raises(UserError, match="no_such_task: lm-evaluation-harness has no such task"):
        HarnessTasks(["no_such_task"], None, None, False).checked()
    gone = folder / "gone.yaml"
    gone.write_text((folder / "chosen.yaml").read_text().replace("rows.json", "gone.json"))
    with pytest.raises(UserError, match="its rows cannot be loaded"):
        HarnessTasks([str(gone)], None, None, False).checked()
