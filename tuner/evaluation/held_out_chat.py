"""Held-out rows of chat or text: their loss, and sampled answers to their prompts with their scores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tuner.config import Evaluation
from tuner.config.functions import Function, load_function
from tuner.data.batch import gather, pack_all
from tuner.data.examples import Examples
from tuner.data.subset import stratified_subset
from tuner.errors import UserError
from tuner.models.forward import token_loss
from tuner.models.generate import generate
from tuner.models.roles import Roles
from tuner.training.devices import Devices
from tuner.training.evaluation_cost import DECODING_COST
from tuner.training.watchers import Sample

Score = Callable[[str, str], float]
"""(answer, reference) -> score in 0..1."""


class HeldOutRows:
    """Measures a policy on one set of rows. Every rank computes a share of the rows; all ranks get the result."""

    def __init__(
        self,
        examples: Examples | None,
        roles: Roles,
        devices: Devices,
        config: Evaluation,
        tokens_per_pass: int,
        end_ids: frozenset[int],
    ) -> None:
        examples = stratified_subset(examples, config.rows)
        self._examples, self._roles, self._devices, self._config = examples, roles, devices, config
        self._score = load_score(config.score)
        self._end_ids, self._tokens_per_pass = end_ids, tokens_per_pass
        self._passes = pack_all(examples.lengths, tokens_per_pass) if examples else []

    @property
    def tokens(self) -> int:
        """Cost of a measurement with its samples, in tokens of a forward pass; the samples are decoded side by side."""
        if not self._examples:
            return 0
        steps = self._config.max_new_tokens if self._config.samples else 0
        return int(self._examples.lengths.sum()) + steps * DECODING_COST

    def metrics(self) -> dict[str, float]:
        """`loss`, for the loop; empty without rows."""
        loss = self.loss()
        return {} if loss is None else {"loss": loss}

    def loss(self) -> float | None:
        """Mean loss in nats per token that it is taken on, weighted as in training; None without rows."""
        if not self._passes:
            return None
        assert self._examples is not None
        sums = {"loss": 0.0, "weight": 0.0}
        for rows in self._devices.share.of(self._passes):
            batch = gather(self._examples, rows)
            with self._roles.role("policy") as model:
                sums["loss"] += token_loss(model, batch.to(self._devices.device)).item()
            sums["weight"] += float(batch.weights_N.sum())
        totals = self._devices.sum(sums)
        # Divided once, over all batches and ranks: a mean of means would weight short batches more.
        return totals["loss"] / totals["weight"]

    def samples(self) -> list[Sample]:
        """Greedy answers to the prompts of the first rows, with scores where the config names a score."""
        count = min(self._config.samples, len(self._examples) if self._examples is not None else 0)
        return self._answers(list(range(count)))

    def score(self) -> float | None:
        """Mean score of the greedy answers to all rows; None without rows or without a score in the config."""
        if self._config.score is None or not self._examples:
            return None
        scores = [answer.score for answer in self._answers(list(range(len(self._examples))))]
        return float(np.mean([score for score in scores if score is not None]))

    def _answers(self, rows: list[int]) -> list[Sample]:
        examples = self._examples
        if examples is None or not rows:
            return []

        def answer(places: list[int]) -> list[Sample]:
            prompts = [examples.prompt(rows[place]).tolist() for place in places]
            with self._roles.role("policy") as model:
                answers = generate(
                    model,
                    prompts,
                    max_new_tokens=self._config.max_new_tokens,
                    end_ids=self._end_ids,
                    # Beside a model trained in 12 GB there is no room for more than a pass takes.
                    tokens_per_pass=self._tokens_per_pass,
                )
            return [
                self._sample(rows[place], prompt, answer.content.tolist())
                for place, prompt, answer in zip(places, prompts, answers, strict=True)
            ]

        with self._roles.whole("policy"):  # answers differ in length, and processes in their number
            return self._devices.share_out(len(rows), answer)

    def _sample(self, row: int, prompt: list[int], answer: list[int]) -> Sample:
        assert self._examples is not None
        tokenizer = self._roles.tokenizer
        text = tokenizer.decode(answer, skip_special_tokens=True).strip()
        reference = tokenizer.decode(self._examples.reference(row).tolist(), skip_special_tokens=True).strip()
        return Sample(tokenizer.decode(prompt), text, reference, self._score_answer(text, reference))

    def _score_answer(self, answer: str, reference: str) -> float | None:
        if self._score is None:
            return None
        try:
            return float(self._score(answer, reference))
        except Exception as error:
            raise UserError(
                f"evaluation.score {self._config.score!r} failed on {answer!r:.80} "
                f"({type(error).__name__}: {error}); correct it"
            ) from error


def load_score(name: Function | None) -> Score | None:
    """The scoring function of a config: "exact", or "file.py:name"."""
    if name is None or not isinstance(name, str):
        return None
    if name == "exact":
        return lambda answer, reference: float(answer == reference)
    return load_function(name, "evaluation.score", '"exact" or ')
