"""Three texts from the matrix: what differs, what does not, and what could not be seen."""

from __future__ import annotations

from .cells import judged_text, listing, plural, short_sentences
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
    """One sentence for each quantity: those in which most methods differ first, after the score."""
    differing = {
        quantity: found
        for quantity in matrix.quantities
        if (found := [one for one in matrix.of(quantity) if one.differs])
    }
    if not differing:
        return f"No quantity of any method differs from {BASELINE}’s beyond doubt."
    order = sorted(differing, key=lambda quantity: (quantity != SCORE, -len(differing[quantity])))
    sentences = [f"Different from {BASELINE}."]
    for quantity in order:
        found = differing[quantity]
        by_verdict = [
            f"{arms([o for o in found if o.verdict == verdict], matrix)} {verdict}"
            for verdict in dict.fromkeys(one.verdict for one in found)
        ]
        most = max(found, key=distance)
        which = f", most {arm(most, matrix)}" if len(found) > 1 else ""
        label = name(quantity, metric)
        sentences.append(
            f"{label[0].upper()}{label[1:]}: {'; '.join(by_verdict)}{which} ({with_unit(most)})."
        )
    return " ".join(sentences)


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
        found = [one for one in matrix.of(quantity) if one.verdict == verdict]
        if not found:
            continue
        who = arms(found, matrix)
        margin = f"{who}, {quantity.margin_text}" if verdict == TIE else who
        parts.append(f"{name(quantity, metric)} ({margin})")
    return parts


def arms(found: list[Judgement], matrix: Matrix) -> str:
    """These arms of one quantity by name, or how many of all they are."""
    everyone = len(matrix.of(found[0].quantity))
    if len(found) == everyone > 1:
        return "both" if everyone == 2 else f"all {everyone}"
    if len(found) <= NAMED:
        return listing(arm(one, matrix) for one in found)
    return f"{len(found)} of {everyone}"


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
