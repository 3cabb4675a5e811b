"""Calibration batches from a file of texts: .jsonl, .csv or .txt."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ENDINGS = (".jsonl", ".csv", ".txt")
IGNORED = -100
"""The label of a position that has no loss."""


def batches(
    path: Path,
    tokenizer: Any,
    *,
    text_column: str,
    label_column: str,
    label_ids: Mapping[str, int] | None,
    language_model: bool,
    examples: int,
    batch_size: int,
    max_length: int,
) -> list[dict[str, Tensor]]:
    """Tokenized batches from the first rows of a file.

    Labels are the class of each row for a classifier, and the tokens themselves, without padding,
    for a language model. Other models get none.

    Args:
        path: the file. Rows of .jsonl have a text, or chat `messages`.
        tokenizer: the tokenizer of the model.
        text_column, label_column: the names of the columns.
        label_ids: the number of each class of a classifier; None for other models.
        language_model: whether the tokens are the labels.
        examples: how many rows to read.
        batch_size: rows in a batch.
        max_length: tokens of a row; longer rows are cut.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has another format, lacks a column, or has no rows.
    """
    rows = list(_limited(_rows(path), examples))
    if not rows:
        raise ValueError(f"--data {str(path)!r} contains no rows: must contain one text per row")
    texts = [_text(row, number, path, text_column, tokenizer) for number, row in enumerate(rows, 1)]
    classes = None
    if label_ids is not None:
        classes = [
            _class(row, number, path, label_column, label_ids) for number, row in enumerate(rows, 1)
        ]
    found = []
    for start in range(0, len(texts), batch_size):
        part = slice(start, start + batch_size)
        batch = dict(
            tokenizer(
                texts[part],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=max_length,
            )
        )
        if classes is not None:
            batch["labels"] = torch.tensor(classes[part])
        elif language_model:
            mask = batch["attention_mask"].bool()
            batch["labels"] = batch["input_ids"].masked_fill(~mask, IGNORED)
        found.append(batch)
    return found


def _limited(rows: Iterator[Any], count: int) -> Iterator[Any]:
    for _, row in zip(range(count), rows, strict=False):
        yield row


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"--data {str(path)!r}: no such file")
    if path.suffix not in ENDINGS:
        raise ValueError(
            f"--data {str(path)!r} is not supported: must end with one of {', '.join(ENDINGS)}"
        )
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            yield from csv.DictReader(file)
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if path.suffix == ".txt":
                yield {"text": line.rstrip("\n")}
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"--data {str(path)!r}, line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"--data {str(path)!r}, line {number} is {type(row).__name__}: must be a JSON "
                    "object with a text"
                )
            yield row


def _text(row: dict[str, Any], number: int, path: Path, column: str, tokenizer: Any) -> str:
    if "messages" in row and column not in row:
        return tokenizer.apply_chat_template(row["messages"], tokenize=False)
    if path.suffix == ".txt":
        column = "text"
    text = row.get(column)
    if not isinstance(text, str) or not text:
        raise ValueError(
            f"--data {str(path)!r}, row {number}: --text-column {column!r} is {text!r}; the "
            f"columns are {', '.join(map(str, row))}. Pass the name of the column with the text."
        )
    return text


def _class(
    row: dict[str, Any], number: int, path: Path, column: str, ids: Mapping[str, int]
) -> int:
    value = row.get(column)
    if str(value) in ids:
        return ids[str(value)]
    try:
        found = int(str(value))
    except ValueError:
        found = -1
    if found not in ids.values():
        raise ValueError(
            f"--data {str(path)!r}, row {number}: --label-column {column!r} is {value!r}: must be "
            f"one of {', '.join(map(str, ids))}, or its number"
        )
    return found
