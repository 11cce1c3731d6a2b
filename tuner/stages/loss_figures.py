"""Figures, curves and panels of the stages whose progress is their loss: SFT, reward models and DPO."""

from tuner.display.loss_panels import draw_loss
from tuner.display.panels import BLUE, GRAY, GREEN, ORANGE, PURPLE, draw_exact, draw_series
from tuner.training.figures import Curve, Figure, Panel, recorded

LOSS = Figure(
    "loss", "{:.4f}".format, "loss {}", "value and mean", summary=True, notebook="loss", missing="not finite"
)
HELD_OUT_LOSS = Figure(
    "eval_loss", "{:.4f}".format, "eval loss {}", "latest", summary=True, notebook="held-out loss"
)
ACCURACY = Figure("accuracy", "{:.3f}".format, "accuracy {}", "mean")
LEARNING_RATE = Figure("lr", "{:.2e}".format, "lr {}", notebook="learning rate")
SPEED = Figure("tokens_per_second", "{:,.0f}".format, "{} tokens/s", notebook="tokens/s")

SYSTEM = "seconds tokens_per_second memory_gib"
"""Keys that a tracker charts under system/."""
SUMMARIES = {"eval/loss": "min,last"}

LOSS_CURVE = Curve("loss", "loss", held_out="eval_loss")

LOSS_PANEL = Panel("loss", "loss", draw_loss, BLUE, held_out="eval_loss")
ACCURACY_PANEL = Panel("accuracy", "accuracy over pairs", draw_series, ORANGE, shown=recorded)
LEARNING_RATE_PANEL = Panel("lr", "learning rate", draw_exact, PURPLE)
GRADIENT_NORM_PANEL = Panel("grad_norm", "gradient norm", draw_series, GREEN)
SPEED_PANEL = Panel("tokens_per_second", "tokens per second", draw_series, GRAY)
