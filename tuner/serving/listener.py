"""An application on a port of 127.0.0.1, until Ctrl-C."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn

from tuner.errors import UserError

_PATIENCE = 5
"""Seconds that responses under way have to end."""


@contextlib.contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """A socket that listens on a port of 127.0.0.1; 0: a free one. Raises UserError where it cannot be used."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen(128)
        except OSError as error:
            raise UserError(
                f"--port {port}: cannot be used ({error.strerror}); name another, or 0"
            ) from error
        yield listener


def run(app: Any, listener: socket.socket, close: Callable[[], None]) -> None:
    """Serve until the process is interrupted. close: called then, to end the responses under way."""
    config = uvicorn.Config(
        app, log_level="warning", lifespan="off", timeout_graceful_shutdown=_PATIENCE, access_log=False
    )
    with contextlib.suppress(KeyboardInterrupt):  # the way this command ends
        _Server(config, close).run(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, close: Callable[[], None]) -> None:
        super().__init__(config)
        self._close = close

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What comes first at Ctrl-C: else the server waits for answers that nobody waits for."""
        super().handle_exit(sig, frame)
        self._close()
