"""Figures, charts and curves of reinforcement learning: scores, KL, answers, critic, time.

The policy loss is not shown: it is a surrogate, whose value says nothing about progress.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from tuner.display.durations import duration
from tuner.display.panels import AMBER, BLUE, GRAY, GREEN, PURPLE, draw_series, draw_share
from tuner.display.policy_panels import (
    draw_conditions,
    draw_explained,
    draw_gold,
    draw_norms,
    draw_replay,
    draw_score,
    draw_shares,
    has_conditions,
)
from tuner.training.figures import (
    TOKENS,
    Charts,
    Curve,
    Figure,
    Metrics,
    Panel,
    Picture,
    StageFigures,
    ever_positive,
    no_phase,
    points_of,
    recorded,
)

SCORES = (
    Figure(
        "score", "{:.3f}".format, "score {}", "value and mean", summary=True, notebook="score", missing=""
    ),
    Figure("score_std", "{:.3f}".format, line=False, notebook="score's standard deviation"),
    Figure("score_min", "{:.3f}".format, line=False, notebook="lowest score"),
    Figure("score_max", "{:.3f}".format, line=False, notebook="highest score"),
    Figure("score_length_correlation", "{:.2f}".format, line=False, notebook="score against length"),
    Figure(
        "score_length_rank_correlation", "{:.2f}".format, line=False, notebook="score against length, ranks"
    ),
    Figure("disagreement", "{:.3f}".format, line=False, notebook="disagreement of the reward models"),
    Figure("reference_score", "{:.3f}".format, line=False, notebook="score of the reference's answers"),
    Figure("gold", "{:.3f}".format, line=False, notebook="gold score of the rollout"),
    Figure("gold_top_tenth", "{:.3f}".format, line=False, notebook="gold of the best-scored tenth"),
    Figure("gold_auc", "{:.2f}".format, line=False, notebook="gold by score, AUC"),
    Figure("eval_gold", "{:.3f}".format, "gold {}", "latest", summary=True, notebook="gold score"),
    Figure(
        "eval_score",
        "{:.3f}".format,
        "eval score {}",
        "latest",
        summary=True,
        notebook="held-out score",
        unless="eval_gold",  # nothing is trained on the gold score, so it cannot be overoptimized
    ),
)
ANSWERS = (
    Figure("kl", "{:.4f}".format, "kl {}", summary=True, notebook="KL"),
    Figure("kl_per_answer", "{:.3f}".format, line=False, notebook="KL per answer"),
    Figure("kl_coefficient", "{:.4f}".format, line=False, notebook="KL coefficient"),
    Figure("length", "{:,.0f}".format, "length {}", notebook="answer length"),
    Figure("ended", "{:.0%}".format, "ended {}", "mean", notebook="ended"),
    Figure("entropy", "{:.3f}".format, line=False, notebook="entropy"),
    Figure("generator_gap_max", "{:.3f}".format, line=False, notebook="largest gap to the engine"),
)
CRITIC = (Figure("explained_variance", "{:.2f}".format, "explained {}", notebook="explained variance"),)
TIME = (Figure("seconds", duration, "{} a step", notebook="a step takes"),)

GROUPS = {"data": "tokens prompts epoch", "system": "tokens_per_second memory_gib"}
CRITIC_GROUP = {"critic": "value_loss value explained_variance grad_norm_critic lr_critic"}
RULES = {
    "seconds": "time/step",
    "seconds/": "time/",
    "replay_": "replay/",
    "score/": "conditions/score/",
    "score_of/": "score_of/",
    "score_length_rank_correlation/": "conditions/score_length_rank_correlation/",
    "gold/": "conditions/gold/",
    "reward/": "conditions/reward/",
}

CURVES = (
    Curve("score", "score", held_out="eval_score", caption="score"),
    Curve("KL", "kl", caption="KL to the reference", half=True),
    Curve("gold score", "gold", held_out="eval_gold", caption="gold score, rollouts and held out", half=True),
)

LARGE = (
    Panel("eval_gold", "gold score, held out", draw_gold, shown=recorded, height=1.2),
    Panel("score", "score by condition", draw_conditions, shown=has_conditions, height=1.2),
)
ANSWER_PANELS = (
    Panel("kl", "KL to the reference, per token", draw_series, PURPLE, shown=recorded),
    Panel("kl_coefficient", "KL coefficient", draw_series, PURPLE, shown=recorded),
    Panel("disagreement", "disagreement of the reward models", draw_series, BLUE, shown=recorded),
    Panel(
        "gold_top_tenth",
        "rollout gold",  # short: the legend stands beside it
        partial(draw_shares, keys={"gold": ("all", GREEN), "gold_top_tenth": ("best tenth", AMBER)}),
        shown=recorded,
    ),
    Panel("entropy", "entropy, nats per token", draw_series, PURPLE),
    Panel("length", "answer length, tokens", draw_series, GREEN),
    Panel("score_length_correlation", "correlation of score and length", draw_series, GREEN, shown=recorded),
    Panel("ended", "answers that ended", draw_share, GREEN),
)


def _not_explained(metrics: Metrics, panel: Panel) -> bool:
    return not points_of(metrics, "explained_variance")


CRITIC_PANELS = (
    Panel("explained_variance", "explained by the critic", draw_explained, AMBER, shown=recorded),
    Panel("value_loss", "value loss", draw_series, AMBER, shown=_not_explained),
)
NORMS_PANEL = Panel(
    "grad_norm", "gradient norm", partial(draw_norms, sets={"policy": PURPLE, "critic": AMBER})
)
NORM_PANEL = Panel("grad_norm", "gradient norm", draw_series, PURPLE)
REPLAY_PANEL = Panel(
    "replay_loss", "replay loss", draw_replay, BLUE, held_out="eval_replay_loss", shown=recorded
)
# Keeps the grid of small panels full where their number is odd.
FILLER = Panel("seconds", "seconds per step", draw_series, GRAY)


def critic_warmup(record: Mapping[str, Any]) -> str:
    """The phase of a step: the critic alone is trained in its warm-up. A skipped step, without losses, has none."""
    alone = record.get("policy_loss") is None and record.get("value_loss") is not None
    return "critic warm-up" if alone else ""


def figures(
    algorithm: str, *, critic: bool, scorer: str = "reward model", ratio_unit: str = "answer_tokens"
) -> StageFigures:
    """Figures of an algorithm. Panels whose figures its records lack are not drawn.

    algorithm: the tracker's group for figures of no other group, such as "ppo". critic: whether it trains one; else
    there is one set of weights, whose gradient norm is `grad_norm`. scorer: what gives the scores. ratio_unit: the
    algorithm's.
    """
    score = Panel("score", f"score by the {scorer}", draw_score, BLUE, held_out="eval_score", height=2.0)
    clipped = Panel(
        "clipped",
        f"share of {ratio_unit.replace('_', ' ')} clipped",
        draw_series,
        PURPLE,
        shown=ever_positive,
    )
    panels = (*CRITIC_PANELS, NORMS_PANEL) if critic else (NORM_PANEL,)
    return StageFigures(
        figures=(TOKENS, *SCORES, *ANSWERS, *(CRITIC if critic else ()), *TIME),
        charts=Charts(
            default=algorithm,
            groups=GROUPS | (CRITIC_GROUP if critic else {}),
            rules=RULES,
            summaries={"eval/gold": "max,last"},
        ),
        curves=CURVES,
        picture=Picture(
            large=(score, *LARGE),
            small=(*ANSWER_PANELS, *panels, clipped, REPLAY_PANEL),
            columns=2,
            filler=FILLER,
            size_inches=(13.0, 7.4),
            width_ratios=(1.25, 1.0),
            around=3.0,  # a rollout is noisy, and runs have few
            x_label="step",
        ),
        phase=critic_warmup if critic else no_phase,
    )
