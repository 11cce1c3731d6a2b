"""Checkpoint layouts: a family's own, or for InternLM2 that of transformers' Llama, its architecture."""

from typing import Any, Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from tuner.errors import UserError
from tuner.models.adapter_kinds import has_score
from tuner.models.internlm2 import InternLM2Config

Layout = Literal["own", "llama"]
_ONLY_INTERNLM2 = ("architectures", "auto_map", "bias", "model_type", "rope_scaling", "rope_theta")


def in_layout(model: PreTrainedModel, layout: Layout) -> PreTrainedModel:
    """The model as an instance of the class that saves in this layout, with the same weights.

    "own": as the family publishes its models; InternLM2 with `wqkv`, and `output` or `v_head`. "llama": InternLM2 as
    LlamaForCausalLM or LlamaForSequenceClassification, for tools without InternLM2. Raises UserError for "llama" of
    another family.
    """
    if layout == "own":
        return model
    settings = model.config
    if not isinstance(settings, InternLM2Config):
        raise UserError(
            f"--layout llama is for InternLM2, and this is {type(model).__name__}; write --layout own"
        )
    values = {
        name: value for name, value in LlamaConfig.to_dict(settings).items() if name not in _ONLY_INTERNLM2
    }
    kind = LlamaForSequenceClassification if has_score(model) else LlamaForCausalLM
    # on meta, filled by assign=True: there is never a second copy of the weights
    with torch.device("meta"):
        twin = kind(LlamaConfig(**values))
    twin.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():  # a state dict leaves out those of rotary positions
        owner, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(owner), leaf, buffer)
    # assign has made two parameters of a tied head and embedding
    twin.tie_weights()
    rope: dict[str, Any] = dict(settings.rope_parameters or {})
    twin.config.rope_theta = rope["rope_theta"]  # where transformers 4 reads it
    return twin
