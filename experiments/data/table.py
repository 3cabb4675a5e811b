"""The user's own table: JSONL, CSV or TSV with named columns.

Two columns make the task: `text` and `label` for classification, `prompt` and `completion` for
language modeling. One file is split by a hash of each row's text, or of `group_column`, which keeps
all rows of one author or film together. Separate files for validation and test are not split.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from omegaconf import MISSING

from ..config.bounds import check_number, check_path
from ..config.inputs import DataConfig
from ..errors import ConfigurationError, nearest
from . import json_lines
from .examples import Completion, Example, Labelled
from .splits import Splits, split_of, take

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv"}


def read_jsonl(path: Path) -> pd.DataFrame:
    """One object per line. pandas' own reader would guess types and dates."""
    rows = []
    for number, row in json_lines.read_lines(path):
        if not isinstance(row, dict):
            raise ValueError(f"line {number} holds a {type(row).__name__}, not an object")
        rows.append(row)
    return pd.DataFrame(rows, dtype=object)


def read_separated(path: Path, separator: str) -> pd.DataFrame:
    """A CSV or TSV file as strings; a field in quotes may hold line ends."""
    # header=None: pandas then refuses rows with more fields than the first.
    table = pd.read_csv(
        path, dtype=str, keep_default_na=False, sep=separator, encoding="utf-8-sig", header=None
    )
    names = table.iloc[0].tolist()
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the header names the column {name!r} more than once")
    return table.iloc[1:].set_axis(names, axis=1).reset_index(drop=True)


READERS = {
    "jsonl": read_jsonl,
    "csv": lambda path: read_separated(path, ","),
    "tsv": lambda path: read_separated(path, "\t"),
}


@dataclass
class Table(DataConfig):
    """Where the table is, and the names of its columns.

    Attributes:
        path: the file with the training rows, or with all rows.
        validation_path, test_path: separate files; without them, shares of `path` are held out.
        text_column, label_column: set both for classification.
        prompt_column, completion_column: set both for language modeling.
        group_column: rows with the same value are in the same split.
    """

    name: str = "table"
    path: str = MISSING
    validation_path: str | None = None
    test_path: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    group_column: str | None = None
    validation_share: float = 0.1
    test_share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path("data.path", self.path)
        for split in ("validation", "test"):
            path = getattr(self, f"{split}_path")
            check_path(f"data.{split}_path", path, null="a share of data.path")
            share = getattr(self, f"{split}_share")
            check_number(f"data.{split}_share", share, above=0, below=1)

    def contents(self) -> str:
        """A hash of the files: a changed table under the same path is another run."""
        digest = hashlib.sha256()
        for path in filter(None, (self.path, self.validation_path, self.test_path)):
            digest.update(existing(path, "data.path").read_bytes())
        return digest.hexdigest()


def load(config: Table) -> Splits:
    """Read the files, hold out the splits without a file, and check that each split has rows."""
    source, target = columns(config)
    frames = {"train": read(config, "path")}
    for split in ("validation", "test"):
        if getattr(config, f"{split}_path"):
            frames[split] = read(config, f"{split}_path")
    separate("validation", config, frames, source)
    separate("test", config, frames, source)

    classify = config.text_column is not None
    labels = tuple(sorted(set(frames["train"][target]))) if classify else ()
    if classify and len(labels) < 2:
        raise ConfigurationError(
            f"data.label_column={target!r}: the training rows of {config.path} have "
            f"{len(labels)} distinct label(s) {list(labels)}; classification needs two or more"
        )
    if len(labels) > max(2, len(frames["train"]) // 2):
        raise ConfigurationError(
            f"data.label_column={target!r}: {len(labels)} different values in "
            f"{len(frames['train'])} training rows of {config.path}; must be a column of classes, "
            "with two rows or more for each. Give the name of another column."
        )

    def examples(split: str, limit: int | None) -> list[Example]:
        rows = frames[split]
        offset = {"train": 0, "validation": 1_000_000_000, "test": 2_000_000_000}[split]
        own_file = split != "train" and getattr(config, f"{split}_path")
        made: list[Example] = []
        for row, given, wanted in zip(rows.index, rows[source], rows[target], strict=True):
            number = int(row) + (offset if own_file else 0)  # unique over files
            if not classify:
                made.append(Completion(number, given, " " + wanted.strip()))
            elif wanted in labels:
                made.append(Labelled(number, given, labels.index(wanted)))
            else:
                raise ConfigurationError(
                    f"data.label_column={target!r}: the {split} rows hold the label {wanted!r}, "
                    f"which no training row has; known labels are {', '.join(labels)}"
                )
        return take(made, limit)

    limits = (config.train_limit, config.validation_limit, config.test_limit)
    names = ("train", "validation", "test")
    return Splits(
        *(examples(split, limit) for split, limit in zip(names, limits, strict=True)), labels=labels
    )


def columns(config: Table) -> tuple[str, str]:
    """The names of the two columns that make the task."""
    pairs = [
        (config.text_column, config.label_column),
        (config.prompt_column, config.completion_column),
    ]
    complete = [pair for pair in pairs if all(pair)]
    if len(complete) != 1 or sum(map(bool, pairs[0] + pairs[1])) != 2:
        raise ConfigurationError(
            f"data=table: text_column={config.text_column!r}, "
            f"label_column={config.label_column!r}, prompt_column={config.prompt_column!r}, "
            f"completion_column={config.completion_column!r}; set either data.text_column and "
            "data.label_column (classification), or data.prompt_column and data.completion_column "
            "(language modeling)"
        )
    return complete[0]


def existing(path: str, setting: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigurationError(
            f"{setting}={path!r}: no such file (looked at {file.resolve()}); give the path of a "
            ".jsonl, .csv or .tsv file"
        )
    return file


def read(config: Table, field: str) -> pd.DataFrame:
    """One file as strings, after a check of its columns and for empty cells."""
    path = existing(getattr(config, field), f"data.{field}")
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise ConfigurationError(
            f"data.{field}={str(path)!r} is not supported: must be a file ending in one of "
            f"{', '.join(SUFFIXES)}. Rename or convert it."
        )
    try:
        table = READERS[kind](path)
    except (ValueError, UnicodeDecodeError) as error:  # pandas' parser errors are ValueErrors
        raise ConfigurationError(
            f"data.{field}={str(path)!r}: not readable as {kind}: {error}; check the file's format"
        ) from error
    for setting in ("text", "label", "prompt", "completion", "group"):
        column = getattr(config, f"{setting}_column")
        if column is None:
            continue
        if column not in table.columns:
            raise ConfigurationError(
                f"data.{setting}_column={column!r}: {path} has no such column; "
                f"{nearest(column, map(str, table.columns))}it has "
                f"{', '.join(map(str, table.columns)) or 'none'}"
            )
        blank = table[column].isna() | (table[column].astype(str).str.strip() == "")
        if blank.any():
            raise ConfigurationError(
                f"data.{setting}_column={column!r}: {int(blank.sum())} row(s) of {path} are empty, "
                f"the first is row {int(blank.idxmax()) + 1}; fill or remove them"
            )
        table[column] = table[column].astype(str)
    if table.empty:
        raise ConfigurationError(f"data.{field}={str(path)!r}: the file has no rows")
    return table


def separate(split: str, config: Table, frames: dict[str, pd.DataFrame], source: str) -> None:
    """Move the split's share out of the training rows, unless the split has a file."""
    if split in frames:
        return
    rows = frames["train"]
    keys = rows[config.group_column or source]
    share = {"validation": 0.0, "test": 0.0, split: getattr(config, f"{split}_share")}
    chosen = keys.map(lambda key: split_of(f"{split} {key}", **share)) == split
    frames[split], frames["train"] = rows[chosen], rows[~chosen]
    if frames[split].empty or frames["train"].empty:
        raise ConfigurationError(
            f"data.{split}_share={getattr(config, f'{split}_share')}: of {len(rows)} rows in "
            f"{config.path} this leaves {len(frames['train'])} for training and "
            f"{len(frames[split])} for the {split}; give more rows, another share, or "
            f"data.{split}_path"
        )
