"""Generation engines: they answer prompts with the policy's current weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tuner.config import Sampling
from tuner.models.answer_end import StopTexts
from tuner.models.generate import Answer, generate, uniforms
from tuner.models.roles import Roles
from tuner.training.devices import Devices


class Engine(Protocol):
    """Answers prompts. All ranks call it together, and each gets every answer."""

    def generate(
        self, prompts: Sequence[np.ndarray], *, step: int, temperature: float | None = None
    ) -> list[Answer]:
        """An answer to each prompt (token ids, int32), in the order of the prompts.

        step: with the seed and the prompt's index, it fixes the sampling noise. temperature: None takes that of the
        sampling settings; 0 is greedy.
        """
        ...

    def weights_changed(self) -> None:
        """Call after the policy was updated or restored: later answers must come from its new weights."""
        ...

    def close(self) -> None:
        """Call when no more answers are needed, also after an error: ends what the engine has started."""
        ...


@dataclass(frozen=True)
class LocalEngine:
    """Generates with the model that is being trained, in one of its roles; each rank answers a share of the prompts.

    Sampling noise is addressed, not drawn from a generator with a state: it is a function of (seed, step, prompt
    index, token position) alone. So neither the batching, the number of ranks, nor a restart within the step changes
    an answer.
    """

    roles: Roles
    """Has the role that generates."""
    end_ids: Collection[int]
    """Tokens that end an answer."""
    sampling: Sampling
    seed: int
    tokens_per_pass: int
    """Prompt tokens prefilled at a time; affects memory and speed, never the result."""
    devices: Devices
    role: str = "policy"
    """The role that generates."""

    def generate(
        self, prompts: Sequence[np.ndarray], *, step: int, temperature: float | None = None
    ) -> list[Answer]:
        """See Engine."""
        sampling = self.sampling
        temperature = sampling.temperature if temperature is None else temperature

        def answer_share(indices: list[int]) -> list[Answer]:
            with self.roles.role(self.role) as model:
                return generate(
                    model,
                    [prompts[index].tolist() for index in indices],
                    max_new_tokens=sampling.max_new_tokens,
                    temperature=temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    min_new_tokens=sampling.min_new_tokens,
                    end_ids=self.end_ids,
                    stop=StopTexts(self.roles.tokenizer, sampling.stop) if sampling.stop else None,
                    noise=uniforms(self.seed, step, indices, sampling.max_new_tokens)
                    if temperature
                    else None,
                    cache_bytes=int(sampling.cache_gib * 2**30),
                    tokens_per_pass=self.tokens_per_pass,
                )

        with self.roles.whole(self.role):  # answers differ in length, and processes in their number
            return self.devices.share_out(len(prompts), answer_share)

    def weights_changed(self) -> None:
        """Nothing to do: the trained weights are the ones it generates with."""

    def close(self) -> None:
        """Nothing to do: it has started nothing."""
