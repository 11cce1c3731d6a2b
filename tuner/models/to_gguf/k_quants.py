"""llama.cpp's k-quants of a GGUF file; llama.cpp alone computes them."""

from __future__ import annotations

import shutil
from pathlib import Path

from tuner.models.tool_python import python_with, run_tool

_PROGRAM = """
import ctypes, sys
import llama_cpp
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
source, target = (path.encode() for path in sys.argv[1:])
sys.exit(llama_cpp.llama_model_quantize(source, target, ctypes.byref(parameters)))
"""


def write_q4_k_m(source: Path, target: Path) -> None:
    """Quantize a GGUF file by llama.cpp's program, or its library in llama-cpp-python.

    Raises UserError where neither is installed, or it fails.
    """
    what = "--quantize q4_k_m"
    program = shutil.which("llama-quantize")
    if program is not None:
        run_tool([program, str(source), str(target), "Q4_K_M"], what)
    else:
        python = python_with("llama-cpp-python", "llama_cpp", what)
        run_tool([python, "-c", _PROGRAM, str(source), str(target)], what)
