"""All reproductions, in the order of their pages."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from ..config.location import qualified
from ..errors import ConfigurationError, nearest
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
FAMILY = ("start_family", "trained_starts", "sc_lora_retention", "osrm_merge")
"""Comparisons of many papers' starts, on another page."""


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
        known = (*NAMES, *FAMILY)
        if name not in known:
            raise ConfigurationError(
                f"papers={name!r} is not supported: must be one of {', '.join(known)}. "
                f"{nearest(name, known)}"
            )
