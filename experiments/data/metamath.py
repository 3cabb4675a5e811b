"""MetaMathQA: 395,000 solved problems made from GSM8K's and MATH's training questions.

The file MetaMathQA-395K.json of meta-math/MetaMathQA on the hub (MIT license): a list of
{"query": …, "response": "… The answer is: 42", "type": …, "original_question": …}. The test set is
GSM8K's. Papers train on the first 100,000 rows or on all.

Validation questions are held out of the training file. On average 26 rows come from one original
question, so rows are split by their original. Some rows ask backwards, with an x for one of the
original's numbers: originals that differ only in numbers or in such an x count as one
(`template_of`). "The first 100,000" are the first rows that are not held out.

Source: Yu et al., "MetaMath", 2023, arXiv 2309.12284.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..config.bounds import check_integer
from ..errors import ConfigurationError
from . import gsm8k
from .examples import Completion
from .judges import says_the_number
from .splits import Splits, bucket, take
from .word_problems import (
    Source,
    WordProblems,
    hash_of,
    located,
    read_rows,
)

TRAIN = Source(
    ("MetaMathQA-395K.json",),
    "huggingface.co/datasets/meta-math/MetaMathQA",
    "meta-math/MetaMathQA",
    "MetaMathQA-395K.json",
)
FIELDS = ("query", "response", "type", "original_question")
FORWARD = ("GSM_AnsAug", "GSM_Rephrased")
"""Types of rows that ask what GSM8K asks; the others are from MATH, or ask backwards."""
ANSWER = "The answer is:"
UNKNOWN = re.compile(r"\$?\d[\d,.]*\d|\$?\d|\b[xX]\b")


@dataclass
class MetaMath(WordProblems):
    """Settings of the file; those of all sources of word problems are in `WordProblems`.

    Attributes:
        train_limit: how many rows to take, from the first on; None takes all.
        validation_share: the share of the original questions.
        max_characters: leave out rows whose question and answer are longer; None keeps all.
    """

    name: str = "metamath"
    train_limit: int | None = 100_000
    validation_limit: int | None = 128
    validation_share: float = 0.02
    max_characters: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("data.max_characters", self.max_characters, 1, null="all rows")

    def files(self) -> list[Path]:
        return [located(source, self.path, self.name) for source in (TRAIN, gsm8k.TEST)]

    def contents(self) -> str:
        return hash_of(self.files())


def load(config: MetaMath) -> Splits:
    """Train on the file, validate on other originals, and test on GSM8K's test set."""
    path, _ = config.files()
    training: list[Completion] = []
    held_out: dict[str, Completion] = {}
    for number, row in enumerate(read_rows(path, FIELDS)):
        template = template_of(row["original_question"])
        if bucket(template, "validation") < config.validation_share:
            # One question per original: paraphrases are not independent.
            if row["type"] in FORWARD and template not in held_out:
                held_out[template] = complete(row, number, config)
        elif config.train_limit is None or len(training) < config.train_limit:
            length = len(row["query"]) + 1 + len(row["response"])
            if config.max_characters is None or length <= config.max_characters:
                training.append(complete(row, number, config))
    if not training:
        raise ConfigurationError(
            f"{path}: no row is left to train on with data.validation_share="
            f"{config.validation_share} and data.max_characters={config.max_characters}; lower "
            "the first or raise the second"
        )
    return Splits(
        training,
        take(list(held_out.values()), config.validation_limit),
        gsm8k.test_set(config, first=1_000_000),
        notes=(
            "train and validation share no original question; tested on GSM8K's test set",
            "scored by the number of a generated solution (experiments/data/answers.py)",
        ),
        judge=says_the_number,
    )


def template_of(question: str) -> str:
    """A question without its numbers, and without the x that stands for one."""
    return " ".join(UNKNOWN.sub("#", question).lower().split())


def complete(row: Mapping[str, str], number: int, config: MetaMath) -> Completion:
    """One row as prompt, reasoning up to the answer's marker, and answer."""
    reasoning, marker, answer = row["response"].strip().rpartition(ANSWER)
    if not marker or not answer.strip():
        # Rows without a stated answer are learned whole; only training has them.
        reasoning, marker, answer = row["response"].strip(), "", ""
    return Completion(
        number,
        config.prompted(row["query"].strip()),
        answer and " " + answer.strip(),
        f"{config.gap}{reasoning}{marker and config.marker}",
    )
