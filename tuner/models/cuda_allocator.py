"""What torch's allocator of GPU memory is asked for, unless the user asks for something else."""

from __future__ import annotations

import os

VARIABLE = "PYTORCH_ALLOC_CONF"
FORMER = "PYTORCH_CUDA_ALLOC_CONF"
"""Its former name, which torch still reads."""
GROWING = "expandable_segments:True"
"""Segments that grow, so that passes of other lengths do not leave holes that no later one fits into."""

_is_ours = False


def let_segments_grow() -> None:
    """Ask for it in the environment, which torch reads as it first allocates on a GPU; what a user has set is kept."""
    global _is_ours
    if not {VARIABLE, FORMER} & os.environ.keys():
        os.environ[VARIABLE] = GROWING
        _is_ours = True


def is_ours(name: str, value: str) -> bool:
    """Whether a variable was set by `let_segments_grow`, which other programs must not inherit: vLLM has its
    own pools of memory, which such segments exclude."""
    return _is_ours and (name, value) == (VARIABLE, GROWING)
