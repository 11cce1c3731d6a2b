"""Figures, charts and curves of direct preference optimization."""

from tuner.stages.loss_figures import loss_figures

FIGURES = loss_figures("tokens epoch", pairs=True)
