"""What all tests share: one torch thread, no network, no home folder, and the GPU marker."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_SILENT"] = "true"
os.environ.pop("WANDB_API_KEY", None)

from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Ignored where tests run in the background or behind nohup, and then by every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def soak_names() -> list[str]:
    """Beginnings of the names of tests that `make soak` runs beside those of its folder."""
    lines = (ROOT / "tests" / "soak" / "longer.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["TUNER_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _blank_curves() -> Iterator[None]:
    """Runs draw no curves, which takes longer than most runs of tests; test_curves.py draws, and so do runs that are
    processes of their own, such as the quickstart's."""
    from tuner.stages import run

    with pytest.MonkeyPatch.context() as patch:
        # by its object: a name that is no longer there fails, in place of drawing again unnoticed
        patch.setattr(run, "draw_curves", lambda metrics, path, *_: path.touch())
        yield


@pytest.fixture
def _own_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row shapes and stages that a test registers are forgotten after it."""
    from tuner.config import registry
    from tuner.data import row_shapes

    shapes = {kind: dict(shapes) for kind, shapes in row_shapes._REGISTERED.items()}
    monkeypatch.setattr(row_shapes, "_REGISTERED", shapes)
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is marked soak
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longer = tuple(soak_names())
    for item in items:
        if item.nodeid.startswith(longer):
            item.add_marker(pytest.mark.soak)
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing or os.environ.get("TUNER_TEST_DEVICE") == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA GPU on this machine"))
