"""vLLM's API server, ended with the process that started it. Run by vLLM's own python, it imports nothing of tuner."""

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent = int(sys.argv[1])
    # left behind by a killed run, the server would hold its GPU memory
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        return
    sys.argv[1:2] = []
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


# vLLM spawns its workers, and these import the main module, this one, again
if __name__ == "__main__":
    main()
