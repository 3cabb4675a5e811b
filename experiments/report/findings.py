"""What the page states first: its headline, what the data resolved, and how to read intervals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .cells import difference_text, plural, score_text
from .choices import PROTOCOL, TEST, VALIDATION, Choice
from .palette import BASELINE
from .statistics import LEAST_SEEDS
from .summary import BOTH, NONE, SEEDS, Row

ONE_RATE = "one learning rate: a demonstration, not a ranking"
NAMED = 12  # methods that a cell names; of more it names the largest differences
LARGEST = 3


def one_learning_rate(choices: list[Choice]) -> bool:
    """Whether every arm was tried at one learning rate only."""
    return all(choice.rates <= 1 for choice in choices)


def heading(choices: list[Choice], seeds: int, given: str | None) -> str:
    """The page's headline. With one learning rate per method it is always a warning."""
    if one_learning_rate(choices):
        return ONE_RATE
    if given:
        return given
    choices = [choice for choice in choices if not choice.is_control]
    methods = plural(len({choice.method for choice in choices}), "initialization")
    if any(choice.rates == 1 for choice in choices):
        return f"{methods} compared"
    return f"{methods}, each at its own learning rate, {plural(seeds, 'seed')}"


def how_chosen(choices: list[Choice]) -> str:
    """How the settings were chosen at which the methods are compared."""
    if one_learning_rate(choices):
        return (
            "Each method ran at a single learning rate. The best rates of two initializations may "
            "differ by a factor of ten, so another rate may reverse this order. This page does not "
            "rank the methods."
        )
    rates = sorted({choice.rates for choice in choices if choice.rates > 1})
    span = f"{rates[0]}" if len(rates) == 1 else f"{rates[0]} to {rates[-1]}"
    by = {choice.by for choice in choices}
    if by == {PROTOCOL}:
        how = "by the protocol on validation data. Only the chosen settings read the test set"
    elif by <= {VALIDATION, PROTOCOL}:
        how = "by the mean validation score over seeds"
    elif by == {TEST}:
        how = "by the mean test score over seeds, which makes the scores too high"
    else:
        how = "by the mean score over seeds, on validation data where there is any"
    return f"Each method’s learning rate was chosen among {span}, {how}."


@dataclass(frozen=True)
class Finding:
    """What the data resolved about one measure on one task.

    Attributes:
        baseline: the values of the baseline's arms.
        better, worse: arms whose interval of the difference excludes zero.
        tied: arms whose interval contains zero.
    """

    measure: str
    task: str
    baseline: str
    better: str
    worse: str
    tied: str


def findings(rows: list[Row], metric: str) -> list[Finding]:
    """One finding per task, for the score."""
    made = []
    for task in dict.fromkeys(row.choice.task for row in rows):
        mine = [row for row in rows if row.choice.task == task]
        verdicts = {
            verdict: [row for row in mine if row.verdict == verdict]
            for verdict in ("above", "below", "tie")
        }
        made.append(
            Finding(
                measure=f"{metric}, %",
                task=task,
                baseline=", ".join(score_text(row.score) for row in mine if row.is_baseline),
                better=with_differences(verdicts["above"]),
                worse=with_differences(verdicts["below"]),
                tied=names(row.arm for row in verdicts["tie"]),
            )
        )
    return made


def with_differences(rows: list[Row]) -> str:
    """The arms with their differences in points, the largest first."""
    rows = sorted(rows, key=lambda row: -abs(row.difference.estimate))
    return names(f"{row.arm} ({difference_text(row.difference)})" for row in rows)


def names(given: Iterable[str]) -> str:
    given = list(given)
    if not given:
        return "none"
    if len(given) <= NAMED:
        return f"{len(given)}: {', '.join(given)}"
    return f"{len(given)}: {', '.join(given[:LARGEST])}, …"


def caveats(rows: list[Row], seeds: int, examples: int | None) -> list[str]:
    """What the intervals cover and what they do not.

    Args:
        examples: the number of held-out examples; None if it differs between tasks.
    """
    held_out = f"the {examples:,} held-out examples" if examples else "the held-out examples"
    kinds = {row.interval for row in rows}
    lines = []
    if BOTH in kinds:
        lines.append(
            f"Intervals are 95 % percentile bootstrap intervals: {held_out} and the seeds are "
            "resampled 2,000 times, with the same draws for every method."
        )
    if SEEDS in kinds:
        lines.append(
            "Without predictions, intervals are Student’s t over seeds alone. They do "
            "not cover the choice of examples."
        )
    if kinds == {NONE}:
        lines.append(f"No intervals: no predictions were kept, and fewer than {LEAST_SEEDS} seeds.")
    lines.append(
        f"A difference to {BASELINE} is paired: it is taken within each draw or seed. It is a tie "
        "if its interval contains zero. A tie does not prove equality; these runs cannot tell the "
        "two apart."
    )
    if seeds == 1:
        lines.append("One seed: the intervals do not cover how another seed would score.")
    elif seeds < 5 and BOTH in kinds:
        lines.append(
            f"{seeds} seeds are few. Resampling them shows about {100 * (seeds - 1) / seeds:.0f} % "
            "of the variance between seeds, so the intervals are somewhat too narrow."
        )
    compared = sum(row.difference is not None for row in rows)
    if compared > 1:
        lines.append(
            f"{compared} comparisons at 95 %: if all methods were equal and the comparisons "
            f"independent, at least one would seem different with a chance of "
            f"{100 * (1 - 0.95**compared):.0f} %."
        )
    return lines
