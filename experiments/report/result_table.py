"""The results table for a terminal, in Markdown and in LaTeX: the same rows and columns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from rich import box
from rich.table import Table

from . import cells
from .palette import BASELINE
from .summary import Row

LONG_NAME = 16  # characters of a name that leave room for every column


@dataclass(frozen=True)
class Column:
    """`show` gives the cell's text, `value` what a sort compares."""

    header: str
    show: Callable[[Row], str]
    value: Callable[[Row], float | str | None]
    help: str = ""
    brief: Callable[[Row], str] | None = None  # for a terminal of 80 columns, if `show` is long


def difference_cell(row: Row) -> str:
    if row.difference is None:
        return row.verdict
    text = cells.difference_text(row.difference)
    return f"{text} (tie)" if row.verdict == "tie" else text


def brief_difference(row: Row) -> str:
    if row.difference is None:
        return row.verdict
    text = cells.signed(100 * row.difference.estimate)
    return f"{text} tie" if row.verdict == "tie" else text


def measured(header: str, name: str, show: Callable[[float | None], str], help: str) -> Column:
    return Column(header, lambda row: show(row.get(name)), lambda row: row.get(name), help)


def columns(metric: str, rows: list[Row]) -> list[Column]:
    """The columns for which `rows` have data."""
    made = [
        Column("method", lambda row: row.arm, lambda row: row.arm),
        Column(
            f"{metric}, %",
            lambda row: cells.score_text(row.score),
            lambda row: row.score.estimate,
            "mean over seeds ± half of its 95 % interval",
        ),
        Column(
            f"against {BASELINE}",
            difference_cell,
            lambda row: row.difference.estimate if row.difference else None,
            "paired difference in points ± half of its 95 % interval; a tie if that contains zero",
            brief_difference,
        ),
    ]
    if any(row.choice.rates > 1 for row in rows):
        made.append(
            Column(
                "learning rate",
                lambda row: cells.mantissa(row.choice.learning_rate) + "*" * row.choice.at_edge,
                lambda row: row.choice.learning_rate,
                "the chosen one; *: the lowest or highest that was tried",
            )
        )
    made += [
        measured(
            "output gap", "output_gap", cells.scientific,
            "largest change of a logit by the initialization, at step 0, over seeds",
        ),
        measured(
            "init s", "init_seconds", cells.seconds,
            "seconds to initialize, calibration included: mean over seeds, or of the run that "
            "computed what the method's other runs loaded from the cache",
        ),
        measured("trainable", "trainable_parameters", cells.count, "trainable parameters"),
        measured(
            "first grad", "first_step_gradient_norm", cells.significant,
            "gradient norm at the first step, mean over seeds",
        ),
        measured(
            "update", "update_size", cells.significant,
            "‖ΔW‖ / ‖W‖ over all adapted layers after training, mean over seeds",
        ),
        measured(
            "forgetting", "forgetting", cells.significant,
            "forgetting against the original base model, mean over seeds",
        ),
    ]  # fmt: skip
    optional = {"update", "forgetting"}
    return [
        column
        for column in made
        if column.header not in optional or any(column.value(row) is not None for row in rows)
    ]


def terminal_table(rows: list[Row], metric: str, title: str) -> Table:
    """At most 80 columns wide for methods at one setting."""
    hidden = {"update", "forgetting"}
    if any(row.choice.rates > 1 for row in rows):
        hidden |= {"output gap", "first grad"}  # the learning rate takes their place
    if max(len(row.arm) for row in rows) > LONG_NAME:
        hidden |= {"trainable"}
    shown = [column for column in columns(metric, rows) if column.header not in hidden]
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, column in enumerate(shown):
        header = column.header.replace(" ", "\n", 1)
        table.add_column(header, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        texts = [(column.brief or column.show)(row) for column in shown]
        table.add_row(*texts, style="bold" if row.is_baseline else None)
    return table


def markdown_table(rows: list[Row], metric: str, heading: str, notes: list[str]) -> str:
    shown = columns(metric, rows)
    texts = [[column.show(row) for column in shown] for row in rows]
    table = cells.markdown(heading, [column.header for column in shown], texts, "---:")
    lines = [f"- {column.header}: {column.help}" for column in shown if column.help]
    return "\n".join([table, *lines, *(f"- {note}" for note in notes)]) + "\n"


def latex_table(rows: list[Row], metric: str, heading: str, notes: list[str]) -> str:
    """A table that needs only `\\usepackage{booktabs}`."""
    shown = columns(metric, rows)
    body = [" & ".join(latex(column.show(row)) for column in shown) + r" \\" for row in rows]
    lines = [
        r"% needs \usepackage{booktabs}",
        *(f"% {note}" for note in notes),
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{latex(heading[0].upper() + heading[1:])}. "
        r"$\pm$: half of the 95\,\% interval over examples and seeds.}",
        rf"  \begin{{tabular}}{{l{'r' * (len(shown) - 1)}}}",
        r"    \toprule",
        "    " + " & ".join(latex(column.header) for column in shown) + r" \\",
        r"    \midrule",
        *(f"    {line}" for line in body),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def latex(text: str) -> str:
    """Escape LaTeX's special characters; write ± and powers of ten as mathematics."""
    digits, mark, exponent = text.partition("e")
    try:
        if mark and math.isfinite(float(text)):
            return rf"${digits} \times 10^{{{int(exponent)}}}$"
    except ValueError:
        pass
    for plain, escaped in (
        ("\\", r"\textbackslash{}"), ("&", r"\&"), ("%", r"\%"), ("$", r"\$"), ("#", r"\#"),
        ("_", r"\_"), ("±", r"$\pm$"), ("−", "$-$"), ("—", "--"), ("·", r"$\cdot$"),
    ):  # fmt: skip
        text = text.replace(plain, escaped)
    return text
