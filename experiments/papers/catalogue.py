"""All reproductions, in the order of the page."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from ..errors import ConfigurationError, nearest
from ..location import qualified
from .reproduction import Reproduction

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


OTHERS = ("start_family",)
"""Reproductions of several papers at once, which have pages of their own."""


def load_reproduction(name: str) -> Reproduction:
    """Import the module of a reproduction.

    Raises:
        ConfigurationError: the name is unknown.
    """
    check_names([name])
    return importlib.import_module(qualified(f"papers.{name}")).REPRODUCTION


def check_names(names: Iterable[str]) -> None:
    """Refuse names that no reproduction has.

    Raises:
        ConfigurationError: the message has the nearest name.
    """
    for name in names:
        if name not in (*NAMES, *OTHERS):
            raise ConfigurationError(
                f"papers={name!r} is not supported: must be one of {', '.join(NAMES)}. "
                f"{nearest(name, NAMES)}"
            )
