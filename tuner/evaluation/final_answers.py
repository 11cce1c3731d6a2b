"""The final answer in a text, and whether it equals the reference: GSM8K's number, MATH's expression.

Both rules compare texts, not meanings: x+1 and 1+x differ. They follow what is usual: GSM8K's last number
(lm-evaluation-harness's `flexible-extract`), and MATH's last \\boxed expression in the normal form of its authors
(Hendrycks et al. 2021, `math_equivalence.py`), fractions as a/b.
"""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
_MARK = "####"
"""What GSM8K's solutions have before the final answer."""
_ANSWER_IS = re.compile(r"answer is:?\s*(.+?)(?:\.\s|\.?$)", re.IGNORECASE | re.MULTILINE)
_DROPPED = re.compile(
    r"\\left|\\right|\\!|\\,|\\;|\\ |\\\$|\$|\\%|%|\^\\circ|\^{\\circ}|\\(?:text|mbox)\s*{\s*[^{}]*}\s*$|\s+"
)
_FRACTION = re.compile(r"\\[dt]?frac(?:{([^{}]*)}{([^{}]*)}|(\d)(\d))")
_WORDS = re.compile(r"\\(?:text|mathrm|mbox|textbf){([^{}]*)}")
_SIDE = r"-?(?:\([^()]+\)|[^()]+)"
_QUOTIENT = rf"{_SIDE}(?:/{_SIDE})?"
_MAYBE_NUMBER = re.compile(rf"{_QUOTIENT}|-?\({_QUOTIENT}\)")
"""Parentheses around the whole or a side of a fraction alone: (3)(4) is no number."""
_HUGE = re.compile(r"e[-+]?\d{4,}", re.IGNORECASE)
"""Powers of ten that would take minutes to write as a fraction."""
_ASSIGNMENT = re.compile(r"^[a-zA-Z]=(.+)$")


def last_number(text: str) -> Fraction | None:
    """The last number of a text; behind "####" the first, as GSM8K writes its references.

    None where there is none, or it has more digits (4,300) than Python reads, as a model's that repeats one.
    """
    _, mark, behind = text.rpartition(_MARK)
    numbers = _NUMBER.findall(behind if mark else text)
    if not numbers:
        return None
    try:
        return Fraction(re.sub(r"[$,]", "", numbers[0 if mark else -1]))
    except ValueError:
        return None


def equal_numbers(answer: str, reference: str) -> bool:
    """Whether the final numbers of two texts are equal; never where the reference has none."""
    number = last_number(reference)
    return number is not None and last_number(answer) == number


def last_expression(text: str) -> str:
    """MATH's final answer: what the last \\boxed{} holds, else what follows "answer is", else the whole text."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start >= 0:
        first = text.index("{", start) + 1
        depth = 1
        for place in range(first, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                return text[first:place]
    sentences = _ANSWER_IS.findall(text)
    return sentences[-1] if sentences else text


def equal_expressions(answer: str, reference: str) -> bool:
    """Whether the final expressions of two texts have the same normal form."""
    one, other = (normal_form(last_expression(text)) for text in (answer, reference))
    return bool(other) and one == other


def normal_form(expression: str) -> str:
    """An expression without spacing, units and signs of layout; fractions as (a)/(b), numbers as fractions."""
    # a unit behind a number goes; words that are the answer stay
    short = _DROPPED.sub("", expression) or expression
    text = _WORDS.sub(r"\1", short)
    while (changed := _FRACTION.sub(_as_quotient, text)) != text:
        text = changed
    text = text.rstrip(".").replace("^{2}", "^2").replace("\\cdot", "*").replace("\\times", "*")
    assignment = _ASSIGNMENT.match(text)
    text = assignment[1] if assignment else text
    if not _MAYBE_NUMBER.fullmatch(text) or _HUGE.search(text):
        return text
    try:
        return str(Fraction(re.sub(r"(?<=\d),(?=\d{3}\b)", "", re.sub(r"[()]", "", text))))
    except (ValueError, ZeroDivisionError):
        return text


def _as_quotient(match: re.Match[str]) -> str:
    above, below = (match[1], match[2]) if match[3] is None else (match[3], match[4])
    return f"({above})/({below})"
