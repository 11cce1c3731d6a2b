"""Engines: who answers prompts with the policy's current weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tuner.config import Sampling
from tuner.models.generate import Answer, generate, uniforms
from tuner.models.roles import Roles
from tuner.training.devices import Devices


class Engine(Protocol):
    """Answers prompts; all ranks call it together and all get every answer."""

    def generate(
        self, prompts: Sequence[np.ndarray], *, step: int, temperature: float | None = None
    ) -> list[Answer]:
        """An answer to each prompt (token ids, int32), in their order.

        step: decides the sampling noise, together with the seed and the prompt's place. temperature: None for that
        of the sampling settings; 0 is greedy.
        """
        ...

    def weights_changed(self) -> None:
        """The policy was updated: answers from now on must come from its new weights."""
        ...


@dataclass(frozen=True)
class LocalEngine:
    """Generates with the very model that is trained, each rank a share of the prompts.

    The noise of an answer is a function of (seed, step, its place, position) alone: how prompts are batched and
    dealt to ranks, or a kill before the step is over, does not change it.
    """

    roles: Roles
    """Has the role `policy`."""
    end_ids: Collection[int]
    """Tokens that end an answer."""
    sampling: Sampling
    seed: int
    tokens_per_pass: int
    """Prompt tokens prefilled at a time: memory and speed, never the result."""
    devices: Devices

    def generate(
        self, prompts: Sequence[np.ndarray], *, step: int, temperature: float | None = None
    ) -> list[Answer]:
        """See Engine."""
        sampling = self.sampling
        temperature = sampling.temperature if temperature is None else temperature

        def share(places: list[int]) -> list[Answer]:
            with self.roles.role("policy") as model:
                return generate(
                    model,
                    [prompts[place].tolist() for place in places],
                    max_new_tokens=sampling.max_new_tokens,
                    temperature=temperature,
                    top_p=sampling.top_p,
                    end_ids=self.end_ids,
                    noise=uniforms(self.seed, step, places, sampling.max_new_tokens) if temperature else None,
                    cache_bytes=int(sampling.cache_gib * 2**30),
                    tokens_per_pass=self.tokens_per_pass,
                )

        return self.devices.share_out(len(prompts), share)

    def weights_changed(self) -> None:
        """Nothing to do: the weights that are trained are those that answer."""
