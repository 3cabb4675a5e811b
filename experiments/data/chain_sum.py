"""Chain sums such as "12 + 7 - 3 =", an easier generator than gsm_symbolic.

A 135M-parameter model learns sums of a few small numbers in a short training, and hardly any word
problem. From reasoning-gym 0.1.25, `chain_sum`. An expression occurs once; its hash decides its
split.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config.bounds import check_integer, check_seed
from ..config.inputs import DataConfig
from ..errors import ConfigurationError
from .examples import Completion
from .splits import Splits, split_of

ORDER = "The most must not be less than the fewest"


@dataclass
class ChainSum(DataConfig):
    """Settings of the generator; a comparison keeps `generator_seed` fixed."""

    name: str = "chain_sum"
    train_limit: int | None = 1024
    validation_limit: int | None = 128
    test_limit: int | None = 256
    generator_seed: int = 0
    min_terms: int = 2
    max_terms: int = 2
    min_digits: int = 1
    max_digits: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed("data.generator_seed", self.generator_seed)
        check_integer("data.min_terms", self.min_terms, 1)
        check_integer("data.max_terms", self.max_terms, self.min_terms, fix=f"{ORDER} terms")
        check_integer("data.min_digits", self.min_digits, 1)
        check_integer("data.max_digits", self.max_digits, self.min_digits, fix=f"{ORDER} digits")


def load(config: ChainSum) -> Splits:
    """Draw until every split has its number of distinct sums (None means 1024)."""
    from reasoning_gym.arithmetic.chain_sum import ChainSumConfig, ChainSumDataset

    wanted = {
        "train": config.train_limit,
        "validation": config.validation_limit,
        "test": config.test_limit,
    }
    wanted = {split: 1024 if limit is None else limit for split, limit in wanted.items()}
    found: dict[str, list[Completion]] = {split: [] for split in wanted}
    attempts = 50 * sum(wanted.values()) + 1000
    source = ChainSumDataset(
        ChainSumConfig(
            min_terms=config.min_terms,
            max_terms=config.max_terms,
            min_digits=config.min_digits,
            max_digits=config.max_digits,
            seed=config.generator_seed * 10_000_000,
            size=attempts,
        )
    )
    seen: set[str] = set()
    for index in range(attempts):
        sum_ = source[index]
        expression = sum_["metadata"]["expression"]
        split = split_of(expression, validation=0.15, test=0.25)
        if expression in seen or len(found[split]) == wanted[split]:
            continue
        seen.add(expression)
        found[split].append(Completion(index, f"{expression} =", f" {sum_['answer']}"))
        if all(len(found[name]) == wanted[name] for name in wanted):
            return Splits(**found, notes=("train and test share no expression",))
    raise ConfigurationError(
        f"data=chain_sum: {attempts} draws of {config.min_terms}-{config.max_terms} terms with "
        f"{config.min_digits}-{config.max_digits} digits hold too few distinct sums for "
        f"{wanted}; raise data.max_terms or data.max_digits, or lower the limits"
    )
