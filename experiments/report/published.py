"""What a report's page holds: the runs and the verdicts of a published sweep, read back.

A page keeps the figures of its runs and the verdicts on them, but not the predictions.
"""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .judgement import EXAMPLES_TOO, SEEDS_ALONE, Judgement
from .palette import BASELINE
from .quantities import QUANTITIES, SCORE

DATA = re.compile(r'<script type="application/json" id="report-data">(.*?)</script>', re.DOTALL)
FACT = re.compile(r"<dt>(.*?)</dt>\s*<dd>(.*?)</dd>", re.DOTALL)


@dataclass(frozen=True)
class PublishedSweep:
    """One sweep with one task, at each arm's chosen setting.

    Attributes:
        facts: the head of the page: model, data, training and others.
        rates: each arm's chosen learning rate.
        at_edge: arms whose rate was the lowest or the highest that was tried.
        judgements: of every quantity that the page has.
    """

    facts: dict[str, str]
    rates: dict[str, float]
    at_edge: set[str]
    judgements: list[Judgement]

    @property
    def metric(self) -> str:
        """The name of the score."""
        return self.facts.get("Score", "score")


def read_page(path: Path) -> PublishedSweep:
    """Read a page back.

    Raises:
        ValueError: the file is not a page of the report, has no verdicts, or has several tasks.
    """
    text = path.read_text(encoding="utf-8")
    found = DATA.search(text)
    if found is None:
        raise ValueError(f"page={path} is not supported: must be a page of experiments.report")
    tables = json.loads(found[1])["tables"]
    if not tables.get("verdicts"):
        raise ValueError(f"page={path} is not supported: must have verdicts. Draw it again.")
    runs = as_frame(tables["runs"])
    if runs["task"].nunique() > 1:
        raise ValueError(f"page={path} is not supported: must have one task")
    chosen = runs[runs["best"].astype(bool) & runs["score"].notna()]
    chosen = chosen.drop_duplicates(["arm", "seed"])
    rates = chosen.groupby("arm", sort=False)["learning_rate"].first().to_dict()
    tried = runs.groupby("arm")["learning_rate"].agg(["min", "max"])
    edge = {arm for arm, rate in rates.items() if rate in tuple(tried.loc[arm])}
    facts = {label: html.unescape(value).strip() for label, value in FACT.findall(text)}
    return PublishedSweep(facts, rates, edge, stored(as_frame(tables["verdicts"])))


def as_frame(table: dict[str, Any]) -> pd.DataFrame:
    """A table that a page stores by column, with each repeated text once."""
    return pd.DataFrame({
        name: column if isinstance(column, list)
        else [column["texts"][code] if code >= 0 else None for code in column["codes"]]
        for name, column in table.items()
    })  # fmt: skip


def stored(verdicts: pd.DataFrame) -> list[Judgement]:
    """The verdicts that a page has. Their p-values are not on the page."""
    quantities = {quantity.name: quantity for quantity in QUANTITIES}
    made = []
    for row in verdicts.itertuples():
        quantity = quantities[row.quantity]
        value, low, high = (float(x) / quantity.scale for x in (row.value, row.low, row.high))
        made.append(Judgement(
            quantity, row.task, row.arm, BASELINE, value, low, high, np.nan, row.verdict,
            bool(row.factor), EXAMPLES_TOO if quantity == SCORE else SEEDS_ALONE, quantity.margin,
        ))  # fmt: skip
    return made
