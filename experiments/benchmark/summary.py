"""The results in a README's space: ratios by strategy and model, and the worst quality of all.

One table for the initializations, one for the rest, and three lines on how to read them.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.benchmark.rows import Quality, Row
from experiments.benchmark.tables import NOTHING, amount, share

SYNTHETIC = " (synthetic)"
OTHER_PEER = "ᵗ"
READING = (
    "Cells: the peer's time / ours (above 1 ours takes less), what is wanted in brackets, a miss "
    f"in bold. The peer is PEFT, with {OTHER_PEER} `torch.linalg` where PEFT gives no figure; × is "
    "a share of the plain forward passes. Quality: the worst of all models, with its limit."
)


def summary(rows: Sequence[Row], machine: str) -> str:
    """Both tables as Markdown; `machine` is what they were measured on."""
    parts = []
    started = [row for row in rows if row.section == "initialization" and row.case != "all"]
    if started:
        parts += [strategies(started), ""]
    others = [row for row in rows if row.section != "initialization"]
    if others:
        parts += [measures(others), ""]
    return "\n".join([*parts, f"{READING} Measured on {machine}.", ""])


def strategies(rows: Sequence[Row]) -> str:
    """A line for each strategy, a column for each model and rank."""
    models = list(dict.fromkeys(row.model for row in rows))
    cases = list(dict.fromkeys(row.case for row in rows))
    known = {(row.case, row.model): row for row in rows}
    head = ["strategy", *(model.replace(SYNTHETIC, "") for model in models), "quality"]
    body = []
    for case in cases:
        found = [known.get((case, model)) for model in models]
        body.append([case, *map(cell, found), worst([row for row in found if row is not None])])
    return table(head, body, left=(0, len(models) + 1))


def cell(row: Row | None) -> str:
    """The ratio with what is wanted of it; where there is none, what ours takes."""
    if row is None or row.ours is None:
        return NOTHING
    if row.unit == "×":
        text, wanted = f"{row.ours:.2f}×", f" (≤ {row.ceiling:g})" if row.ceiling else ""
    elif row.ratio is None:
        text, wanted = amount(row.ours, row.unit), ""
    else:
        value = row.ratio.estimate
        text = f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 2 else f"{value:.2f}"
        text += "" if row.peer == "PEFT" else OTHER_PEER
        wanted = f" (≥ {row.target:g})" if row.target else ""
    text = f"**{text}**" if row.verdict == "missed" else text
    return text + wanted


def worst(rows: Sequence[Row]) -> str:
    """Each figure of quality at its worst over the models, in bold where a limit is exceeded."""
    figures: dict[str, list[Quality]] = {}
    for row in rows:
        for name, found in row.quality.items():
            if found.ours is not None:
                figures.setdefault(name, []).append(found)
    return "; ".join(figure(name, found) for name, found in figures.items()) or NOTHING


def figure(name: str, found: Sequence[Quality]) -> str:
    """One figure: its worst value, with the limit, or PEFT's where that is the limit."""
    least = name == "overlap"
    poorest = (min if least else max)(found, key=lambda each: each.ours)
    text = f"{name} {share(name, poorest.ours)}"
    if any(each.kept is False for each in found):
        text = f"**{text}**"
    if poorest.limit is None:
        return text
    sign = "≥" if poorest.least else "≤"
    whose = "PEFT's " if poorest.limit == poorest.peft else ""
    return f"{text} ({sign} {whose}{share(name, poorest.limit)})"


def measures(rows: Sequence[Row]) -> str:
    """A line for each row of the other sections."""
    body = [
        [
            f"{row.section}: {row.case}",
            row.model,
            amount(row.ours, row.unit),
            amount(row.peft, row.unit),
            cell(row) if row.ratio is not None else NOTHING,
            row.verdict or NOTHING,
        ]
        for row in rows
    ]
    return table(["what", "model", "ours", "PEFT", "ratio", "wanted"], body, left=(0, 1, 5))


def table(head: list[str], body: list[list[str]], left: tuple[int, ...]) -> str:
    rule = [":---" if place in left else "---:" for place in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])
