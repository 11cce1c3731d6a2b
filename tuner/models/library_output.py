"""What transformers prints by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def without_library_output() -> Iterator[None]:
    """No bars of transformers' own ("Loading weights", "Writing model shards"), which would tear a run's display and
    fill log files, and no tables of weights, which errors name in a sentence."""
    had_bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()
