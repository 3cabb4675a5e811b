"""The results table for a terminal, in Markdown and in LaTeX: the same rows and columns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from rich import box
from rich.table import Table

from . import cells
from .summary import Row

LONG_NAME = 16  # characters of a name that leave room for every column


@dataclass(frozen=True)
class Column:
    """`show` gives the cell's text, `value` what a sort compares."""

    header: str
    show: Callable[[Row], str]
    value: Callable[[Row], float | str | None]
    help: str = ""


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
    texts = [[column.show(row) for column in shown] for row in rows]
    bold = [row.is_baseline for row in rows]
    return terminal(title, [column.header for column in shown], texts, bold)


def terminal(
    title: str, headers: list[str], texts: list[list[str]], bold: list[bool], close: bool = False
) -> Table:
    """Any table for a terminal; headings break at spaces."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0) if close else (0, 1),
    )  # fmt: skip
    for index, header in enumerate(headers):
        justify = "right" if index else "left"
        table.add_column(header.replace(" ", "\n"), justify=justify, no_wrap=True)
    for row, strong in zip(texts, bold, strict=True):
        table.add_row(*row, style="bold" if strong else None)
    return table


def markdown_table(rows: list[Row], metric: str, title: str) -> str:
    shown = columns(metric, rows)
    texts = [[column.show(row) for column in shown] for row in rows]
    table = cells.markdown(title, [column.header for column in shown], texts, "---:")
    return "\n".join([table, *(f"- {c.header}: {c.help}" for c in shown if c.help)]) + "\n"


def latex_results(rows: list[Row], metric: str, title: str) -> str:
    shown = columns(metric, rows)
    texts = [[column.show(row) for column in shown] for row in rows]
    return latex_table(f"{title}. ±: half of the 95 % interval", [c.header for c in shown], texts)


def latex_table(caption: str, headers: list[str], texts: list[list[str]]) -> str:
    """A table that needs only `\\usepackage{booktabs}`."""
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{latex(caption[0].upper() + caption[1:])}.}}",
        rf"  \begin{{tabular}}{{l{'r' * (len(headers) - 1)}}}",
        r"    \toprule",
        "    " + " & ".join(map(latex, headers)) + r" \\",
        r"    \midrule",
        *("    " + " & ".join(map(latex, row)) + r" \\" for row in texts),
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
        ("×", r"$\times$"), ("’", "'"), ("√", r"$\sqrt{}$"),
    ):  # fmt: skip
        text = text.replace(plain, escaped)
    return text
