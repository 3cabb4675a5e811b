"""All reproductions, in the order of the page."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from experiments.errors import ConfigurationError, nearest
from experiments.papers.reproduction import Paper

NAMES = (
    "pissa_quantization",
    "fast_svd",
    "loftq_iterations",
    "corda_compression",
    "corda_knowledge",
    "eva_variance",
    "first_step",
    "rate_scaling",
    "rank_scaling",
    "sharpness",
)


def load_paper(name: str) -> Paper:
    """Import the module of a reproduction.

    Raises:
        ConfigurationError: no such reproduction.
    """
    check_names([name])
    return importlib.import_module(f"experiments.papers.{name}").PAPER


def check_names(names: Iterable[str]) -> None:
    """Refuse names that no reproduction has.

    Raises:
        ConfigurationError: with the nearest name.
    """
    for name in names:
        if name not in NAMES:
            raise ConfigurationError(
                f"papers: no reproduction is called {name!r}; {nearest(name, NAMES)}allowed are "
                f"{', '.join(NAMES)}"
            )
