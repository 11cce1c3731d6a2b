"""Figures, charts and curves of supervised fine-tuning."""

from tuner.stages.loss_figures import (
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
    figures=(TOKENS, LOSS, HELD_OUT_LOSS, LEARNING_RATE, SPEED),
    charts=Charts(
        default="train",
        groups={"data": "tokens epoch weight_per_token fill passes", "system": SYSTEM},
        rules={},
        summaries=SUMMARIES,
    ),
    curves=(LOSS_CURVE,),
    picture=Picture(
        large=(LOSS_PANEL,),
        small=(LEARNING_RATE_PANEL, GRADIENT_NORM_PANEL, SPEED_PANEL),
    ),
)
