"""GSM8K: 7,473 grade-school word problems to train on, 1,319 to test on.

`train.jsonl` and `test.jsonl` of openai/grade-school-math (MIT license): one
{"question": …, "answer": "worked solution\\n#### 42"} per line. A hash of a training question
decides whether it is held out for validation.

Source: Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021, arXiv 2110.14168.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigurationError
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

ADDRESS = "github.com/openai/grade-school-math (folder grade_school_math/data)"
TRAIN = Source(
    ("train.jsonl", "gsm8k_train.jsonl", "train-00000-of-00001.parquet"),
    ADDRESS, "openai/gsm8k", "main/train-00000-of-00001.parquet",
)  # fmt: skip
TEST = Source(
    ("test.jsonl", "gsm8k_test.jsonl", "test-00000-of-00001.parquet"),
    ADDRESS, "openai/gsm8k", "main/test-00000-of-00001.parquet",
)  # fmt: skip
FIELDS = ("question", "answer")
CALCULATION = re.compile(r"<<[^>]*>>")  # GSM8K's annotations for a calculator


@dataclass
class Gsm8k(WordProblems):
    """Settings of the files; those of all sources of word problems are in `WordProblems`.

    Attributes:
        validation_share: the share of the training questions.
    """

    name: str = "gsm8k"
    validation_share: float = 0.03

    def files(self) -> list[Path]:
        return [located(source, self.path, self.name) for source in (TRAIN, TEST)]

    def contents(self) -> str:
        return hash_of(self.files())


def load(config: Gsm8k) -> Splits:
    """The official test set, and the training set in two parts."""
    train, test = config.files()
    training, validation = [], []
    for example in examples(train, config, first=0):
        held_out = bucket(example.prompt, "validation") < config.validation_share
        (validation if held_out else training).append(example)
    return Splits(
        training[: config.train_limit],
        take(validation, config.validation_limit),
        take(examples(test, config, first=1_000_000), config.test_limit),
        notes=("scored by the number of a generated solution (experiments/data/answers.py)",),
        judge=says_the_number,
    )


def test_set(config: WordProblems, first: int) -> list[Completion]:
    """GSM8K's test questions, for other training data; ids start at `first`."""
    path = located(TEST, config.path, config.name)
    return take(examples(path, config, first), config.test_limit)


def examples(path: Path, config: WordProblems, first: int) -> Iterable[Completion]:
    """The rows of one file as prompt, worked solution and number."""
    made = []
    for number, row in enumerate(read_rows(path, FIELDS)):
        worked, marker, answer = row["answer"].rpartition("####")
        if not marker or not answer.strip():
            raise ConfigurationError(
                f"{path}: the answer of row {number + 1} does not end in '#### <number>'; give "
                "GSM8K's own file"
            )
        worked = CALCULATION.sub("", worked).strip()
        made.append(
            Completion(
                first + number,
                config.prompted(row["question"].strip()),
                " " + answer.strip().replace(",", ""),
                f"{config.gap}{worked}\n{config.marker}",
            )
        )
    return made
