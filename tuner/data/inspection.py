"""Inspection of tokenized rows: the tokens as text, statistics, errors and notices."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tuner.config.data import Reading
from tuner.data.data_report import DataReport, PartReport
from tuner.data.encoding import Tokenizer
from tuner.data.examples import Examples

ORIGINS_NAMED = 5
"""Origins listed in one finding; the rest are counted."""

Label = Callable[[int], str]
"""Text shown beside the origin of the sample of that index, such as its condition; "" for none."""

Passes = Sequence[Sequence[int]]
"""Packed rows: the indices of the samples of each, in order."""

READINGS: dict[Reading, str] = {
    "text": "spelled in a text, they stay text",
    "answers": "in an assistant's text they are tokens, elsewhere text",
    "token": "spelled in a text, they are tokens",
}
"""What becomes of control tokens that a text spells, in words."""
NAMES_SHOWN = 16
"""Control tokens listed of each reading; the rest are counted."""

TOTALS = {
    "rows read": ("rows",),
    "duplicates": ("duplicates",),
    "too long": ("too_long",),
    "cut": ("cut",),
    "split": ("split",),
    "dropped": ("dropped_too_long", "dropped_duplicates", "cut_to_nothing", "switched_off"),
}
"""Name of a statistic -> the counts of SourceReport that it sums."""


@dataclass(frozen=True)
class Piece:
    """One token as text, or several that share a character."""

    text: str
    ids: list[int]
    position: int
    """Index in the sample of the first token."""
    weight: float
    """Loss weight."""
    control: bool
    """Whether it is a special token."""


@dataclass(frozen=True)
class Segment:
    """A sample in a packed row."""

    index: int
    """Of the sample."""
    begin: int = 0
    """Index in the packed row of its first token."""


@dataclass(frozen=True)
class Group:
    """Samples shown under one heading: those of a pass, or a single one without a heading."""

    heading: str
    segments: list[Segment]


def errors(examples: Examples, tokenizer: Tokenizer, report: DataReport | None = None) -> list[str]:
    """Errors to correct before training, one sentence each, with the origins of the first rows.

    These are rows whose tokens all have weight 0, answers whose end token is not in the loss, and two BOS tokens.
    """
    sentences = [
        _finding(
            examples, _without_loss(examples), "without a token that the loss is taken on: all weights are 0"
        ),
        _finding(
            examples,
            _without_end(examples, tokenizer, report),
            "whose loss leaves out an end token, so the model would not learn to stop; use another template",
        ),
        _finding(
            examples,
            _double_bos(examples, tokenizer),
            "with two BOS tokens at the beginning; remove BOS from the rows",
        ),
    ]
    return [sentence for sentence in sentences if sentence]


def notices(examples: Examples, tokenizer: Tokenizer, report: DataReport | None = None) -> list[str]:
    """Notices, one sentence each: unknown tokens, cut samples, and the report's notes."""
    sentences = [_unknown_tokens(examples, tokenizer)]
    for source in report.sources if report is not None else ():
        if cut := source.cut + source.cut_to_nothing:
            dropped = source.cut_to_nothing
            consequence = f", {dropped:,} of them dropped with nothing left" if dropped else ""
            sentences.append(f"{source.path}: {cut:,} rows were cut at max_length{consequence}")
    sentences += report.notes if report is not None else ()
    return [sentence for sentence in sentences if sentence]


def statistics(
    examples: Examples,
    report: DataReport | None = None,
    passes: Passes | None = None,
    tokens_per_pass: int | None = None,
) -> list[tuple[str, str]]:
    """(name, value) of every statistic: lengths, share of tokens in the loss, what became of the rows, packing.

    tokens_per_pass: the room of a pass, by which its fill is measured; None: unknown.
    """
    part, lengths = PartReport.of(examples), examples.lengths
    values = [
        ("samples", f"{part.samples:,}"),
        ("tokens", f"{part.tokens:,}"),
        ("in the loss", f"{part.target_share:.1%}"),
        ("median length", f"{int(np.median(lengths)):,}"),
        ("longest", f"{part.longest:,}"),
    ]
    sources = report.sources if report is not None else []
    for name, fields in TOTALS.items():
        count = sum(getattr(source, field) for source in sources for field in fields)
        if count:
            values.append((name, f"{count:,}"))
    if passes:
        sizes = [int(lengths[list(indices)].sum()) for indices in passes]
        values += [
            ("passes", f"{len(passes):,}"),
            ("fullest pass", f"{max(sizes):,}"),
        ]
        if tokens_per_pass is not None:
            values.append(("mean fill", f"{sum(sizes) / (tokens_per_pass * len(sizes)):.1%}"))
    return values


def readings(report: DataReport | None) -> list[tuple[str, str]]:
    """(how they are encoded where a text spells them, names) of the tokenizer's added tokens."""
    tokens = report.control_tokens if report is not None else {}
    values: list[tuple[str, str]] = []
    for reading, description in READINGS.items():
        names = [name for name in tokens if tokens[name] == reading]
        more = f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
        if names:
            values.append((description, " ".join(names[:NAMES_SHOWN]) + more))
    return values


def pieces(examples: Examples, index: int, tokenizer: Tokenizer) -> Iterator[Piece]:
    """A sample's tokens as text; tokens that only together form a character are one piece."""
    tokens, weights = examples.example(index)
    control = _control_ids(tokenizer)
    ids: list[int] = []
    for position, (token, weight) in enumerate(zip(tokens.tolist(), weights.tolist(), strict=True)):
        ids.append(token)
        text = str(tokenizer.decode(ids))
        # a UTF-8 character has at most four bytes, so at most four byte tokens
        last = position + 1 == len(tokens) or weights[position + 1] != weight or len(ids) == 4
        if "\ufffd" in text and not last:
            continue
        is_control = len(ids) == 1 and token in control
        yield Piece(text, ids, position + 1 - len(ids), weight, is_control)
        ids = []


def groups(examples: Examples, passes: Passes | None, limit: int) -> Iterator[Group]:
    """The first `limit` passes with their samples; without passes, the first samples."""
    if passes is None:
        for index in range(min(limit, len(examples))):
            yield Group("", [Segment(index)])
        return
    for number, indices in enumerate(passes[:limit], 1):
        begins: list[int] = np.concatenate([[0], np.cumsum(examples.lengths[list(indices)])]).tolist()
        size = f"{quantity(len(indices), 'segment')}, {quantity(begins[-1], 'token')}"
        segments = [Segment(index, begin) for index, begin in zip(indices, begins[:-1], strict=True)]
        yield Group(f"pass {number} of {len(passes):,}: {size}", segments)


def describe(examples: Examples, segment: Segment, label: Label) -> str:
    """One line on a sample: its origin, label, length, tokens in the loss, and positions."""
    tokens, weights = examples.example(segment.index)
    in_loss = int(np.count_nonzero(weights))
    positions = f"positions 0–{len(tokens) - 1:,}"
    positions += f" (from {segment.begin:,} in the pass)" if segment.begin else ""
    source = " · ".join(filter(None, (examples.origin(segment.index), label(segment.index))))
    return f"{source} · {quantity(len(tokens), 'token')}, {in_loss:,} in the loss · {positions}"


def quantity(count: int, noun: str) -> str:
    """A count with its noun: 1 token, 2 tokens."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _unknown_tokens(examples: Examples, tokenizer: Tokenizer) -> str:
    if tokenizer.unk_token_id is None:
        return ""
    unknown = np.flatnonzero(examples.tokens_T == tokenizer.unk_token_id)
    share = len(unknown) / max(1, len(examples.tokens_T))
    samples = _samples_at(examples, unknown)
    return _finding(examples, samples, f"with unknown tokens ({share:.2%} of all tokens)")


def _without_loss(examples: Examples) -> np.ndarray:
    """Indices of samples without a target token; none where no sample has any, since these are prompts."""
    if not examples.weights_T.any():
        return np.zeros(0, dtype=np.int64)
    targets_before = np.concatenate([[0], np.cumsum(examples.weights_T > 0)])
    return np.flatnonzero(np.diff(targets_before[examples.offsets]) == 0)


def _without_end(examples: Examples, tokenizer: Tokenizer, report: DataReport | None) -> np.ndarray:
    """Indices of samples with a span in the loss whose last token is not a special one.

    White space may follow the special token (learn="all"). Where samples were cut or split, those as long as
    the longest are not reported, since they end where they were cut.
    """
    in_loss = examples.weights_T > 0
    last = np.zeros(len(in_loss), dtype=bool)
    last[examples.offsets[1:] - 1] = True
    ends = np.flatnonzero(in_loss & (last | ~np.append(in_loss[1:], False)))
    control = np.array(sorted(_control_ids(tokenizer)), dtype=np.int64)
    suspects = ends[~np.isin(examples.tokens_T[ends], control)]
    before = np.maximum(suspects - 1, 0)
    # each token once: every run looks through all of its rows
    tokens, places = np.unique(examples.tokens_T[suspects], return_inverse=True)
    blank = np.array([not str(tokenizer.decode([token])).strip() for token in tokens.tolist()], dtype=bool)[
        places
    ]
    suspects = suspects[~(blank & np.isin(examples.tokens_T[before], control))]
    samples = _samples_at(examples, suspects)
    if report is not None and any(source.cut or source.split for source in report.sources):
        samples = samples[examples.lengths[samples] < examples.lengths.max()]
    return samples


def _double_bos(examples: Examples, tokenizer: Tokenizer) -> np.ndarray:
    if tokenizer.bos_token_id is None:
        return np.zeros(0, dtype=np.int64)
    starts = examples.offsets[:-1]
    seconds = np.minimum(starts + 1, len(examples.tokens_T) - 1)
    bos = examples.tokens_T == tokenizer.bos_token_id
    return np.flatnonzero(bos[starts] & bos[seconds] & (examples.lengths > 1))


def _samples_at(examples: Examples, positions: np.ndarray) -> np.ndarray:
    """Indices of the samples that contain these indices of tokens_T."""
    return np.unique(np.searchsorted(examples.offsets, positions, side="right") - 1)


def _finding(examples: Examples, samples: np.ndarray, problem: str) -> str:
    """A sentence on these samples with their first origins; "" for none."""
    if not len(samples):
        return ""
    origins = list(dict.fromkeys(examples.origin(int(index)) for index in samples[:ORIGINS_NAMED]))
    more = f" and {len(samples) - ORIGINS_NAMED:,} more" if len(samples) > ORIGINS_NAMED else ""
    return f"{quantity(len(samples), 'sample')} {problem} ({', '.join(origins)}{more})"


def _control_ids(tokenizer: Tokenizer) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = {token for token, value in added.items() if getattr(value, "special", True)}
    return ids | set(getattr(tokenizer, "all_special_ids", ()))
