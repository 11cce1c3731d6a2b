"""The vLLM engine: answers from a server that has the policy's weights, stored before they are used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tuner.config import Sampling
from tuner.errors import UserError
from tuner.models.answer_end import AnswerEnds, StopTexts
from tuner.models.generate import Answer
from tuner.models.roles import Roles
from tuner.rollout.stored_answers import StoredAnswers, step_name
from tuner.rollout.vllm_client import Completion
from tuner.rollout.vllm_serving import Serving
from tuner.training.devices import Devices


@dataclass
class VLLMEngine:
    """Generates on a vLLM server; the main process asks it, and the others get its answers.

    A seed for each (seed, step, index of the answer) is sent along, but the server's noise also depends on what it
    computes together. So a rollout is stored, and a resumed run reads it: the answers of a step are generated once.
    """

    serving: Serving
    stored: StoredAnswers
    roles: Roles
    """Has the role `policy`."""
    end_ids: Collection[int]
    """Tokens that end an answer."""
    sampling: Sampling
    seed: int
    devices: Devices
    oldest_step: Callable[[], int]
    """The first step that the run may still resume with; rollouts before it are forgotten."""
    discard: Callable[[], None]
    """Removes what only a run that goes on needs; called last."""
    _fingerprint: str | None = field(default=None, init=False)

    def generate(
        self, prompts: Sequence[np.ndarray], *, step: int, temperature: float | None = None
    ) -> list[Answer]:
        """See Engine."""
        local = self._answers(prompts, step, temperature) if self.devices.is_main else []
        return self.devices.gather(local)

    def weights_changed(self) -> None:
        """The next answers come from weights that the server is given first."""
        self._fingerprint = None

    def close(self) -> None:
        """See Engine."""
        if self.devices.is_main:
            self.serving.close()
            self.discard()

    def _answers(self, prompts: Sequence[np.ndarray], step: int, temperature: float | None) -> list[Answer]:
        requests = [self._request(prompt, step, index, temperature) for index, prompt in enumerate(prompts)]
        digest = hashlib.sha256(json.dumps(requests, sort_keys=True).encode()).hexdigest()
        # held-out answers always have step 0: only the weights tell one measurement from another
        name = step_name(step) if temperature is None else f"held_out_{self._policy_fingerprint()[:32]}"
        answers = self.stored.read(name, digest)
        if answers is None:
            completions = self.serving.complete(self._policy_fingerprint(), requests)
            answers = [self._answer(completion) for completion in completions]
            self.stored.write(name, digest, answers)
            self.stored.forget_before(self.oldest_step())
        return answers

    def _request(
        self, prompt: np.ndarray, step: int, index: int, temperature: float | None
    ) -> dict[str, Any]:
        """A request of /v1/completions. Every setting is sent: the server may have defaults of its own."""
        sampling = self.sampling
        return {
            "prompt": prompt.tolist(),
            "max_tokens": sampling.max_new_tokens,
            "min_tokens": sampling.min_new_tokens,
            "temperature": sampling.temperature if temperature is None else temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": _seed(self.seed, step, index),
            # the model's own end token may not be one of the template's
            "ignore_eos": True,
            "stop_token_ids": sorted(self.end_ids),
            "stop": list(sampling.stop),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
            # a token that is part of a character has no text of its own
            "return_tokens_as_token_ids": True,
        }

    def _answer(self, completion: Completion) -> Answer:
        """A completion as an answer: it ends where an answer of the local engine would."""
        tokens, logprobs, sampling = completion.tokens, completion.logprobs, self.sampling
        end, cut = self._end(tokens)
        if end is None and completion.reason == "length" and len(tokens) < sampling.max_new_tokens:
            raise UserError(
                f"the vLLM server ends answers at {len(tokens)} tokens, before sampling.max_new_tokens "
                f"({sampling.max_new_tokens}): start it with a larger --max-length"
            )
        if end is None:
            return Answer(tokens, False, logprobs)
        return Answer(tokens[:end].copy(), True, logprobs[:end].copy(), cut)

    def _end(self, tokens: np.ndarray) -> tuple[int | None, int]:
        """Length of the answer in these tokens, None where none ends it; characters that a stop text cuts off."""
        sampling = self.sampling
        if not sampling.stop:
            ends = np.flatnonzero(np.isin(tokens, list(self.end_ids)))
            return (int(ends[0]) + 1 if len(ends) else None), 0
        ends = AnswerEnds(
            self.end_ids, StopTexts(self.roles.tokenizer, sampling.stop), sampling.min_new_tokens
        )
        for place in range(len(tokens)):
            ended_L, cut_L = ends.of(np.array([place]), np.zeros(1, np.int64), tokens[place : place + 1])
            if ended_L[0]:
                return place + 1, int(cut_L[0])
        return None, 0

    def _policy_fingerprint(self) -> str:
        """SHA-256 of the policy's trained weights; what is frozen stays as the run began."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for name, weight in self.roles.trained("policy").items():
                digest.update(name.encode())
                digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


def _seed(seed: int, step: int, index: int) -> int:
    """A seed of 63 bits for each answer, as the server takes them."""
    state = np.random.SeedSequence((seed, step, index)).generate_state(1, np.uint64)
    return int(state[0]) >> 1
