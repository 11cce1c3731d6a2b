"""Keeps a vLLM server up that has the policy's current weights, and asks it again for what a failure has lost."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tuner.config import VLLM
from tuner.errors import UserError
from tuner.models.adapters import is_adapted
from tuner.models.atomic_folder import write_atomically
from tuner.models.load import Loaded
from tuner.models.served import write_served_policy
from tuner.rollout.vllm_client import Completion, ServerAwayError, UnknownModelError, VLLMClient
from tuner.rollout.vllm_server import BASE, VLLMServer

BACKOFF = 0.5
"""Seconds before the first repetition; each further failure in a row doubles them."""
LONGEST_BACKOFF = 30.0
POLL = 1.0
"""Seconds between two looks at a server that is away."""


class Serving:
    """One policy on one server: the run's own, or that of a URL."""

    def __init__(
        self,
        config: VLLM,
        policy: Loaded,
        folder: Path,
        *,
        server: VLLMServer | None,
        base: Callable[[], Path],
        say: Callable[[str], None],
    ) -> None:
        """folder: for the policy's weights, which the server reads. server: None: that of config.url.

        base: the folder of the base that adapters are of, called before it is served.
        """
        self._config, self._policy, self._folder = config, policy, folder
        self._server, self._base, self._say = server, base, say
        self._served: str | None = None
        """Fingerprint of the weights that the server has; None where that is not known."""
        url, key = (server.url, server.key) if server is not None else (config.url or "", None)
        self._client = VLLMClient(url, timeout=config.timeout, concurrency=config.concurrency, key=key)

    def complete(self, fingerprint: str, requests: Sequence[dict[str, Any]]) -> list[Completion]:
        """The policy's answer to each request (without `model`), in their order.

        fingerprint: of the policy's weights now. Raises UserError where the server stays away, or refuses.
        """
        completions: dict[int, Completion] = {}
        failures = 0
        while missing := [index for index in range(len(requests)) if index not in completions]:
            answered = len(completions)

            def keep(place: int, completion: Completion, missing: list[int] = missing) -> None:
                completions[missing[place]] = completion

            try:
                model = self._bring_up(fingerprint)
                self._client.complete([{**requests[index], "model": model} for index in missing], keep)
            except (ServerAwayError, UnknownModelError) as error:
                failures = 1 if len(completions) > answered else failures + 1
                self._recover(error, failures, len(requests) - len(completions))
        return [completions[index] for index in range(len(requests))]

    def close(self) -> None:
        """End the run's own server, and take its adapter off another's."""
        if self._server is not None:
            self._server.close()
        elif self._served is not None and is_adapted(self._policy.model):
            with contextlib.suppress(ServerAwayError, UserError):  # gone, and the adapter with it
                self._client.unload_adapter(_name(self._served))
        shutil.rmtree(self._folder, ignore_errors=True)

    def _recover(self, error: Exception, failures: int, missing: int) -> None:
        """Wait before the next try. Raises UserError where there were too many."""
        if isinstance(error, UnknownModelError):
            self._served = None
        died = self._server is not None and not self._server.is_running
        what = f"the vLLM server died: {self._server.last_words()}" if died and self._server else str(error)
        if failures > self._config.retries:
            raise UserError(
                f"vLLM: {failures} failures in a row ({what}); put the server right, or raise engine.retries or "
                "engine.timeout, and run the same command again: it goes on from its last checkpoint and the rollouts "
                "stored since"
            )
        self._say(f"vLLM: {what}; {missing:,} answers are requested again")
        if failures > 1 and self._server is not None:
            self._server.close()  # alive, but perhaps hanging: it is started again
        time.sleep(min(BACKOFF * 2 ** (failures - 1), LONGEST_BACKOFF))

    def _bring_up(self, fingerprint: str) -> str:
        """Have the server up with the policy's weights; returns the name that it knows them by."""
        if self._server is None:
            self._wait_for_server()
        adapted = is_adapted(self._policy.model)
        if self._server is not None:
            stale = not adapted and self._served != fingerprint
            if stale or not self._server.is_running:
                self._start(self._server, self._base() if adapted else self._write(fingerprint))
                self._served = None if adapted else fingerprint
        if adapted and self._served != fingerprint:
            self._load_adapter(fingerprint)
        return _name(fingerprint) if adapted else BASE

    def _start(self, server: VLLMServer, model: Path) -> None:
        server.start(model)
        server.wait(self._client.is_ready, self._config.patience)

    def _load_adapter(self, fingerprint: str) -> None:
        """Load the policy's adapter under a name of its own, and unload the one before.

        A name is never used for other weights: the server would answer from a cache of the old ones' keys and values.
        """
        name, old = _name(fingerprint), self._served
        if name not in self._client.models():
            self._client.load_adapter(name, str(self._write(fingerprint).absolute()))
        self._served = fingerprint
        if old is not None:
            self._client.unload_adapter(_name(old))

    def _write(self, fingerprint: str) -> Path:
        """The folder with the policy's weights, the only one that is kept."""
        folder = self._folder / _name(fingerprint)
        if not folder.is_dir():
            shutil.rmtree(self._folder, ignore_errors=True)
            write_atomically(folder, lambda unfinished: write_served_policy(self._policy, unfinished))
        return folder

    def _wait_for_server(self) -> None:
        """Wait until the server of the URL answers. Raises UserError where it stays away."""
        deadline, told = time.monotonic() + self._config.patience, False
        while not self._client.is_ready():
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self._client.url}: no vLLM server has answered there for {self._config.patience:g} s; start it "
                    "with `tuner serve-rollouts` and run the same command again: it goes on from its last checkpoint "
                    "and the rollouts stored since"
                )
            if not told:
                self._say(f"{self._client.url}: waiting for the vLLM server")
                told = True
            self._served = None  # whatever comes back has lost the adapter
            time.sleep(min(POLL, self._config.patience))


def _name(fingerprint: str) -> str:
    return f"tuner-{fingerprint[:16]}"
