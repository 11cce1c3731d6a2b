"""Versions of everything that decides a run's numbers."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess

PACKAGES = (
    "tuner",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "datasets",
    "trl",
    "tokenizers",
)


def versions() -> dict[str, str | None]:
    """Versions of Python, the platform and `PACKAGES` (None: not installed), and the working directory's commit."""
    by_name: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            by_name[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            by_name[package] = None
    return by_name | {"commit": _commit()}


def _commit() -> str | None:
    """Of the working directory's git repository; None without one."""
    try:
        process = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() or None
