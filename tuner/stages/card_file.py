"""README.md beside a model that leaves tuner: the card of the run that it comes from."""

from __future__ import annotations

import shutil
from pathlib import Path

from tuner.config import Model
from tuner.models.locate import locate
from tuner.models.save import disk_errors
from tuner.stages.model_card import CARD, CURVES, Form, chatting, complete_form, model_card
from tuner.stages.run_models import is_run, run_folder_of


def write_card(model: str | Path, output: Path, form: Form | None = None) -> None:
    """Write the card, and the curves that it shows, into the folder of a model that comes from a run or a checkpoint.

    form: what the folder holds; None: the run's own model. Does nothing where `model` is of no run, whose facts a card
    would need, and where the folder has a card.
    """
    folder, card = run_folder_of(model), output / CARD
    if not is_run(folder) or card.exists():
        return
    text = model_card(model, form)
    with disk_errors(output):
        if (curves := folder / CURVES).is_file():
            shutil.copyfile(curves, output / CURVES)
        card.write_text(text, encoding="utf-8")


def folder_form(model: str, layout: str) -> Form:
    """Of a folder with all weights, in a layout of `tuner export`."""
    if not locate(Model(path=model), weights=False).has_score:
        return complete_form(is_reward_model=False)
    form = complete_form(is_reward_model=True)
    if layout != "llama":
        return form
    loading = (
        "```bash\ntuner score THIS_FOLDER rows.jsonl\n```\n\n```python\n"
        "from transformers import AutoModelForSequenceClassification\n\n"
        'model = AutoModelForSequenceClassification.from_pretrained("THIS_FOLDER")\n```'
    )
    return Form(form.summary, form.library, loading)


def gguf_form(storage: str) -> Form:
    """Of a GGUF file with its Modelfile. storage: of its matrices."""
    loading = (
        "```bash\nllama-cli -m THIS_FOLDER/model.gguf\ncd THIS_FOLDER && ollama create NAME -f Modelfile\n```"
    )
    return Form(f"A GGUF file, matrices in {storage}", None, loading)


def gguf_adapter_form() -> Form:
    """Of an adapter as a GGUF file with its Modelfile."""
    loading = (
        "```bash\nllama-cli -m BASE.gguf --lora THIS_FOLDER/adapter.gguf\n```\n\n"
        "The base's file has the base's chat template: give the program this model's."
    )
    return Form("An adapter as a GGUF file", None, loading)


def quantized_form(kind: str) -> Form:
    """Of a folder in compressed-tensors' format."""
    loading = f"```bash\nvllm serve THIS_FOLDER\n```\n\n{chatting('AutoModelForCausalLM')}"
    return Form(f"A complete language model, linear layers in {kind}", "transformers", loading)
