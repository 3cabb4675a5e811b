"""What a data source hands over: examples of one kind, in three disjoint splits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from experiments.config.bounds import check_integer, check_label, check_number, refusal
from experiments.data.judges import Judge, says_exactly


@dataclass
class DataConfig:
    """What every data source has.

    Attributes:
        name: the label in results and folder names.
        train_limit, validation_limit, test_limit: at most so many examples of each split; None
            takes all. Which ones are taken does not depend on any seed.
    """

    name: str = "data"
    train_limit: int | None = None
    validation_limit: int | None = None
    test_limit: int | None = None

    def __post_init__(self) -> None:
        check_label("data.name", self.name)
        for split, least in (("train", 1), ("validation", 0), ("test", 1)):
            limit = getattr(self, f"{split}_limit")
            check_integer(f"data.{split}_limit", limit, least, null="all examples")


def check_shares(validation: float, test: float) -> None:
    """Refuse shares of one source that leave a split without examples.

    Raises:
        ConfigurationError: a share out of range, or nothing left to train on.
    """
    check_number("data.validation_share", validation, least=0, below=1)
    check_number("data.test_share", test, above=0, below=1)
    if validation + test >= 1:
        raise refusal(
            "data.validation_share",
            validation,
            f"less than 1 together with data.test_share={test}",
            "The rest is the training split",
        )


@dataclass(frozen=True)
class Labelled:
    """A text and its class; `id` is the row in the source, the key that pairs runs."""

    id: int
    text: str
    label: int


@dataclass(frozen=True)
class Completion:
    """A prompt and what should follow: `reasoning + answer` is learnt, `answer` is scored."""

    id: int
    prompt: str
    answer: str
    reasoning: str = ""


Example = Labelled | Completion


@dataclass(frozen=True)
class Splits:
    """Three disjoint lists of examples of one kind.

    Attributes:
        labels: the names of the classes, by number; empty for completions.
        fingerprint: a hash of the contents, so that a result says which data it comes from.
        notes: facts a reader of a result should know.
        judge: when a generated completion is right.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    judge: Judge = says_exactly

    @property
    def task_type(self) -> str:
        """PEFT's name for the task: sequence classification or causal language modelling."""
        return "SEQ_CLS" if isinstance(self.train[0], Labelled) else "CAUSAL_LM"

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            digest.update(repr(list(split)).encode())
        return digest.hexdigest()[:16]


def bucket(key: str, salt: str = "") -> float:
    """A number in [0, 1) that depends on `key` alone: splits by it need no seed and never move."""
    digest = hashlib.sha256(f"{salt}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(key: str, validation: float, test: float) -> str:
    """Send a key to "test", "validation" or "train", in the given expected shares."""
    where = bucket(key, "split")
    if where < test:
        return "test"
    return "validation" if where < test + validation else "train"


T = TypeVar("T", bound=Example)


def take(examples: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` examples, spread over the source, in the same order whatever the limit."""
    ordered = sorted(examples, key=lambda example: bucket(str(example.id), "limit"))
    return ordered if limit is None else ordered[:limit]
