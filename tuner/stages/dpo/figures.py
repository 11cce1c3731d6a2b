"""Figures, charts and curves of direct preference optimization."""

from tuner.stages.loss_figures import (
    ACCURACY,
    ACCURACY_PANEL,
    GRADIENT_NORM_PANEL,
    HELD_OUT_LOSS,
    LEARNING_RATE,
    LEARNING_RATE_PANEL,
    LOSS,
    LOSS_CURVE,
    LOSS_PANEL,
    SPEED,
    SPEED_PANEL,
    SUMMARIES,
    SYSTEM,
)
from tuner.training.figures import TOKENS, Charts, Picture, StageFigures

FIGURES = StageFigures(
    figures=(TOKENS, LOSS, HELD_OUT_LOSS, ACCURACY, LEARNING_RATE, SPEED),
    charts=Charts(
        default="train",
        groups={"data": "tokens epoch", "system": SYSTEM},
        rules={},
        summaries=SUMMARIES,
    ),
    curves=(LOSS_CURVE,),
    picture=Picture(
        large=(LOSS_PANEL,),
        small=(ACCURACY_PANEL, LEARNING_RATE_PANEL, GRADIENT_NORM_PANEL, SPEED_PANEL),
    ),
)
