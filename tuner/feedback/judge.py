"""Labels by a judge: a language model that is asked about both orders of each pair."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed, wait
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from anyio.from_thread import start_blocking_portal

from tuner.config.feedback_config import Judge
from tuner.errors import UserError
from tuner.feedback.candidates import Candidate, Decision
from tuner.feedback.chat_endpoint import (
    ChatEndpoint,
    RefusedRequestError,
    Reply,
    StoppedError,
    read_completion,
    read_key,
)
from tuner.feedback.judge_prompt import Messages, Shown, ask_again, judge_messages, read_verdict
from tuner.feedback.labelers import Advance, Labeling, no_advance, unlabeled
from tuner.feedback.reply_cache import ReplyCache, Usage, request_key
from tuner.feedback.store import Label, LabelStore, Verdict

_FOLLOWED_ORDER = "the orders disagree: each time the answer in the same place"
_DISAGREED = "the orders disagree: a tie in one of them"
_NO_VERDICT = "a reply without a verdict"
"""Comments of labels that decide nothing; the figures count them."""
_REFUSALS = 10
"""Refused requests, without any that was answered, after which no pair is to blame."""


class _Judged(NamedTuple):
    verdict: Verdict
    comment: str


class JudgeLabeler:
    """Labels of a judge.

    A pair is decided where both orders give the same verdict. Otherwise, and where a reply has no verdict even after a
    stricter question, it is stored as undecided. A pair that the server refuses gets no label.
    first_delay: see ChatEndpoint. Raises UserError where the API key is not set.
    """

    def __init__(self, config: Judge, first_delay: float = 1.0) -> None:
        self._config, self._first_delay = config, first_delay
        read_key(config)

    @property
    def annotator(self) -> str:
        return self._config.annotator

    def label(
        self, candidates: Mapping[str, Candidate], store: LabelStore, advance: Advance = no_advance
    ) -> Labeling:
        """See Labeler. Every reply is stored when it comes, those on their way when another request fails, too."""
        store.add(candidates.values())
        started = time.monotonic()
        cache = ReplyCache(store.file)
        try:
            before = cache.usage(self.annotator).replies
            refusals = self._ask(unlabeled(candidates, store, self.annotator), store, cache, advance)
            usage = cache.usage(self.annotator)
        finally:
            cache.close()
        work = _Work(usage.replies - before, refusals, time.monotonic() - started)
        figures = _figures(self._config, candidates, store.labels(), usage, work)
        return Labeling(self.annotator, asdict(figures), tuple(_sentences(self.annotator, figures, refusals)))

    def _ask(
        self, waiting: Sequence[Candidate], store: LabelStore, cache: ReplyCache, advance: Advance
    ) -> list[RefusedRequestError]:
        """Label what waits; returns what the server refused."""
        refusals: list[RefusedRequestError] = []
        # a loop in another thread: in Jupyter this one has a loop that runs already
        with (
            start_blocking_portal() as portal,
            portal.wrap_async_context_manager(ChatEndpoint(self._config, self._first_delay)) as endpoint,
        ):
            session = _Session(self._config, endpoint, cache, len(waiting))
            futures = {portal.start_task_soon(session.judge, candidate): candidate for candidate in waiting}
            try:
                for future in as_completed(futures):
                    try:
                        store.record(self.annotator, futures[future].id, *future.result())
                    except RefusedRequestError as error:
                        refusals.append(error)
                    except StoppedError:  # another future holds the reason
                        continue
                    advance(1)
            except UserError:
                portal.call(endpoint.stop)
                wait(futures)  # replies on their way are stored, too
                raise
        return refusals


class _Session:
    """The questions about pairs, in the thread of the requests."""

    def __init__(self, config: Judge, endpoint: ChatEndpoint, cache: ReplyCache, pairs: int) -> None:
        self._config, self._endpoint, self._cache = config, endpoint, cache
        self._places = asyncio.Semaphore(config.concurrency)
        self._has_replies = cache.usage(config.annotator).replies > 0
        self._refusals_left = min(_REFUSALS, pairs)

    async def judge(self, candidate: Candidate) -> _Judged:
        async with self._places:
            try:
                straight = await self._verdict(candidate, swapped=False)
                swapped = await self._verdict(candidate, swapped=True)
            except RefusedRequestError as error:
                self._expect_replies(error)
                raise
            except UserError:
                # before the place is free: the next pair would be asked about in vain
                self._endpoint.stop()
                raise
        return _judged(straight, swapped)

    def _expect_replies(self, error: RefusedRequestError) -> None:
        """Raise UserError where only refusals came: then the judge is to blame, and not a pair."""
        self._refusals_left -= 1
        if self._refusals_left <= 0 and not self._has_replies:
            self._endpoint.stop()
            raise UserError(str(error)) from error

    async def _verdict(self, candidate: Candidate, swapped: bool) -> Shown | None:
        messages = judge_messages(self._config, candidate, swapped)
        reply = await self._reply(candidate, messages)
        verdict = _verdict_of(reply)
        if verdict is None:
            verdict = _verdict_of(await self._reply(candidate, ask_again(messages, reply.text)))
        return verdict

    async def _reply(self, candidate: Candidate, messages: Messages) -> Reply:
        body = self._body(messages)
        key = request_key(self._config.url, body)
        if (stored := self._cache.get(key)) is not None:
            return read_completion(stored)
        reply = await self._endpoint.ask(body)
        tokens = reply.prompt_tokens, reply.completion_tokens
        self._cache.put(key, self._config.annotator, candidate.id, reply.raw, tokens)
        self._has_replies = True
        return reply

    def _body(self, messages: Messages) -> dict[str, Any]:
        config = self._config
        body: dict[str, Any] = {"model": config.model, "messages": messages, **config.options}
        limits = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        return body | {name: value for name, value in limits.items() if value is not None}


def _verdict_of(reply: Reply) -> Shown | None:
    # what was cut may end in a line that its rest would have taken back
    return None if reply.is_cut else read_verdict(reply.text)


def _judged(straight: Shown | None, swapped: Shown | None) -> _Judged:
    """The label of a pair by the verdicts on both orders."""
    if straight is None or swapped is None:
        return _Judged("unsure", _NO_VERDICT)
    if straight == swapped:
        return _Judged("tie", "") if straight == "tie" else _Judged("unsure", _FOLLOWED_ORDER)
    if "tie" in (straight, swapped):
        return _Judged("unsure", _DISAGREED)
    decision: Decision = "first" if straight == "shown first" else "second"
    return _Judged(decision, "")


# what is said


class _Work(NamedTuple):
    """What a session of the labeler was."""

    new_replies: int
    refusals: list[RefusedRequestError]
    seconds: float


@dataclass(frozen=True)
class _Figures:
    """Counts are of all candidates and all sessions, except where they say otherwise."""

    pairs: int
    decided: int
    ties: int
    orders_disagree: int
    followed_order: int
    """Of those, the pairs whose verdict was for the same place both times."""
    without_verdict: int
    refused: int
    """In this session."""
    replies: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    """By the config's prices; None without any."""
    new_replies: int
    """In this session."""
    seconds: float
    """Of this session."""


def _figures(
    config: Judge, candidates: Mapping[str, Candidate], labels: Sequence[Label], usage: Usage, work: _Work
) -> _Figures:
    labels = [label for label in labels if label.annotator == config.annotator and label.item in candidates]
    decisions = Counter(label.decision for label in labels)
    comments = Counter(label.comment for label in labels if label.decision is None)
    return _Figures(
        pairs=len(candidates),
        decided=decisions["first"] + decisions["second"],
        ties=decisions["tie"],
        orders_disagree=comments[_FOLLOWED_ORDER] + comments[_DISAGREED],
        followed_order=comments[_FOLLOWED_ORDER],
        without_verdict=comments[_NO_VERDICT],
        refused=len(work.refusals),
        **usage._asdict(),
        cost=_cost(config, usage),
        new_replies=work.new_replies,
        seconds=work.seconds,
    )


def _cost(config: Judge, usage: Usage) -> float | None:
    if config.prompt_price is None and config.completion_price is None:
        return None
    prices = (config.prompt_price or 0.0, config.completion_price or 0.0)
    return (usage.prompt_tokens * prices[0] + usage.completion_tokens * prices[1]) / 1e6


def _sentences(annotator: str, figures: _Figures, refusals: Sequence[RefusedRequestError]) -> Iterator[str]:
    yield (
        f"{annotator}: {figures.decided:,} of {figures.pairs:,} pairs decided, {figures.ties:,} ties; undecided: "
        f"{figures.orders_disagree:,} where its two orders disagree, {figures.without_verdict:,} without a verdict, "
        f"{figures.refused:,} refused by the server"
    )
    cost = "" if figures.cost is None else f", cost {figures.cost:,.2f}"
    yield (
        f"{annotator}: {figures.replies:,} replies, {figures.prompt_tokens:,} prompt and "
        f"{figures.completion_tokens:,} completion tokens{cost}; {figures.new_replies:,} of the replies in the last "
        f"{figures.seconds:,.0f} s"
    )
    if 2 * figures.followed_order > figures.pairs:
        yield (
            f"{annotator}: in {figures.followed_order:,} pairs it chose the same place in both orders, whatever stood "
            "there; name another model"
        )
    if refusals:
        yield f"{annotator}: the first refusal: {refusals[0]}"
