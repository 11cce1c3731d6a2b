"""The runs whose numbers are kept in losses.json: eight steps of the quickstart's kind, QLoRA and full.

One thread, fp32, the embedded model. scripts/record_goldens.py writes what test_losses.py compares with.
"""

import json
import platform
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import tuner
from tuner.config import SFT, AdamW, Chat, Cosine, Evaluation, LoRA, Model, override
from tuner.models.fingerprint import fingerprint
from tuner.resources import locate
from tuner.stages.data_view import load_rows
from tuner.training.versions import versions

FILE = Path(__file__).parent / "losses.json"
RECORD_AGAIN = "record again: python scripts/record_goldens.py"
STEPS = 8
KEPT = ("tokens", "loss", "lr", "grad_norm")
"""What is kept of every step."""
DECIDING = ("torch", "transformers", "peft", "bitsandbytes", "python", "processor")
"""What must be as it was for SAME to be asked."""
SAME = 1e-6
"""Relative tolerance where processor and versions are those of the recording: other code, other numbers."""
ELSEWHERE = 2e-3
"""... and where they are not: eight updates, each off by the model's rounding of a gradient, which is 1.0e-4 for this
model by tests/bounds.py::model_rounding, on both machines. A learning rate off by a hundredth is still told apart."""

QLORA = SFT(
    name="golden",
    model=Model(path="tuner:tiny", quantization="nf4"),
    adapter=LoRA(r=16, alpha=16),
    data=Chat(files=("tuner:sums/train.jsonl",), template="internlm2", max_length=128),
    optimizer=AdamW(lr=2e-3),
    schedule=Cosine(warmup=0.25),
    tokens_per_step=1_024,
    tokens_per_pass=512,
    max_steps=STEPS,
    precision="fp32",
    gradient_checkpointing=False,
    evaluation=Evaluation(samples=0),
)
CONFIGS = {
    "qlora": QLORA,
    "full": override(QLORA, {"model.quantization": None, "adapter": None, "optimizer.lr": 5e-4}),
}


def measure(config: SFT) -> dict[str, list[float]]:
    """Name -> value of every step, unrounded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory() as runs:
            metrics = tuner.train(config, runs=runs).metrics
    finally:
        torch.set_num_threads(threads)
    return {name: [record[name] for record in metrics] for name in KEPT}


def place() -> dict[str, str]:
    """What decides the last digits here."""
    # "AMD EPYC" names processors with AVX-512 and without
    processor = f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}"
    found = {**versions(), "processor": processor}
    return {name: str(found[name]) for name in DECIDING}


def inputs() -> dict[str, str]:
    """What decides all digits: the embedded model, and the tokens of its rows."""
    data = load_rows(QLORA)
    return {"model": fingerprint(locate("tuner:tiny")), "data": data.fingerprint}


def read() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def record() -> dict[str, Any]:
    """Measure all runs and write the file."""
    values = {
        "place": place(),
        "inputs": inputs(),
        "runs": {name: measure(config) for name, config in CONFIGS.items()},
    }
    FILE.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return values


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
