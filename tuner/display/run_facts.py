"""The figures of a run in words, the same for a terminal, plain lines and a notebook."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from tuner.display.smoothing import RunningMean, horizon_of
from tuner.training.figures import EVERY_STAGE, Figure, StageFigures
from tuner.training.watchers import Record

Tone = Literal["plain", "main", "held out", "warning", "time left"]


class Fact(NamedTuple):
    """A few words on how a run is doing."""

    text: str
    tone: Tone = "plain"


class RunFacts:
    """The facts in the records so far, by the figures that their stage declares."""

    def __init__(self, figures: StageFigures, total_steps: int) -> None:
        self._stage = figures
        self._all = (*figures.figures, *EVERY_STAGE)
        self._record: Record = {}
        self._means = {
            figure.key: RunningMean(horizon_of(total_steps))
            for figure in self._all
            if "mean" in figure.reading
        }
        self._latest: dict[str, float] = {}

    def add(self, record: Record) -> None:
        """Take in the record of one more step."""
        self._record = record
        for key, mean in self._means.items():
            mean.add(record.get(key))
        self._latest |= {key: value for key, value in record.items() if value is not None}

    @property
    def phase(self) -> str:
        """Name of the phase that the last step belongs to; empty where there is none."""
        return self._stage.phase(self._record)

    def line(self) -> list[Fact]:
        """The facts of a progress line, without those that are unknown."""
        if not self._record:
            return []
        stage = [self._fact(figure) for figure in self._stage.figures if figure.line]
        every = [self._fact(figure) for figure in EVERY_STAGE if figure.line]
        return [fact for fact in (*stage, Fact(self.phase), *every) if fact.text]

    def summary(self) -> list[str]:
        """The texts of a run's last line."""
        shown = (figure for figure in self._all if figure.summary)
        return [text for text in map(self._summary_of, shown) if text]

    def notebook(self) -> Iterator[tuple[str, str]]:
        """(name, text) of the notebook's table."""
        for figure in self._all:
            if not figure.notebook:
                continue
            value, mean = self._value(figure), self._mean(figure)
            if figure.reading != "mean" and value is not None:
                yield figure.notebook, figure.format(value)
            if mean is not None:
                name = figure.notebook if figure.reading == "mean" else f"mean {figure.notebook}"
                yield name, figure.format(mean)

    def _value(self, figure: Figure) -> float | None:
        values = self._latest if figure.reading == "latest" else self._record
        value = values.get(figure.key)
        return None if figure.warning and not value else value

    def _mean(self, figure: Figure) -> float | None:
        return self._means[figure.key].value if figure.key in self._means else None

    def _text(self, figure: Figure) -> str:
        value, mean = self._value(figure), self._mean(figure)
        if figure.unless in self._latest:
            return ""
        if figure.reading == "mean":
            value, mean = mean, None
        if value is None and (figure.missing is None or (mean is None and not figure.missing)):
            return ""
        text = figure.text.format(figure.missing if value is None else figure.format(value)).strip()
        return text if mean is None else f"{text} (mean {figure.format(mean)})"

    def _fact(self, figure: Figure) -> Fact:
        tone: Tone = "plain"
        if figure.warning:
            tone = "warning"
        elif figure.reading in ("value and mean", "latest"):
            tone = "main" if figure.reading == "value and mean" else "held out"
        return Fact(self._text(figure), tone)

    def _summary_of(self, figure: Figure) -> str:
        if figure.reading != "value and mean":
            return self._text(figure)
        mean = self._mean(figure)
        return "" if mean is None else f"mean {figure.text.format(figure.format(mean))}"
