"""Figures, charts and curves of supervised fine-tuning."""

from tuner.stages.loss_figures import loss_figures

FIGURES = loss_figures("tokens epoch weight_per_token fill passes")
