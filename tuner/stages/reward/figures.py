"""Figures, charts and curves of a reward model's training."""

from tuner.stages.loss_figures import loss_figures

FIGURES = loss_figures("tokens epoch pairs answers fill passes", pairs=True)
