"""Figures, charts and curves of Kahneman-Tversky optimization."""

from dataclasses import replace

from tuner.display.panels import ORANGE, draw_series
from tuner.stages.loss_figures import loss_figures
from tuner.training.figures import Figure, Panel, recorded

_LOSS = loss_figures("tokens epoch")
_MARGIN = Figure("margin", "{:.3f}".format, "margin {}", "mean", notebook="margin")
_KL = Figure("kl", "{:.3f}".format, "kl {}", notebook="KL per answer")
_PANEL = Panel("margin", "reward of desirable less undesirable", draw_series, ORANGE, shown=recorded)

FIGURES = replace(
    _LOSS,
    figures=(*_LOSS.figures, _MARGIN, _KL),
    picture=replace(_LOSS.picture, small=(_PANEL, *_LOSS.picture.small)),
)
