"""The three disjoint splits that a data source returns, and how rows are assigned to them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..config.bounds import check_number, refusal
from .examples import Example, Judge, Labelled
from .judges import says_exactly


@dataclass(frozen=True)
class Splits:
    """Three disjoint lists of examples of one kind.

    Attributes:
        labels: the names of the classes, by number; empty for completions.
        notes: facts that a reader of a result should know.
        judge: decides whether a generated completion is right.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    judge: Judge = says_exactly

    @property
    def task_type(self) -> str:
        """PEFT's name for the task: sequence classification or causal language modeling."""
        return "SEQ_CLS" if isinstance(self.train[0], Labelled) else "CAUSAL_LM"

    @property
    def fingerprint(self) -> str:
        """A hash of the contents, which each result records."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            digest.update(repr(list(split)).encode())
        return digest.hexdigest()[:16]


def check_shares(validation: float, test: float) -> None:
    """Refuse shares of one source that leave a split without examples.

    Raises:
        ConfigurationError: a share is out of range, or nothing is left to train on.
    """
    check_number("data.validation_share", validation, least=0, below=1)
    check_number("data.test_share", test, above=0, below=1)
    if validation + test >= 1:
        must_be = f"less than 1 together with data.test_share={test}"
        raise refusal("data.validation_share", validation, must_be, "The rest is for training")


def bucket(key: str, salt: str = "") -> float:
    """A number in [0, 1) that depends on `key` alone: splits by it need no seed."""
    digest = hashlib.sha256(f"{salt}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(key: str, validation: float, test: float) -> str:
    """Assign a key to "test", "validation" or "train", in the given expected shares."""
    where = bucket(key, "split")
    if where < test:
        return "test"
    return "validation" if where < test + validation else "train"


T = TypeVar("T", bound=Example)


def take(examples: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` examples, spread over the source, in the same order for every limit."""
    ordered = sorted(examples, key=lambda example: bucket(str(example.id), "limit"))
    return ordered if limit is None else ordered[:limit]
