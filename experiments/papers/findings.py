"""What a reproduction hands over: claims, tables, figures, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from experiments.papers.claim import Claim


@dataclass(frozen=True)
class Table:
    """Rows worth reading.

    Attributes:
        name: of its files.
        title: what the rows are, with the unit.
        frame: the rows; text columns come first.
        formats: by column, how a number is written (`".2f"`); others get three digits.
        note: what a reader must know to read it, such as the paper's own row.
    """

    name: str
    title: str
    frame: pd.DataFrame
    formats: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A chart with its words.

    Attributes:
        name: of its files.
        drawing: an Altair chart of any kind, its data inside, without a title of its own.
        width: of the files, in pixels; None where the drawing has widths of its own (facets, rows
            of panels), which the page then leaves alone, too.
    """

    name: str
    title: str
    caption: str
    drawing: Any
    width: int | None = 640


@dataclass(frozen=True)
class Findings:
    """Everything that a reproduction found.

    Attributes:
        claims: in the order of the paper, each with a verdict.
        setting: what was measured on, as label and words: model with size and origin, data, ranks,
            seeds, and what the paper had.
        discussion: a few sentences: what the figures say, and what they do not.
    """

    claims: list[Claim]
    setting: dict[str, str]
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    discussion: list[str] = field(default_factory=list)
