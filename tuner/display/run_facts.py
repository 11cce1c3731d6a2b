"""What a run's progress says in words, however it is drawn: on a terminal, in plain lines, in a notebook."""

from collections.abc import Iterable

from tuner.display.smoothing import Smoothed, horizon_of
from tuner.printable import printable
from tuner.training.step_records import of_policy, warming_up
from tuner.training.watchers import Record, Sample

LONGEST_TEXT = 600
"""Characters of a prompt, answer or reference that are shown."""


class Seen:
    """The records so far, as far as they are worth a glance."""

    def __init__(self, total_steps: int) -> None:
        self.record: Record = {}
        """The last one."""
        self._means = {
            name: Smoothed(horizon_of(total_steps)) for name in ("loss", "accuracy", "score", "ended")
        }
        self._held_out: dict[str, float] = {}

    def add(self, record: Record) -> None:
        self.record = record
        for name, mean in self._means.items():
            mean.add(record.get(name))
        self._held_out |= {
            name: value for name, value in record.items() if name.startswith("eval_") and value is not None
        }

    def mean(self, name: str) -> float | None:
        """The running mean of a noisy number."""
        return self._means[name].value

    def held_out(self, name: str) -> float | None:
        """The last measure of this name on rows that are not trained."""
        return self._held_out.get(f"eval_{name}")

    def facts(self) -> dict[str, str]:
        """What is worth a glance after each step, by name; what is not known is left out."""
        if not self.record:
            return {}
        stage = _policy_facts(self) if of_policy(self.record) else _loss_facts(self)
        facts = {
            **stage,
            "memory": number(self.record.get("memory_gib"), "{:.1f} GiB"),
            "skipped": number(self.record.get("bad_steps") or None, "{:.0f} skipped"),
        }
        return {name: text for name, text in facts.items() if text}

    def summary(self) -> list[str]:
        """What is worth knowing when the run is over."""
        facts = _policy_summary(self) if of_policy(self.record) else _loss_summary(self)
        tokens = number(self.record.get("tokens"), "{:,.0f} tokens")
        return [fact for fact in (tokens, *facts) if fact]


def _loss_facts(seen: Seen) -> dict[str, str]:
    """Of a stage that is seen in its loss; a step without one was skipped."""
    record, loss = seen.record, seen.record.get("loss")
    return {
        "loss": ("loss not finite" if loss is None else f"loss {loss:.4f}")
        + number(seen.mean("loss"), " (mean {:.4f})"),
        "eval loss": number(seen.held_out("loss"), "eval loss {:.4f}"),
        "accuracy": number(seen.mean("accuracy"), "accuracy {:.3f}"),
        "lr": number(record.get("lr"), "lr {:.2e}"),
        "speed": number(record.get("tokens_per_second"), "{:,.0f} tokens/s"),
    }


def _loss_summary(seen: Seen) -> Iterable[str]:
    return (
        number(seen.mean("loss"), "mean loss {:.4f}"),
        number(seen.held_out("loss"), "eval loss {:.4f}"),
    )


def _policy_facts(seen: Seen) -> dict[str, str]:
    """Of PPO, whose loss says nothing: what the answers are worth, how far the policy went, and how they look."""
    record, seconds = seen.record, seen.record.get("seconds")
    return {
        "score": _score(seen),
        "held out": _held_out_policy(seen),
        "kl": number(record.get("kl"), "kl {:.4f}"),
        "length": number(record.get("length"), "length {:,.0f}"),
        "ended": number(seen.mean("ended"), "ended {:.0%}"),
        "explained": number(record.get("explained_variance"), "explained {:.2f}"),
        "speed": "" if seconds is None else f"{duration(seconds)} a step",
        "warm-up": "critic warm-up" if warming_up(record) else "",
    }


def _policy_summary(seen: Seen) -> Iterable[str]:
    return (
        number(seen.mean("score"), "mean score {:.3f}"),
        _held_out_policy(seen),
        number(seen.record.get("kl"), "kl {:.4f}"),
    )


def _score(seen: Seen) -> str:
    """A skipped step has none, but the mean stays."""
    last, mean = seen.record.get("score"), seen.mean("score")
    return "" if mean is None else f"score{number(last, ' {:.3f}')} (mean {mean:.3f})"


def _held_out_policy(seen: Seen) -> str:
    """The gold score, which nothing learns from, or where there is none the learned one."""
    learned = number(seen.held_out("score"), "eval score {:.3f}")
    return number(seen.held_out("gold"), "gold {:.3f}") or learned


def number(value: float | None, form: str) -> str:
    """The value in this form; nothing where there is none."""
    return "" if value is None else form.format(value)


def duration(seconds: float) -> str:
    """Seconds as people read them: 8.3 s, 4:05, 2:03:04, 3 d 4 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def shortened(text: str, longest: int = LONGEST_TEXT) -> str:
    """The text, or its beginning and how much more there is."""
    text = printable(text.strip("\n"))
    return text if len(text) <= longest else f"{text[:longest]}… (+{len(text) - longest:,} characters)"


def condition_of(sample: Sample) -> str:
    """The condition that the sample was scored under; empty where it has none."""
    return getattr(sample, "condition", None) or ""


def sample_lines(sample: Sample) -> list[tuple[str, str]]:
    """What is shown of a sample, as (name, text)."""
    lines = [
        ("condition", condition_of(sample)),
        ("prompt", sample.prompt),
        ("answer", sample.answer),
        ("reference", sample.reference),
    ]
    return [(name, shortened(text)) for name, text in lines if text or name == "answer"]
