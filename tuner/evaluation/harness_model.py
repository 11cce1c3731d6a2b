"""tuner's engine as a model of lm-evaluation-harness; imported where the harness is installed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from tuner.data.conversation import Conversation, Turn
from tuner.data.rendered import Rendered
from tuner.evaluation.task_model import TaskModel

MAX_NEW_TOKENS = 256
"""Of an answer whose task does not say: lm-evaluation-harness's default."""


class HarnessModel(TemplateLM):
    """Log-likelihoods in packed passes, greedy answers by tuner's generation.

    lm-evaluation-harness moves white space at the end of a context into the continuation. Under a chat template that
    ends in a line break, as ChatML does, the break is then scored too, though no answer in training was ever asked for
    it: `is_greedy` and perplexities are wrong, ranks of choices are not. So the split of `TaskModel.continuation` is
    used, and the harness's own, with its rule for BOS, where `own_rules` is set and figures must compare.
    """

    def __init__(self, model: TaskModel, own_rules: bool = False) -> None:
        super().__init__()
        self._model, self._own_rules = model, own_rules
        self.tokenizer: Any = model.loaded.tokenizer
        self.sampled: set[str] = set()
        """Settings of tasks that ask for sampled answers, which are greedy here."""

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text that the model answers; the beginning of an answer is put behind the header of the answer's turn."""
        assert self._model.template is not None
        begun = "" if add_generation_prompt else chat_history[-1]["content"]
        messages = chat_history if add_generation_prompt else chat_history[:-1]
        turns = tuple(Turn(message["role"], message["content"]) for message in messages)
        return self._model.template.prompt_text(Conversation(turns, origin="a task's prompt")) + begun

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """By the rules of lm-evaluation-harness's `hf`: special tokens as the tokenizer has them, BOS once."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self._own_rules:
            return super()._encode_pair(context, continuation)
        tokens, weights = self._model.continuation(Rendered(context), continuation)
        first = int(np.argmax(weights > 0)) if weights.any() else len(tokens)
        return tokens[:first].tolist(), tokens[first:].tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        samples = [
            (
                np.array([*context, *continuation], np.int32),
                np.repeat(np.array([0, 1], np.float32), [len(context), len(continuation)]),
            )
            for _, context, continuation in requests
        ]
        return self._model.logprobs(samples)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the model's length; each token is predicted once."""
        windows = [
            (place, (None, *make_disjoint_window(window)))
            for place, request in enumerate(requests)
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                # the token that is predicted last is in the row, too
                max_seq_len=self._model.max_length - 1,
                context_len=1,
            )
        ]
        sums = [0.0] * len(requests)
        for (place, _), (logprob, _) in zip(
            windows, self._loglikelihood_tokens([window for _, window in windows]), strict=True
        ):
            sums[place] += logprob
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers up to each request's stop texts; requests with the same settings are generated together."""
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            groups[self._settings(request.args[1])].append(place)
        answers: dict[int, str] = {}
        for (max_new_tokens, stop), places in groups.items():
            prompts = [self._prompt(requests[place].args[0]) for place in places]
            answers |= zip(places, self._model.answers(prompts, max_new_tokens, stop), strict=True)
        return [answers[place] for place in range(len(requests))]

    def _prompt(self, context: str) -> list[int]:
        return self.tok_encode(context) if self._own_rules else self._model.encode(Rendered(context))

    def _settings(self, settings: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
        """(most new tokens, stop texts) of a request."""
        if settings.get("do_sample") or settings.get("temperature"):
            self.sampled.add(f"temperature {settings.get('temperature', 1.0)}")
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        most = next((settings[name] for name in names if settings.get(name) is not None), MAX_NEW_TOKENS)
        until = settings.get("until") or ()
        return most, tuple(filter(None, [until] if isinstance(until, str) else until))
