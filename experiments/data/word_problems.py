"""The common part of the sources of grade-school word problems: prompts and files.

GSM8K's and MetaMathQA's files are not part of any package. They come from a folder of the user or
from the Hugging Face hub. The error for a missing file says where to get it, and which setting
gives its folder.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..config.bounds import check_number, check_path
from ..config.inputs import DataConfig
from ..errors import ConfigurationError
from . import json_lines

METAMATH_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{query}\n\n### Response: Let's think step by step."
)
"""MetaMath's official prompt for evaluation (Yu et al. 2023, arXiv 2309.12284)."""


@dataclass
class WordProblems(DataConfig):
    """The settings of these sources.

    Attributes:
        path: the folder with the files; None asks the hub.
        prompt: the text before the solution, with {query} in the place of the question.
        gap: the text between prompt and solution.
        marker: the text of a solution before its number.
    """

    path: str | None = None
    prompt: str = METAMATH_PROMPT
    gap: str = " "
    marker: str = "The answer is:"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path("data.path", self.path, null="the Hugging Face hub")
        if "{query}" not in self.prompt:
            raise ValueError(
                f"data.prompt={self.prompt!r} has no place for the question; write {{query}} there"
            )
        share = getattr(self, "validation_share", 0.0)
        check_number("data.validation_share", share, least=0, below=1)

    def prompted(self, question: str) -> str:
        return self.prompt.replace("{query}", question)


@dataclass(frozen=True)
class Source:
    """A file of a public data set.

    Attributes:
        names: the names that the file may have; the first is the official one.
        address: where a user gets it.
        repository, file: its place on the hub.
    """

    names: tuple[str, ...]
    address: str
    repository: str
    file: str


def located(source: Source, folder: str | None, data: str) -> Path:
    """The file in `folder`, or from the hub if no folder is given.

    Raises:
        ConfigurationError: it is not there.
    """
    official = source.names[0]
    if folder is not None:
        place = Path(folder).expanduser()
        for name in source.names:
            if (place / name).is_file():
                return place / name
        state = "has no such file" if place.is_dir() else "no such folder"
        raise ConfigurationError(
            f"data={data} needs the file {' or '.join(source.names)}, and data.path={folder!r}: "
            f"{state} (looked in {place.resolve()}); get it from {source.address} and put it there"
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source.repository, source.file, repo_type="dataset"))
    except Exception as error:  # of many types: no network, no permission, …
        raise ConfigurationError(
            f"data={data} needs the file {official}: the hub did not give {source.file} of "
            f"{source.repository} ({type(error).__name__}); get it from {source.address} and "
            "set data.path to the folder it is in"
        ) from error


def read_rows(path: Path, fields: Iterable[str]) -> list[dict[str, Any]]:
    """The objects of a JSON list, JSON lines or Parquet file, each with all `fields` as text.

    Raises:
        ConfigurationError: another format, with the file and the row.
    """
    try:
        if path.suffix == ".parquet":
            rows = pd.read_parquet(path).to_dict("records")
        elif path.suffix == ".json":
            rows = json_lines.parse(path.read_bytes())
        else:
            rows = [row for _, row in json_lines.read_lines(path)]
    except (ValueError, OSError) as error:
        raise ConfigurationError(
            f"{path}: not readable as {path.suffix.lstrip('.')}: {error}; get the file again"
        ) from error
    if not isinstance(rows, list) or not rows:
        raise ConfigurationError(f"{path}: expected a list of examples; get the file again")
    for number, row in enumerate(rows, start=1):
        missing = [
            field
            for field in fields
            if not isinstance(row, dict) or not isinstance(row.get(field), str)
        ]
        if missing:
            raise ConfigurationError(
                f"{path}: row {number} has no text {', '.join(missing)}; each row needs "
                f"{', '.join(fields)}"
            )
    return rows


def hash_of(paths: Iterable[Path]) -> str:
    """A hash of the files' contents."""
    digest = hashlib.sha256()
    for path in paths:
        facts = path.stat()
        digest.update(hash_of_file(path, facts.st_size, facts.st_mtime_ns))
    return digest.hexdigest()


@functools.lru_cache(maxsize=16)
def hash_of_file(path: Path, size: int, changed: int) -> bytes:
    """The hash of a file; cached per process while its size and its time of change are equal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
