"""Everything that a report shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd

from .canvas import Canvas, Chart
from .comparison import Comparison
from .matrix import Matrix
from .matrix_table import verdict_table
from .power import Power
from .power_table import power_tables
from .result_table import results
from .runs import Problem
from .specification import page_specification
from .summary import Row, Summarizer
from .sweeps import Sweep
from .table import Table
from .views import Views


@dataclass(frozen=True)
class Report:
    """What was read, what follows from it, and where it is written.

    Attributes:
        folder: of the page, the pictures and the tables.
        headline: what differs, what does not, and what could not be seen.
        metric: the name of the score.
        rows: the rows of the chosen settings, one task after the other.
        matrix: every quantity of every arm, compared with the baseline.
        equal_rows, equal_matrix: the same at equal update size; empty if no protocol compared this.
        runs: every run.
        reused: the number of unchanged runs, which were not read again.
        comparison: with another sweep, if one was given.
        peft: PEFT's own results, if they were given.
        figures: by name, the path of each chart's PNG, and of the page under "page".
    """

    folder: Path
    sweep: Sweep
    headline: tuple[str, str, str]
    metric: str
    rows: list[Row]
    matrix: Matrix
    powers: list[Power]
    equal_rows: list[Row]
    equal_matrix: Matrix
    runs: pd.DataFrame
    charts: list[Chart]
    canvas: Canvas
    views: Views
    problems: list[Problem]
    warnings: list[str]
    summarizer: Summarizer
    reused: int
    comparison: Comparison | None = None
    peft: Table | None = None
    figures: dict[str, Path] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.sweep.name

    @property
    def page(self) -> Path:
        return self.folder / "index.html"

    @cached_property
    def specifications(self) -> dict[str, dict]:
        """The charts as JSON, which both pages share."""
        return {chart.name: page_specification(chart.drawing) for chart in self.charts}

    @cached_property
    def power_tables(self) -> list[Table]:
        """What the sweep resolves, and what more of it would."""
        return power_tables(self.powers, self.metric)

    def tables(self, narrow: bool = False) -> list[Table]:
        """The verdicts, if anything is compared, and the results. `narrow`: for a terminal."""
        compared = verdict_table(self.rows, self.matrix, self.metric, brief=narrow)
        return [
            *([compared] if compared else []),
            results(self.rows, self.metric, self.name if narrow else "Results", narrow),
        ]

    def equal_tables(self) -> list[Table]:
        """The same at equal update size."""
        compared = verdict_table(self.equal_rows, self.equal_matrix, self.metric)
        found = results(self.equal_rows, self.metric, "At equal update size")
        return [*([compared] if compared else []), found]
