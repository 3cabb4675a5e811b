"""How the settings were chosen, and what the intervals cover and leave out."""

from __future__ import annotations

from .choices import PROTOCOL, TEST, VALIDATION, Choice
from .matrix import Matrix
from .matrix_table import legend
from .palette import BASELINE
from .statistics import LEAST_SEEDS
from .summary import BOTH, NONE, SEEDS, Row

ONE_RATE = "one learning rate: a demonstration, not a ranking"
REASONS = 12  # that the page lists


def one_learning_rate(choices: list[Choice]) -> bool:
    """Whether every arm was tried at one learning rate only."""
    return all(choice.rates <= 1 for choice in choices)


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


def caveats(rows: list[Row], matrix: Matrix, seeds: int, examples: int | None) -> list[str]:
    """What the intervals cover and what they do not.

    Args:
        examples: the number of held-out examples; None if it differs between tasks.
    """
    held_out = f"the {examples:,} held-out examples" if examples else "the held-out examples"
    kinds = {row.interval for row in rows}
    lines = [legend(matrix)] if matrix.judgements else []
    if BOTH in kinds:
        lines.append(
            "The interval of a score is a 95 % percentile bootstrap interval. It resamples "
            f"{held_out} and the seeds 2,000 times, with the same draws for every method."
        )
        lines.append(
            "The interval of a difference of scores adds the variance between the examples to the "
            "pooled variance between the seeds."
        )
    if SEEDS in kinds:
        lines.append(
            "Without predictions, intervals are Student’s t over seeds alone. They do "
            "not cover the choice of examples."
        )
    if kinds == {NONE}:
        lines.append(
            "No intervals of the scores: no predictions were kept, and fewer than "
            f"{LEAST_SEEDS} seeds."
        )
    lines.append(
        "Factors are geometric means, judged on logarithms. The pooled variance assumes that the "
        "methods vary alike from seed to seed."
    )
    lines += sorted({
        f"{one.quantity.label}, {one.arm}: {one.reason}." for one in matrix.judgements if one.reason
    })[:REASONS]  # fmt: skip
    if seeds == 1:
        lines.append(
            f"One seed: no difference to {BASELINE} can be judged, because the variance between "
            "seeds is unknown."
        )
    elif seeds < 5 and BOTH in kinds:
        lines.append(
            f"{seeds} seeds are few. Resampling them shows about {100 * (seeds - 1) / seeds:.0f} % "
            "of the variance between seeds, so the intervals of the scores are somewhat too "
            "narrow. Those of the differences are not."
        )
    return lines
