"""Figures, charts and curves of the stages whose progress is their loss: SFT, reward models and DPO."""

from tuner.display.loss_panels import draw_loss
from tuner.display.panels import BLUE, GRAY, GREEN, ORANGE, PURPLE, draw_exact, draw_series
from tuner.training.figures import TOKENS, Charts, Curve, Figure, Panel, Picture, StageFigures, recorded

LOSS = (
    Figure(
        "loss",
        "{:.4f}".format,
        "loss {}",
        "value and mean",
        summary=True,
        notebook="loss",
        missing="not finite",
    ),
    Figure("eval_loss", "{:.4f}".format, "eval loss {}", "latest", summary=True, notebook="held-out loss"),
)
ACCURACY = Figure("accuracy", "{:.3f}".format, "accuracy {}", "mean")
RATES = (
    Figure("lr", "{:.2e}".format, "lr {}", notebook="learning rate"),
    Figure("tokens_per_second", "{:,.0f}".format, "{} tokens/s", notebook="tokens/s"),
)

LOSS_PANEL = Panel("loss", "loss", draw_loss, BLUE, held_out="eval_loss")
ACCURACY_PANEL = Panel("accuracy", "accuracy over pairs", draw_series, ORANGE, shown=recorded)
RATE_PANELS = (
    Panel("lr", "learning rate", draw_exact, PURPLE),
    Panel("grad_norm", "gradient norm", draw_series, GREEN),
    Panel("tokens_per_second", "tokens per second", draw_series, GRAY),
)


def loss_figures(data_keys: str, *, pairs: bool = False) -> StageFigures:
    """Figures of a stage that minimizes a loss.

    data_keys: keys that a tracker charts under data/, separated by spaces. pairs: whether it learns from preference
    pairs, and so records an accuracy.
    """
    return StageFigures(
        figures=(TOKENS, *LOSS, *((ACCURACY,) if pairs else ()), *RATES),
        charts=Charts(
            default="train",
            groups={"data": data_keys, "system": "seconds tokens_per_second memory_gib"},
            rules={},
            summaries={"eval/loss": "min,last"},
        ),
        curves=(Curve("loss", "loss", held_out="eval_loss"),),
        picture=Picture(large=(LOSS_PANEL,), small=(*((ACCURACY_PANEL,) if pairs else ()), *RATE_PANELS)),
    )
