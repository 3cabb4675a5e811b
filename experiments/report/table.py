"""One table as text: for a terminal, in Markdown and in LaTeX."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table as RichTable

ESCAPED = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "±": r"$\pm$", "−": "$-$", "—": "--", "·": r"$\cdot$", "×": r"$\times$", "’": "'",
    "√": r"$\sqrt{}$",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Headings and cells.

    Attributes:
        rows: the cells of each row. The first one names the row.
        notes: lines below the table.
        strong: numbers of the rows in bold.
        align: Markdown's rule of all columns but the first.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    strong: Collection[int] = ()
    align: str = "---:"

    def terminal(self, close: bool = False) -> RichTable:
        """The table for a terminal. Headings break at spaces; `close` makes columns narrower."""
        table = RichTable(
            title=self.title, title_justify="left", title_style="bold",
            box=None if close else box.SIMPLE_HEAD, padding=(0, 1, 0, 0) if close else (0, 1),
        )  # fmt: skip
        for index, header in enumerate(self.headers):
            justify = "right" if index else "left"
            table.add_column(header.replace(" ", "\n"), justify=justify, no_wrap=True)
        for index, row in enumerate(self.rows):
            table.add_row(*row, style="bold" if index in self.strong else None)
        return table

    def markdown(self) -> str:
        cells = [[cell.replace("|", "\\|") for cell in row] for row in self.rows]
        rules = ["---"] + [self.align] * (len(self.headers) - 1)
        lines = [f"| {' | '.join(row)} |" for row in (self.headers, rules, *cells)]
        notes = ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join([f"**{self.title}**", "", *lines, *notes]) + "\n"

    def latex(self) -> str:
        """The table without its notes. It needs only `\\usepackage{booktabs}`."""
        head, *body = (" & ".join(map(latex, row)) + r" \\" for row in (self.headers, *self.rows))
        lines = [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{latex(self.title[0].upper() + self.title[1:])}.}}",
            rf"  \begin{{tabular}}{{l{'r' * (len(self.headers) - 1)}}}",
            r"    \toprule",
            f"    {head}",
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
    return "".join(ESCAPED.get(character, character) for character in text)
