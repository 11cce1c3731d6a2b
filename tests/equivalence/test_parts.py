"""Parts of models and of rows, below the stages: what two processes hold and compute, against one. One launch."""

import json
import shutil
from pathlib import Path

import pytest

from tests.equivalence.conftest import in_processes
from tuner.models.tokenizer import read_tokenizer, save_tokenizer
from tuner.resources import locate

SCRIPT = """
import gc, json, os, sys
from pathlib import Path

import bitsandbytes.functional
import numpy as np
import torch
import transformers.core_model_loading as loading
from torch.distributed.tensor import DTensor

from tuner.config import LoRA, Model, Rope
from tuner.config.parallel import Parallel
from tuner.data.batch import make_batch
from tuner.models.forward import scores, token_logprobs, token_loss
from tuner.models.load import load_model
from tuner.models.sharding import shard
from tuner.models.shared_rows import share_rows
from tuner.training.devices import Devices

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
cpu = torch.device("cpu")
shards = Devices(device="cpu", precision="fp32", parallel=Parallel(shard=2)).mesh.shards
rows = Devices(device="cpu", precision="fp32", parallel=Parallel(sequence=2)).mesh.row
most = 0

def held():
    # of all tensors that there are, the memory, which views share
    memory = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter, bitsandbytes.nn.Params4bit) and thing.device == cpu:
            memory[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(memory.values())

def watched(function):
    def run(*arguments, **settings):
        global most
        result = function(*arguments, **settings)
        most = max(most, held())
        return result
    return run

loading.set_param_for_module = watched(loading.set_param_for_module)
bitsandbytes.functional.quantize_4bit = watched(bitsandbytes.functional.quantize_4bit)

def load(case, processes=None):
    global most
    gc.collect()
    before, most = held(), 0
    loaded = load_model(precision="fp32", device=cpu, processes=processes, **case)
    return loaded, most - before

def batch_of(*lengths):
    generator = np.random.default_rng(0)
    return make_batch(
        [(generator.integers(5, 400, n).astype(np.int32), np.ones(n, np.float32)) for n in lengths]
    )

def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

def close(one, other):
    return float((one - other).norm() / one.norm())

def read_in_parts(case):
    whole, of_whole = load(case)
    parts, of_parts = load(case, shards)
    shard(parts, shards)
    part = parts.model.get_parameter
    weights = {name: weight for name, weight in whole.model.named_parameters()}
    same = weights.keys() == dict(parts.model.named_parameters()).keys()
    for name, weight in weights.items():
        other = part(name).full_tensor() if isinstance(part(name), DTensor) else part(name)
        same = same and other.dtype == weight.dtype and torch.equal(other, weight)
        same = same and part(name).requires_grad == weight.requires_grad
    run = scores if case.get("head") == "score" else token_loss
    results = [run(loaded.model, batch_of(40, 7, 13)).sum() for loaded in (whole, parts)]
    for result in results:
        if result.requires_grad:
            result.backward()
    grads, others = gradients(whole.model), gradients(parts.model)
    same_step = torch.equal(*results) and grads.keys() == others.keys()
    frozen = [w for w in whole.model.parameters() if not w.requires_grad]
    return {
        "same": same,
        "same step": same_step and all(torch.equal(grad, others[name]) for name, grad in grads.items()),
        "whole": of_whole,
        "parts": of_parts,
        "bytes": sum(w.nbytes for w in frozen),
        "largest": max(module.in_features * module.out_features * 4 for module in whole.model.modules()
                       if isinstance(module, torch.nn.Linear)),
    }

def rotated_by_length(case, trained):
    # the row is cut in a segment that is longer than what the model was trained for, near the segment's begin
    loaded, _ = load(case)
    batch, found = batch_of(16, 80, trained + 8, 65, 5), {}
    for processes in (None, rows):
        if processes is not None:
            share_rows(loaded, processes)
        loaded.model.zero_grad()
        loss = token_loss(loaded.model, batch)
        loss.backward()
        grads = gradients(loaded.model)
        if processes is not None:
            for grad in grads.values():
                torch.distributed.all_reduce(grad)
        logprobs = token_logprobs(loaded.model, batch)[0].detach()
        found[processes is None] = loss.detach(), logprobs, torch.cat([grad.flatten() for grad in grads.values()])
    one, two = found[True], found[False]
    return [close(a, b) for a, b in zip(one, two)]

def trained_root():
    # a pass without gradients, a step, and another pass: as evaluation between steps
    case = {"model": Model(path="tuner:tiny")}
    found = []
    for processes in (None, shards):
        loaded, _ = load(case, processes)
        if processes is not None:
            shard(loaded, processes)
        weights, batch = list(loaded.model.parameters()), batch_of(40, 7, 13)
        optimizer, losses = torch.optim.SGD(weights, lr=0.0, weight_decay=0.0), []
        for _ in range(3):
            with torch.no_grad():
                losses.append(float(token_loss(loaded.model, batch)))
            for group in optimizer.param_groups:
                group["lr"] = 3e-3
            # both processes make this pass, and shards sum their gradients
            (token_loss(loaded.model, batch) / (1 if processes is None else 2)).backward()
            with torch.no_grad():
                losses.append(float(token_loss(loaded.model, batch)))
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            losses.append(float(token_loss(loaded.model, batch)))
        found.append(losses)
    return found

tiny, grown = "tuner:tiny", str(folder / "grown")
lora = LoRA(r=4)
cases = {
    "lora": {"model": Model(path=tiny), "adapter": lora},
    "nf4": {"model": Model(path=tiny, quantization="nf4"), "adapter": lora},
    "score": {"model": Model(path=tiny, quantization="nf4"), "adapter": lora, "head": "score"},
    "modules": {"model": Model(path=tiny, quantization="nf4"),
                "adapter": LoRA(r=4, train_whole=("embed_tokens", "lm_head"))},
    "grown": {"model": Model(path=grown, resize_embeddings=True), "adapter": lora},
    "frozen": {"model": Model(path=tiny), "train": False},
}
report = {name: read_in_parts(case) for name, case in cases.items()}
factors = tuple(1 + 0.5 * i for i in range(json.loads((folder / "rotary.json").read_text())))
ropes = {
    "linear": Rope(scaling="linear", factor=8.0),
    "dynamic": Rope(scaling="dynamic", factor=8.0),
    "longrope": Rope(scaling="longrope", factor=8.0, long_factors=factors),
    "mixed": Rope(scaling="yarn", factor=8.0, mixed_window=True),
}
short = str(folder / "short")
report["ropes"] = {
    name: rotated_by_length({"model": Model(path=short, rope=rope), "adapter": lora}, 32)
    for name, rope in ropes.items()
}
report["root"] = trained_root()
(folder / f"report-{rank}.json").write_text(json.dumps(report))
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("parts")
    tiny = Path(locate("tuner:tiny"))
    for name in ("grown", "short"):
        shutil.copytree(tiny, folder / name)
    file = folder / "short" / "config.json"
    config = json.loads(file.read_text())
    tokenizer = read_tokenizer(tiny)
    tokenizer.add_tokens([f"<new {number}>" for number in range(len(tokenizer), config["vocab_size"] + 3)])
    save_tokenizer(tokenizer, folder / "grown")
    file.write_text(json.dumps(config | {"max_position_embeddings": 32}))
    heads = config["hidden_size"] // config["num_attention_heads"]
    (folder / "rotary.json").write_text(str(heads // 2))
    in_processes(2, folder, {}, SCRIPT)
    return [json.loads((folder / f"report-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["lora", "nf4", "score", "modules", "grown", "frozen"])
def test_a_frozen_base_is_read_in_parts(reports, name):
    """The same bits and the same step as of a base that each process reads whole; no process ever holds it whole.

    While it loads, a process holds its part and the layer that is being read: the weight in fp32, and of a quantized
    one all of its bytes and scales beside it (an eighth, and a 64th), before it drops what is not its own.
    """
    for report in (found[name] for found in reports):
        assert report["same"]
        assert report["same step"]
        if name in ("modules", "grown"):  # embedding and head are read in parts, and gathered to be copied
            continue
        assert report["whole"] >= report["bytes"]
        assert report["parts"] <= report["bytes"] / 2 + 1.5 * report["largest"]
        assert report["parts"] < 0.8 * report["whole"]


@pytest.mark.parametrize("name", ["linear", "dynamic", "longrope", "mixed"])
def test_rows_that_processes_share_are_rotated_by_their_segments(reports, name):
    """Relative by norm. A rounding of fp32 is 6e-8; gradients are sums in another order, of terms that nearly cancel,
    and differ as much where positions depend on no length (linear)."""
    for report in reports:
        loss, logprobs, gradients = report["ropes"][name]
        assert max(loss, logprobs) < 1e-6
        assert gradients < 1e-5


def test_a_pass_after_a_step_uses_the_new_weights(reports):
    """Embedding, last norm and head of a model in shards, after passes without gradients between the steps.

    FSDP2 leaves the root gathered by default: the pass after a step would compute with the old ones, and nothing would
    say so. `reshard_after_forward=True` in `sharding.divide` prevents it: without it, this test fails.
    """
    for report in reports:
        one, shards = report["root"]
        assert one[0] - one[-1] > 1e-2 * one[0]  # the steps change the loss
        assert shards == pytest.approx(one, rel=2e-6)
