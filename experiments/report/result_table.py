"""The results table for a terminal, in Markdown and in LaTeX: the same rows, the same columns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from rich import box
from rich.table import Table

from .findings import mantissa, signed
from .palette import BASELINE
from .summary import Row

LONG_NAME = 16  # characters that leave room for every column


@dataclass(frozen=True)
class Column:
    """`show` gives the cell's text, `value` what a sort compares."""

    header: str
    show: Callable[[Row], str]
    value: Callable[[Row], float | str | None]
    help: str = ""
    brief: Callable[[Row], str] | None = None  # for a terminal of 80 columns, if `show` is long


def score_cell(row: Row) -> str:
    text = f"{100 * row.score.estimate:.1f}"
    return text if math.isnan(row.score.low) else f"{text} ± {100 * row.score.half_width:.1f}"


def difference_cell(row: Row) -> str:
    if row.difference is None:
        return row.verdict
    if math.isnan(row.difference.low):
        return signed(100 * row.difference.estimate)
    text = f"{signed(100 * row.difference.estimate)} ± {100 * row.difference.half_width:.1f}"
    return f"{text} (tie)" if row.verdict == "tie" else text


def verdict_cell(row: Row) -> str:
    if row.difference is None:
        return row.verdict
    text = signed(100 * row.difference.estimate)
    return f"{text} tie" if row.verdict == "tie" else text


def scientific(value: float | None) -> str:
    if value is None:
        return "—"
    return "0" if value == 0 else f"{value:.1e}"


def seconds(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def count(value: float | None) -> str:
    return "—" if value is None else f"{value:,.0f}"


def significant(value: float | None) -> str:
    return "—" if value is None else f"{value:.3g}"


def rate_cell(row: Row) -> str:
    return mantissa(row.choice.learning_rate) + ("*" if row.choice.at_edge else "")


def columns(metric: str, rows: list[Row]) -> list[Column]:
    """The columns that `rows` have something for."""
    made = [
        Column("method", lambda r: r.arm, lambda r: r.arm),
        Column(
            f"{metric}, %", score_cell, lambda r: r.score.estimate,
            "mean over seeds ± half of its 95 % interval",
        ),
        Column(
            f"against {BASELINE}", difference_cell,
            lambda r: r.difference.estimate if r.difference else None,
            "paired difference in points ± half of its 95 % interval; a tie if that contains zero",
            brief=verdict_cell,
        ),
    ]  # fmt: skip
    if any(row.choice.rates > 1 for row in rows):
        made.append(Column(
            "learning rate", rate_cell, lambda r: r.choice.learning_rate,
            "the chosen one; *: the lowest or highest that was tried",
        ))  # fmt: skip
    made += [
        Column(
            "output gap", lambda r: scientific(r.get("output_gap")), lambda r: r.get("output_gap"),
            "largest change of a logit by the initialization, at step 0, over seeds",
        ),
        Column("init s", lambda r: seconds(r.get("init_seconds")), lambda r: r.get("init_seconds"),
               "seconds to initialize, calibration included: mean over seeds, or of the run that "
               "computed what the method's others found in the cache"),
        Column("trainable", lambda r: count(r.get("trainable_parameters")),
               lambda r: r.get("trainable_parameters"), "trainable parameters"),
        Column("first grad", lambda r: significant(r.get("first_step_gradient_norm")),
               lambda r: r.get("first_step_gradient_norm"),
               "gradient norm at the first step, mean over seeds"),
        Column("update", lambda r: significant(r.get("update_size")),
               lambda r: r.get("update_size"),
               "‖ΔW‖ / ‖W‖ over all adapted layers after training, mean over seeds"),
        Column("forgetting", lambda r: significant(r.get("forgetting")),
               lambda r: r.get("forgetting"),
               "forgetting against the original base model, mean over seeds"),
    ]  # fmt: skip
    optional = {"update", "forgetting"}
    return [
        column for column in made
        if column.header not in optional or any(column.value(row) is not None for row in rows)
    ]  # fmt: skip


def terminal_table(rows: list[Row], metric: str, title: str) -> Table:
    """At most 80 columns wide for methods at one setting."""
    left_out = {"update", "forgetting"}
    if any(row.choice.rates > 1 for row in rows):
        left_out |= {"output gap", "first grad"}  # the learning rate takes their place
    if max(len(row.arm) for row in rows) > LONG_NAME:
        left_out |= {"trainable"}
    shown = [column for column in columns(metric, rows) if column.header not in left_out]
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, column in enumerate(shown):
        header = column.header.replace(" ", "\n", 1)
        table.add_column(header, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        cells = [(column.brief or column.show)(row) for column in shown]
        table.add_row(*cells, style="bold" if row.is_baseline else None)
    return table


def markdown_table(rows: list[Row], metric: str, heading: str, notes: list[str]) -> str:
    shown = columns(metric, rows)
    lines = [f"**{heading}**", ""]
    lines.append("| " + " | ".join(column.header for column in shown) + " |")
    lines.append("|" + "|".join("---" if i == 0 else "---:" for i in range(len(shown))) + "|")
    for row in rows:
        lines.append("| " + " | ".join(c.show(row).replace("|", "\\|") for c in shown) + " |")
    lines += ["", *(f"- {column.header}: {column.help}" for column in shown if column.help)]
    lines += [f"- {note}" for note in notes]
    return "\n".join(lines) + "\n"


def latex_table(rows: list[Row], metric: str, heading: str, notes: list[str]) -> str:
    """A `booktabs` table; needs `\\usepackage{booktabs}` and nothing else."""
    shown = columns(metric, rows)
    body = [" & ".join(latex(column.show(row)) for column in shown) + r" \\" for row in rows]
    return "\n".join(
        [
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
            "",
        ]
    )


def latex(text: str) -> str:
    """Escape what LaTeX would read as a command; set ± and powers of ten as mathematics."""
    mantissa, mark, exponent = text.partition("e")
    if mark and _is_number(text):
        return rf"${mantissa} \times 10^{{{int(exponent)}}}$"
    for plain, escaped in (
        ("\\", r"\textbackslash{}"), ("&", r"\&"), ("%", r"\%"), ("$", r"\$"), ("#", r"\#"),
        ("_", r"\_"), ("±", r"$\pm$"), ("−", "$-$"), ("—", "--"), ("·", r"$\cdot$"),
    ):  # fmt: skip
        text = text.replace(plain, escaped)
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
