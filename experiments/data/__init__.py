"""Data sources. The type of the config selects the source; a source is one file.

To add one: a dataclass derived from `DataConfig` and a `load(config) -> Splits` in a file here, a
line in `SOURCES`, and a YAML in `conf/data/`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.data import (
    chain_sum,
    gsm8k,
    gsm_symbolic,
    metamath,
    rotten_tomatoes,
    table,
)
from experiments.data.examples import Completion, DataConfig, Example, Labelled, Splits
from experiments.errors import ConfigurationError

SOURCES: dict[type[DataConfig], Callable[[Any], Splits]] = {
    rotten_tomatoes.RottenTomatoes: rotten_tomatoes.load,
    gsm_symbolic.GsmSymbolic: gsm_symbolic.load,
    chain_sum.ChainSum: chain_sum.load,
    gsm8k.Gsm8k: gsm8k.load,
    metamath.MetaMath: metamath.load,
    table.Table: table.load,
}

__all__ = ["SOURCES", "Completion", "DataConfig", "Example", "Labelled", "Splits", "load_data"]


def load_data(config: DataConfig) -> Splits:
    """Load the examples that `config` describes.

    Raises:
        ConfigurationError: what the source cannot serve, or no example to learn from or to test on.
    """
    splits = SOURCES[type(config)](config)
    for split in ("train", "test"):
        if not getattr(splits, split):
            raise ConfigurationError(
                f"data={config.name}: the {split} split is empty; set data.{split}_limit to 1 or "
                "more, or leave it out"
            )
    return splits
