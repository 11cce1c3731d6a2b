"""The table of docs/scaling.md: what each layout of processes needs by the memory plan, on the shapes of InternLM2.

No weights are read, and nothing is measured on a device: `tuner check CONFIG --gpus N` prints the same of any config.

    python scripts/plan_layouts.py            # print the table
    python scripts/plan_layouts.py --write    # and put it into docs/scaling.md
"""

from __future__ import annotations

import argparse
import shutil
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from demo import replace_part

from tuner.algorithms.algorithm import algorithm_of
from tuner.config import Model, load_config, override
from tuner.errors import UserError
from tuner.models.internlm2 import InternLM2Config
from tuner.models.load import load_model
from tuner.models.load_roles import PolicyModels, load_policy_roles
from tuner.models.memory import memory_plan
from tuner.resources import locate
from tuner.stages.check import META, memory_budget, refuse_model_in_layout
from tuner.stages.rl.check import policy_memory

SHAPES: dict[str, dict[str, Any]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "20b": {"hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 48, "num_attention_heads": 48},
}  # fmt: skip
"""InternLM2 report (arXiv 2403.17297), table 2, and the released config.json of each."""
LAYOUTS: dict[str, dict[str, int]] = {
    "one process": {},
    "shard=2": {"shard": 2},
    "shard=8": {"shard": 8},
    "sequence=2": {"sequence": 2},
    "shard=8, sequence=8": {"shard": 8, "sequence": 8},
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "7B, LoRA": ("internlm2_7b_lora", {}),
    "7B, LoRA, rows of 32k": ("internlm2_7b_lora", {"tokens_per_pass": 32_768, "tokens_per_step": 32_768}),
    "7B, all weights, rows of 32k": ("internlm2_7b_full", {}),
    "20B, all weights, rows of 8k": ("internlm2_20b_full", {}),
    "20B, QLoRA": ("internlm2_20b_qlora", {}),
    "20B, QLoRA, rows of 16k": ("internlm2_20b_qlora", {"tokens_per_pass": 16_384}),
    "20B, PPO, three roles on one 4-bit base": ("internlm2_20b_ppo", {}),
}
"""Label -> shipped config, and what is changed in it."""
BEGIN, END = "<!-- plan: scripts/plan_layouts.py -->\n", "<!-- end of plan -->\n"
PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"


def main() -> None:
    """Print the table, and write it where asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        table = make_table(Path(folder))
    print(table)
    if arguments.write:
        replace_part(PAGE, BEGIN, END, table)


def make_table(folder: Path) -> str:
    """Peak memory of a process in GiB, a row for each config and a column for each layout."""
    lines = [f"| config | {' | '.join(LAYOUTS)} |", f"| --- |{' ---: |' * len(LAYOUTS)}"]
    for label, (name, changes) in CONFIGS.items():
        base = model_folder(folder / label, SHAPES[name.split("_")[1]])
        configs = [override(load_config(name), changes | {"parallel": layout}) for layout in LAYOUTS.values()]
        lines.append(f"| {label} | {' | '.join(cell(config, base) for config in configs)} |")
    return "\n".join(lines) + "\n"


def cell(config: Any, base: Path) -> str:
    """Peak memory in GiB; a dash where the model cannot be laid out so."""
    try:
        return f"{peak(config, base):.1f}"
    except UserError:
        return "–"


def peak(config: Any, base: Path) -> float:
    """Peak memory of a process by the plan, in GiB, of a config on a model's shape."""
    if hasattr(config, "policy"):
        return _policy_peak(config, base)
    model = Model(path=str(base), quantization=config.model.quantization)
    loaded = load_model(model, precision=config.precision, device=META, adapter=config.adapter)
    refuse_model_in_layout(config, loaded)
    budget = memory_budget(config, config.tokens_per_pass, language_head=True)
    return memory_plan(budget, [loaded]).peak / 2**30


def _policy_peak(config: Any, base: Path) -> float:
    """Of policy, reference and critic; a reward model beside them is one more frozen adapter of the same size."""
    config = override(config, {"policy.path": str(base), "policy.revision": None})
    models = PolicyModels(
        policy=config.policy,
        reference=None,
        reward=None,
        adapter=config.adapter,
        critic_adapter=None,
        critic_from="policy",
        layout="shared",
        roles=frozenset({"reference", "critic"}),
        template=config.prompts.template,
        precision=config.precision,
        seed=0,
        gradient_checkpointing=True,
    )
    roles = load_policy_roles(models, META, nullcontext).roles
    return policy_memory(config, algorithm_of(config), roles).peak / 2**30


def model_folder(folder: Path, shape: dict[str, Any]) -> Path:
    """A model's folder without its weights."""
    folder.mkdir()
    settings = InternLM2Config(vocab_size=92_544, num_key_value_heads=8, **shape)
    settings.architectures = ["InternLM2ForCausalLM"]
    settings.save_pretrained(folder)
    for file in Path(locate("tuner:tiny")).glob("*token*"):
        shutil.copy(file, folder)
    return folder


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
