"""Numbers and lists as text for tables and sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .judgement import Judgement
from .statistics import Interval


def score_text(interval: Interval) -> str:
    """A share in percent ± half of its interval.

    >>> score_text(Interval(0.757, 0.732, 0.782))
    '75.7 ± 2.5'
    """
    text = f"{100 * interval.estimate:.1f}"
    return text if math.isnan(interval.low) else f"{text} ± {100 * interval.half_width:.1f}"


def difference_text(interval: Interval) -> str:
    """A difference of two shares in points ± half of its interval."""
    text = signed(100 * interval.estimate)
    return text if math.isnan(interval.low) else f"{text} ± {100 * interval.half_width:.1f}"


def judged_text(one: Judgement, brief: bool = False) -> str:
    """A difference to the baseline with its interval: "+1.2 ± 2.4", "×3.3 [2.5, 4.4]".

    Args:
        brief: without the interval.
    """
    if math.isnan(one.value):
        return "—"
    known = not (brief or math.isnan(one.low))
    if one.factor:
        return f"×{factor(one.value)}" + (
            f" [{factor(one.low)}, {factor(one.high)}]" if known else ""
        )
    scale = one.quantity.scale
    half = scale * (one.high - one.low) / 2
    if one.quantity.ratio:
        text = f"{one.value:+.2g}".replace("-", "−")
        return f"{text} ± {half:.2g}" if known else text
    text = signed(scale * one.value)
    return f"{text} ± {half:.1f}" if known else text


def factor(value: float) -> str:
    """
    >>> [factor(value) for value in (0.0123, 0.98, 3.31, 47.2, 612.0)]
    ['0.012', '0.98', '3.3', '47', '612']
    """
    if value < 0.1:
        return f"{value:.2g}"
    return f"{value:.{2 if value < 2 else 1 if value < 10 else 0}f}"


def signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def mantissa(value: float) -> str:
    """A learning rate in its shortest form.

    >>> mantissa(0.00032)
    '3.2e-4'
    """
    if math.isnan(value):
        return "—"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def number(value: float | None) -> str:
    """Three significant digits, or an integer from a thousand on.

    >>> [number(value) for value in (None, 0.0, 2.94e-6, 0.0444, 7.485, 444672.0)]
    ['—', '0', '2.94e-06', '0.0444', '7.49', '444,672']
    """
    if value is None or math.isnan(value):
        return "—"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listing(parts: Iterable[object]) -> str:
    """
    >>> listing([8, 16, 32])
    '8, 16 and 32'
    """
    *first, last = map(str, parts)
    return f"{', '.join(first)} and {last}" if first else last


MOST_WORDS = 25


def short_sentences(lead: str, parts: Iterable[str]) -> str:
    """A list as short sentences: later ones begin with "Also". Empty without parts.

    >>> short_sentences("Not measured", ["the score", "the loss"])
    'Not measured: the score and the loss.'
    >>> long = ["the " + "very " * 12 + name for name in ("low loss", "high loss")]
    >>> [len(sentence.split()) for sentence in short_sentences("Tied", long).split(". ")]
    [16, 16]
    """
    made: list[list[str]] = [[]]
    if not (parts := list(parts)):
        return ""
    for part in parts:
        if made[-1] and len(f"{lead} {listing([*made[-1], part])}".split()) > MOST_WORDS:
            made.append([])
        made[-1].append(part)
    first, *others = (listing(some) for some in made)
    return " ".join([f"{lead}: {first}.", *(f"Also: {other}." for other in others)])
