"""Three texts from the matrix: what differs, what does not, and what could not be seen."""

from __future__ import annotations

from .cells import judged_text, plural, short_sentences
from .judgement import NOT_RESOLVED, TIE, Judgement
from .matrix import Matrix
from .palette import BASELINE
from .power import Power
from .quantities import SCORE, Quantity

POINT = 0.01
NAMED = 3  # arms that a sentence names; of more it counts


def headline(matrix: Matrix, powers: list[Power], metric: str) -> tuple[str, str, str]:
    """The texts, in short sentences. Nothing in them is fixed beforehand.

    Args:
        powers: what the sweep could resolve, for the third text.
        metric: the name of the score.
    """
    if not matrix.judgements:
        return (
            f"Nothing is compared: no run of {BASELINE} is paired with another method.",
            "No quantity is tied.",
            "No quantity is judged.",
        )
    return differences(matrix, metric), ties(matrix, metric), unseen(matrix, powers, metric)


def differences(matrix: Matrix, metric: str) -> str:
    parts = []
    for quantity in matrix.quantities:
        all_, found = matrix.of(quantity), [o for o in matrix.of(quantity) if o.differs]
        if found:
            most = max(found, key=distance)
            parts.append(
                f"{name(quantity, metric)} ({len(found)} of {len(all_)}; most: "
                f"{arm(most, matrix)} {with_unit(most)}, {most.verdict})"
            )
    if not parts:
        return f"No quantity of any method differs from {BASELINE}’s beyond doubt."
    return short_sentences(f"Different from {BASELINE}", parts)


def ties(matrix: Matrix, metric: str) -> str:
    parts = counted(matrix, metric, TIE)
    if not parts:
        return "Tied: nothing. No interval lies within its margin."
    return short_sentences("Tied, within the margin", parts)


def unseen(matrix: Matrix, powers: list[Power], metric: str) -> str:
    parts = counted(matrix, metric, NOT_RESOLVED)
    texts = [short_sentences("Not resolved", parts or ["nothing"])]
    score = [power for power in powers if power.quantity == SCORE]
    if score and any(o.verdict == NOT_RESOLVED for o in matrix.of(SCORE)):
        texts.append(reach(score[0], metric))
    if matrix.absent:
        texts.append(
            short_sentences("Not measured", [quantity.label for quantity in matrix.absent])
        )
    return " ".join(texts)


def reach(power: Power, metric: str) -> str:
    """What a sweep resolves of the score, and what one point would take."""
    text = f"This sweep resolves {metric} differences from {power.least_text}."
    if not power.now > POINT:
        return text
    seeds, both = power.seeds_for(POINT), power.both_for(POINT)
    if seeds is not None:
        return f"{text} One point would take {plural(seeds, 'seed')}."
    if both is not None:
        return f"{text} One point would take {plural(both[0], 'seed')} and {both[1]:,} examples."
    return text


def counted(matrix: Matrix, metric: str, verdict: str) -> list[str]:
    """One part for each quantity with this verdict: its arms by name, or how many there are."""
    parts = []
    for quantity in matrix.quantities:
        all_ = matrix.of(quantity)
        found = [one for one in all_ if one.verdict == verdict]
        if not found:
            continue
        who = (
            f"all {len(all_)}"
            if len(found) == len(all_) > 1
            else ", ".join(arm(one, matrix) for one in found)
            if len(found) <= NAMED
            else f"{len(found)} of {len(all_)}"
        )
        margin = f"{who}, {quantity.margin_text}" if verdict == TIE else who
        parts.append(f"{name(quantity, metric)} ({margin})")
    return parts


def arm(one: Judgement, matrix: Matrix) -> str:
    several = len({other.task for other in matrix.judgements}) > 1
    return f"{one.arm} on {one.task}" if several else one.arm


def with_unit(one: Judgement) -> str:
    text = judged_text(one, brief=True)
    return text if one.factor else f"{text} {one.quantity.unit}".strip()


def distance(one: Judgement) -> float:
    """How far a difference is from none; factors below one count by their inverse."""
    return max(one.value, 1 / one.value) if one.factor else abs(one.value)


def name(quantity: Quantity, metric: str) -> str:
    return metric if quantity == SCORE else quantity.label
