"""Data sources. The type of the configuration selects the source; each source is one file.

To add one: a dataclass derived from `DataConfig` and a `load(config) -> Splits` in a file here, a
line in `SOURCES`, and a YAML in `conf/data/`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..config.inputs import DataConfig
from ..config.store import register_sources
from ..errors import ConfigurationError
from . import chain_sum, gsm8k, gsm_symbolic, metamath, rotten_tomatoes, table
from .examples import Completion, Example, Generated, Judge, Labelled
from .judges import says_exactly
from .splits import Splits

SOURCES: dict[type[DataConfig], Callable[[Any], Splits]] = {
    rotten_tomatoes.RottenTomatoes: rotten_tomatoes.load,
    gsm_symbolic.GsmSymbolic: gsm_symbolic.load,
    chain_sum.ChainSum: chain_sum.load,
    gsm8k.Gsm8k: gsm8k.load,
    metamath.MetaMath: metamath.load,
    table.Table: table.load,
}
register_sources("data", SOURCES)

__all__ = [
    "SOURCES",
    "Completion",
    "DataConfig",
    "Example",
    "Generated",
    "Judge",
    "Labelled",
    "Splits",
    "load_data",
    "says_exactly",
]


def load_data(config: DataConfig) -> Splits:
    """Load the examples that `config` describes.

    Raises:
        ConfigurationError: the source cannot load them, or a split without examples is needed.
    """
    splits = SOURCES[type(config)](config)
    for split in ("train", "test"):
        if not getattr(splits, split):
            raise ConfigurationError(
                f"data={config.name}: the {split} split is empty; set data.{split}_limit to 1 or "
                "more, or leave it out"
            )
    return splits
