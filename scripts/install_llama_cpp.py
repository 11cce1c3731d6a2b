"""Install llama-cpp-python from source in four minutes of two idle cores, in place of half an hour.

    PYTHON scripts/install_llama_cpp.py

llama.cpp's server, tools and multimodal library are left out, and it is compiled for every x86-64 CPU with AVX2, at
-O1: its answers are what is tested here, not its speed. For speed, `pip install llama-cpp-python` instead.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "llama_cpp_python"
VERSION = "0.3.36"
LEFT_OUT = ("TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")
OPTIONS = {
    # of the machine, it would use AMX where the CPU has it, with which q8_0 crashes
    "GGML_NATIVE": "OFF",
    "GGML_LLAMAFILE": "OFF",
    "LLAVA_BUILD": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_ALL_WARNINGS": "OFF",
    "CMAKE_CXX_FLAGS_RELEASE": "-O1",
    **{f"LLAMA_BUILD_{part}": "OFF" for part in LEFT_OUT},
}


def main() -> None:
    pip = [sys.executable, "-m", "pip"]
    with tempfile.TemporaryDirectory() as folder:
        download = [
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--no-build-isolation",
            "--dest",
            folder,
        ]
        subprocess.run([*pip, "install", "--quiet", "scikit-build-core", "cmake", "ninja"], check=True)
        subprocess.run([*pip, *download, f"{PACKAGE}=={VERSION}"], check=True)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        source = Path(folder, f"{PACKAGE}-{VERSION}")
        build_file = source / "CMakeLists.txt"
        # its programs' common library: an option that the build file overrides
        text = build_file.read_text().replace("LLAMA_BUILD_COMMON ON", "LLAMA_BUILD_COMMON OFF")
        build_file.write_text(text)
        options = " ".join(f"-D{name}={value}" for name, value in OPTIONS.items())
        environment = {**os.environ, "CMAKE_ARGS": options, "CMAKE_BUILD_PARALLEL_LEVEL": "2"}
        subprocess.run(
            [*pip, "install", "--quiet", "--no-build-isolation", str(source)], check=True, env=environment
        )


if __name__ == "__main__":
    main()
