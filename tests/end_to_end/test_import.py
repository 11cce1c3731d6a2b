"""Configs of other trainers, imported and trained: a run of each, from rows in that trainer's columns."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import Done

XTUNER = """
from xtuner.utils import PROMPT_TEMPLATE
model = dict(
    type=SupervisedFinetune,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path="tuner:tiny"),
    lora=dict(type=LoraConfig, r=4, lora_alpha=8, lora_dropout=0.1),
)
train_dataloader = dict(
    batch_size=2,
    dataset=dict(
        type=process_hf_dataset,
        dataset=dict(type=load_dataset, path="json", data_files="rows.jsonl"),
        max_length=256,
        dataset_map_fn=alpaca_zh_map_fn,
        template_map_fn=dict(type=template_map_fn_factory, template=PROMPT_TEMPLATE.default),
        pack_to_max_length=True,
    ),
)
optim_wrapper = dict(optimizer=dict(type=AdamW, lr=1e-3), clip_grad=dict(max_norm=1), accumulative_counts=2)
param_scheduler = [dict(type=CosineAnnealingLR, eta_min=0.0)]
train_cfg = dict(type=TrainLoop, max_epochs=1)
"""
LLAMA_FACTORY = """
model_name_or_path: tuner:tiny
stage: rm
do_train: true
finetuning_type: lora
dataset: pairs
dataset_dir: .
template: chatml
cutoff_len: 128
per_device_train_batch_size: 2
learning_rate: 1e-3
num_train_epochs: 1
"""
AXOLOTL = """
base_model: tuner:tiny
adapter: lora
lora_r: 4
lora_alpha: 8
datasets:
  - path: rows.jsonl
    type: chat_template
    field_messages: dialog
    message_property_mappings: {role: who, content: says}
    roles: {user: [customer], assistant: [agent]}
chat_template: chatml
sequence_len: 256
micro_batch_size: 2
learning_rate: 1e-3
"""


def write_rows(path: Path, row: Callable[[int], dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row(number))}\n" for number in range(24)), encoding="utf-8")


@pytest.mark.parametrize("trainer", ["xtuner", "llama_factory", "axolotl"])
def test_an_imported_config_trains(trainer: str, tuner: Callable[..., Done], tmp_path: Path) -> None:
    match trainer:
        case "xtuner":
            theirs, text = "theirs.py", XTUNER
            write_rows(
                tmp_path / "rows.jsonl",
                lambda n: {"instruction_zh": f"{n} + 1?", "input_zh": "", "output_zh": f"{n + 1}."},
            )
        case "llama_factory":
            theirs, text = "theirs.yaml", LLAMA_FACTORY
            write_rows(
                tmp_path / "rows.jsonl", lambda n: {"q": f"{n} + 1?", "good": f"{n + 1}.", "bad": "No."}
            )
            columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
            info = {"pairs": {"file_name": "rows.jsonl", "ranking": True, "columns": columns}}
            (tmp_path / "dataset_info.json").write_text(json.dumps(info))
        case _:
            theirs, text = "theirs.yaml", AXOLOTL
            write_rows(
                tmp_path / "rows.jsonl",
                lambda n: {
                    "dialog": [
                        {"who": "customer", "says": f"{n} + 1?"},
                        {"who": "agent", "says": f"{n + 1}."},
                    ]
                },
            )
    (tmp_path / theirs).write_text(text, encoding="utf-8")
    imported = tuner("import", theirs, "-o", "mine.py")
    assert imported.code == 0, imported.err
    trained = tuner("train", "mine.py", "max_steps=1", "precision=fp32")
    assert trained.code == 0, trained.err
    metrics = (tmp_path / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[0])["loss"] > 0
