"""The plan of steps over packed rows, shared by the stages that train on them."""

from __future__ import annotations

from typing import Any

from tuner.config import PackedConfig
from tuner.data.dataset import Dataset
from tuner.data.stream import Stream, make_stream
from tuner.errors import UserError
from tuner.stages.memory_budget import Options, pass_sizes


def plan(config: PackedConfig, data: Dataset[Any]) -> Stream:
    """The steps of a run over these rows. Raises UserError for a row longer than tokens_per_pass, and where
    the best weights are to be kept and no row is held out to tell them by."""
    if data.validation is None and (config.evaluation.keep_best or config.evaluation.patience):
        raise UserError(
            f"evaluation.keep_best and evaluation.patience need validation rows, and none is left ({data.report}); "
            "give data.validation_files, or a larger data.split.validation"
        )
    lengths = data.train.lengths
    if len(lengths) and lengths.max() > config.tokens_per_pass:
        longest = int(lengths.argmax())
        raise UserError(
            f"{data.train.origin(longest)}: its answers are {lengths[longest]:,} tokens together, more than "
            f"tokens_per_pass ({config.tokens_per_pass:,}), and a row is never split; raise it, or shorten the list"
        )
    return make_stream(
        data.train,
        tokens_per_step=config.tokens_per_step,
        tokens_per_pass=config.tokens_per_pass,
        epochs=config.epochs,
        seed=config.seed,
        sources=config.data.sources,
        short_rows=getattr(config.data, "short_rows", None),
    )


def plan_figures(config: PackedConfig, stream: Stream) -> dict[str, Any]:
    """The fields of a CheckReport that describe a whole run: `steps`, `tokens`, `passes` and `fill`."""
    steps = min(len(stream.steps), config.max_steps or len(stream.steps))
    tokens = sum(stream.tokens(step) for step in range(steps))
    return {
        "steps": steps,
        "tokens": tokens,
        "passes": sum(len(stream.passes(step)) for step in range(steps)),
        "fill": tokens / (steps * config.tokens_per_step),
    }


def pass_options(config: PackedConfig, longest: int, processes: int) -> Options:
    """What `memory` chooses for rows of at most so many tokens."""
    together = config.parallel.sequence
    share = config.tokens_per_step // max(processes // together, 1)
    return Options(passes=pass_sizes(min(longest, config.tokens_per_step), share, together))
