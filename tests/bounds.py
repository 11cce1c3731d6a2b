"""What the bounds of the tests are made of: the one place that says how far two right answers may lie apart.

A sum depends on the order in which it is taken, and a processor's libraries choose the order: by the width of its
vectors, its caches, whether it multiplies bf16 in tiles (AMX) or rounds each product. A bound taken from what one
machine happened to print is that machine's luck. A bound here has one of two sources, and says which:

- **Arithmetic.** A sum of n terms, each operation rounded by at most the unit roundoff u, is off by about √n · u of the
  terms' size (Higham and Mary, SIAM J. Sci. Comput. 2019: roundings are as good as independent), by n · u at the very
  worst; a chain of products adds their errors up. Relative to the *terms*: where they cancel, as in a policy loss
  whose advantages have mean 0, the sum itself says nothing about its rounding.
- **A second route**, on the same machine in the same run: the same number in a higher precision, in another legitimate
  order, or the same work on a yardstick.

Adam has a trap of its own. A step is lr · m / (√v + eps): where the true gradient is 0, m is a rounding, and with
eps = 1e-8 the step is still of size lr, in a direction that the processor chose. Runs that are compared across orders
of summation therefore set eps = STEADY_EPS, below which a gradient makes no step of that size.

To see another processor's numbers on an x86-64 one, cap what the libraries may use:
`ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2` (or `default`, `SSE4_2`, `SSE41`).
"""

import math
from typing import Any

import torch

STEADY_EPS = 1e-4
"""Adam's eps in runs that are compared though their sums are ordered otherwise."""


def roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding: 2^-24 in fp32, 2^-8 in bf16."""
    return torch.finfo(dtype).eps / 2


def rounding(dtype: torch.dtype, terms: int, products: int = 1) -> float:
    """Relative error, by norm, of a chain of matrix products whose sums have so many terms each."""
    return products * math.sqrt(terms) * roundoff(dtype)


def model_rounding(config: Any, dtype: torch.dtype, backward: bool = False) -> float:
    """The same for a transformer by its Hugging Face config: 9 products a layer (query, key, value, their scores,
    the weighted values, output, gate, up, down) and the head; as many again, transposed, on the way back."""
    products = 9 * config.num_hidden_layers + 1
    terms = max(config.hidden_size, config.intermediate_size)
    return rounding(dtype, terms, products * (2 if backward else 1))


YARDSTICK = """
import cProfile
from typing import Annotated
from pydantic import BaseModel, ConfigDict, Field, create_model

def calls(work):
    profile = cProfile.Profile()
    profile.runcall(work)
    return sum(entry.callcount for entry in profile.getstats())

def yardstick():
    for number in range(20):
        field = (Annotated[float | None, Field(gt=0, description="a number")], 1.0)
        settings = ConfigDict(frozen=True, strict=True, extra="forbid")
        create_model(f"Plain{number}", __config__=settings, **{f"field_{n}": field for n in range(20)})
"""
"""Source of `calls(work)`, the number of Python calls that work makes, and of `yardstick()`, which builds 20 plain
pydantic classes of 20 fields; for processes without torch.

What a config costs to load is nearly all pydantic's: schemas of classes and fields. So the limit is a multiple of
pydantic's own work. Calls are counted, not seconds: a fifth of a second depends on what else the processor does.
"""
LOADING = 4.0
"""Most yardsticks that loading a first config may take; today 2.7. A fault that costs half as much again fails."""
