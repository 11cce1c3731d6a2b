"""A sampled answer as lines of text, made harmless and shortened."""

from tuner.printable import printable
from tuner.training.watchers import Sample

LONGEST_TEXT = 600
"""Characters of a prompt, answer or reference that are shown."""


def shortened(text: str, longest: int = LONGEST_TEXT) -> str:
    """The text, or its beginning and how much more there is."""
    text = printable(text.strip("\n"))
    return text if len(text) <= longest else f"{text[:longest]}… (+{len(text) - longest:,} characters)"


def sample_lines(sample: Sample) -> list[tuple[str, str]]:
    """(name, text) of the parts of a sample that are shown."""
    lines = [
        ("condition", sample.condition or ""),
        ("prompt", sample.prompt),
        ("answer", sample.answer),
        ("reference", sample.reference),
    ]
    return [(name, shortened(text)) for name, text in lines if text or name == "answer"]
