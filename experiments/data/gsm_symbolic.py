"""GSM-Symbolic: grade-school word problems from reasoning-gym's templates, split by template.

reasoning-gym 0.1.25 has 100 templates and marks 85 as sound (`tasks_ok`). Its data set draws a
template for every index, so two of its data sets with different seeds share every template. Here
a hash of a template's number assigns it to one split, so the wording of a test problem is never
seen in training.

Source: Mirzadeh et al., "GSM-Symbolic", 2024, arXiv 2410.05229.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from ..config.bounds import check_seed, check_switches
from ..config.inputs import DataConfig
from ..errors import ConfigurationError
from .examples import Completion
from .splits import Splits, check_shares, split_of

PROMPT = "Question: {question}\nAnswer:"


@dataclass
class GsmSymbolic(DataConfig):
    """Settings of the generator.

    Attributes:
        generator_seed: fills the templates. It is not one of the run's seeds: a comparison keeps
            the problems fixed.
        reasoning: learn the worked solution before the answer, not the answer alone.
        validation_share, test_share: the expected shares of the templates.
    """

    name: str = "gsm_symbolic"
    train_limit: int | None = 512
    validation_limit: int | None = 64
    test_limit: int | None = 64
    generator_seed: int = 0
    reasoning: bool = False
    validation_share: float = 0.1
    test_share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed("data.generator_seed", self.generator_seed)
        check_switches("data.", self, "reasoning")
        check_shares(self.validation_share, self.test_share)


def templates(config: GsmSymbolic) -> dict[str, list[int]]:
    """The numbers of the sound templates in each split."""
    from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import tasks_ok

    split: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for number in tasks_ok:
        key = f"template {number}"
        split[split_of(key, config.validation_share, config.test_share)].append(number)
    return split


def load(config: GsmSymbolic) -> Splits:
    """As many problems per split as its limit says; None means 512."""
    numbers = templates(config)
    limits = (config.train_limit, config.validation_limit, config.test_limit)
    # The ids of the splits start a million apart: they do not change with a limit.
    for (split, found), limit in zip(numbers.items(), limits, strict=True):
        if not found and limit != 0:
            raise ConfigurationError(
                f"data=gsm_symbolic: no template is left for the {split} split with "
                f"data.validation_share={config.validation_share} and "
                f"data.test_share={config.test_share}; change the shares, or set "
                f"data.{split}_limit=0"
            )
    drawn = [
        draw(numbers[split], 512 if limit is None else limit, first * 1_000_000, config)
        for first, (split, limit) in enumerate(zip(numbers, limits, strict=True))
    ]
    return Splits(*drawn, notes=("train and test share no template",))


def draw(numbers: list[int], size: int, first: int, config: GsmSymbolic) -> list[Completion]:
    """`size` problems from the templates `numbers`."""
    from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import (
        GSMSymbolicDataset,
        GSMSymbolicDatasetConfig,
    )

    seed = config.generator_seed * 10_000_000 + first
    source = GSMSymbolicDataset(GSMSymbolicDatasetConfig(seed=seed, size=max(size, 1)))
    source.task_indices = Random(seed).choices(numbers, k=size)
    return [complete(source[index], first + index, config.reasoning) for index in range(size)]


def complete(problem: dict, number: int, reasoning: bool) -> Completion:
    """One generated problem as prompt and completion."""
    worked = problem["metadata"]["answer_cot"].rpartition("####")[0].rstrip()
    return Completion(
        id=number,
        prompt=PROMPT.format(question=problem["question"]),
        reasoning=f" {worked}\n####" if reasoning else "",
        answer=f" {problem['answer']}",
    )
