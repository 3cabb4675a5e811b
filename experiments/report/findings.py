"""What the page says in sentences. Every number in them is computed."""

from __future__ import annotations

import math
import os

from .choices import PROTOCOL, TEST, VALIDATION, Choice
from .comparison import Comparison
from .palette import BASELINE
from .statistics import LEAST_SEEDS, Interval
from .summary import BOTH, SEEDS, Row

ONE_RATE = "one learning rate: a demonstration, not a ranking"
MANY, LARGEST = 12, 3  # comparisons that are counted, not named; of which these are
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def one_learning_rate(choices: list[Choice]) -> bool:
    """Whether no arm was tried at more than one learning rate."""
    return all(choice.rates <= 1 for choice in choices)


def heading(choices: list[Choice], seeds: int, given: str | None) -> str:
    """The page's headline. At one learning rate a method it warns, whatever the sweep is called."""
    if one_learning_rate(choices):
        return ONE_RATE
    if given:
        return given
    choices = [choice for choice in choices if not choice.is_control]
    count = len({choice.method for choice in choices})
    compared = f"{number(count)} initialization{'s' * (count != 1)}"
    if any(choice.rates == 1 for choice in choices) or count == 1:
        return f"{compared} compared"
    return f"{compared}, each at its own learning rate, {number(seeds)} seed{'s' * (seeds != 1)}"


def how_chosen(choices: list[Choice]) -> str | None:
    """How the settings were chosen that the methods are judged at."""
    if one_learning_rate(choices):
        return None
    fewest, most = (f([c.rates for c in choices if c.rates > 1]) for f in (min, max))
    span = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    by = {choice.by for choice in choices}
    if by == {PROTOCOL}:
        how = "by the protocol, on validation data; the test set was read for the chosen ones only"
    elif by <= {VALIDATION, PROTOCOL}:
        how = "by the mean validation score over seeds"
    elif by == {TEST}:
        how = "by the mean test score over seeds, which flatters"
    else:
        how = "by the mean score over seeds, on validation data where there are any"
    return f"Each method’s learning rate was chosen among {span}, {how}."


def findings(rows: list[Row], majority: float | None) -> list[str]:
    """The result in two or three sentences, ties called ties."""
    sentences = []
    baselines = [row for row in rows if row.is_baseline]
    if len(baselines) == 1:
        baseline = baselines[0]
        above = ""
        if majority is not None:
            points = 100 * (baseline.score.estimate - majority)
            side = "above" if points >= 0 else "below"
            above = f", {abs(points):.1f} points {side} the majority class ({percent(majority)})"
        sentences.append(
            f"{BASELINE}, the baseline, scores {percent_interval(baseline.score)}{above}."
        )
    compared = [row for row in rows if row.verdict in ("tie", "above", "below")]
    it = "it" if len(baselines) == 1 else f"{BASELINE} at the same settings"
    if len(compared) > MANY:
        sentences += counted(compared, it)
    elif compared:
        sentences += named(compared, it)
    return [sentence[0].upper() + sentence[1:] for sentence in sentences]


def findings_by_task(rows: list[Row], majority: float | None) -> list[str]:
    """The findings of each task, under its name where there are several."""
    by_task: dict[str, list[Row]] = {}
    for row in rows:
        by_task.setdefault(row.choice.task, []).append(row)
    if len(by_task) == 1:
        return findings(rows, majority)
    return [f"{task}: {' '.join(findings(some, None))}" for task, some in by_task.items()]


def named(compared: list[Row], it: str) -> list[str]:
    """Every comparison by its name."""
    ties = [row for row in compared if row.verdict == "tie"]
    clear = [row for row in compared if row.verdict != "tie"]
    if not clear and len(compared) == 1:
        return [f"{ties[0].arm} is a tie with {it}: the difference lies inside its 95 % interval."]
    if not clear:
        return [
            f"Every one of the other {number(len(compared))} is a tie with {it}: "
            "each difference lies inside its 95 % interval."
        ]
    parts = [f"{row.arm}, {points_interval(row.difference)}" for row in clear]
    sentences = [f"Different from {it}: {'; '.join(parts)}."]
    if ties:
        tied = listing([row.arm for row in ties])
        are, whose = ("is a tie", "its") if len(ties) == 1 else ("are ties", "each")
        inside = f"{whose} difference lies inside its 95 % interval"
        sentences.append(f"{tied} {are} with {it}: {inside}.")
    return sentences


def counted(compared: list[Row], it: str) -> list[str]:
    """Too many comparisons to name each: how many are ties, and the largest of the others."""
    clear = [row for row in compared if row.verdict != "tie"]
    ties = len(compared) - len(clear)
    are = "is a tie" if ties == 1 else "are ties"
    told = f"Of {len(compared)} comparisons with {it}, {number(ties)} {are}"
    if not clear:
        return [f"{told}: each difference lies inside its 95 % interval."]
    clear.sort(key=lambda row: -abs(row.difference.estimate))
    parts = [f"{row.arm}, {points_interval(row.difference)}" for row in clear[:LARGEST]]
    more = f"; and {number(len(clear) - LARGEST)} more" if len(clear) > LARGEST else ""
    return [f"{told}. The largest of the others: {'; '.join(parts)}{more}."]


def caveats(rows: list[Row], seeds: list[int], examples: int | None) -> list[str]:
    """What the intervals mean, and what they do not."""
    held_out = f"the {examples:,} held-out examples" if examples else "the held-out examples"
    kinds = {row.interval for row in rows}
    lines = []
    if BOTH in kinds:
        lines.append(
            f"Intervals are 95 % percentile bootstrap intervals: {held_out} and the seeds are "
            "drawn again with replacement 2,000 times, the same draw for every method."
        )
    if SEEDS in kinds:
        lines.append(
            "Where no predictions were kept, intervals are Student’s t over seeds alone: they do "
            "not cover the choice of examples."
        )
    if kinds == {"no interval"}:
        lines.append(
            f"No intervals: no predictions were kept, and there are fewer than {LEAST_SEEDS} seeds."
        )
    lines.append(
        f"A difference to {BASELINE} is taken within each draw, or seed. Where its interval "
        "contains zero the report calls it a tie: not proof that the two are equal, only that "
        "these runs cannot tell them apart."
    )
    count = len(seeds)
    if count == 1:
        lines.append("One seed: the intervals say nothing about how a different seed would do.")
    elif count < 5 and BOTH in kinds:
        share = 100 * (count - 1) / count
        lines.append(
            f"{number(count).capitalize()} seeds are few: resampling them shows about "
            f"{share:.0f} % of the true variance between seeds, so the intervals are somewhat "
            "too narrow."
        )
    compared = sum(row.difference is not None for row in rows)
    if compared > 1:
        chance = 100 * (1 - 0.95**compared)
        lines.append(
            f"{number(compared).capitalize()} comparisons at 95 %: if all methods were equal and "
            f"the comparisons independent, the chance of at least one false difference would be "
            f"{chance:.0f} %."
        )
    return lines


def compared(comparison: Comparison) -> str:
    """What two versions of the code differ in, in two or three sentences."""
    ours, theirs = (", ".join(c) for c in (comparison.commits, comparison.other_commits))
    changes = comparison.changes
    sentences = [
        f"{comparison.name} (commit {ours}) against {comparison.other} (commit {theirs}): "
        f"{number(len(changes))} setting{'s' * (len(changes) != 1)} in both."
    ]
    flagged = comparison.flagged
    if flagged:
        sentences.append(f"{number(len(flagged)).capitalize()} differ by more than their interval.")
    elif changes:
        sentences.append("No figure differs by more than its interval.")
    if comparison.alone or comparison.other_alone:
        sentences.append(
            f"Without a partner: {comparison.alone} runs here, {comparison.other_alone} there."
        )
    return " ".join(sentences)


def rate_caveat(choices: list[Choice]) -> str | None:
    if not one_learning_rate(choices):
        return None
    return (
        "Each method ran at a single learning rate. The best rate differs between "
        "initializations, by a factor of ten and more, so a method that loses here may win at its "
        "own rate. This page shows that the machinery works and what each start looks like; it "
        "does not rank the methods."
    )


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def percent_interval(interval: Interval) -> str:
    if interval.low != interval.low:
        return percent(interval.estimate)
    return f"{100 * interval.estimate:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def points_interval(interval: Interval) -> str:
    low, high = 100 * interval.low, 100 * interval.high
    return f"{signed(100 * interval.estimate)} points [{signed(low)}, {signed(high)}]"


def signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def mantissa(value: float) -> str:
    """3.2e-4, without the zero that Python pads exponents with."""
    if math.isnan(value):
        return "—"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else f"{count:,}"


def listing(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def distinct(values) -> list:
    return list(dict.fromkeys(v for v in values if v is not None))


def relative(path: str | os.PathLike, start: str | os.PathLike) -> str:
    """`path` as seen from `start`; absolute where no relative path exists (another drive)."""
    try:
        return os.path.relpath(path, start)
    except ValueError:
        return os.path.abspath(path)
