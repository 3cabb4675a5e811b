"""What the tests of the cache have in common."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from lora_init.cache import Cache

posix_only = pytest.mark.skipif(os.name != "posix", reason="forks, signals and permissions")
LARGE = 10**9


def files(cache: Cache) -> list[Path]:
    return sorted(path for path in cache.folder.rglob("*") if path.is_file())


def some_tensors(seed: int = 0, size: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"U": torch.randn(size, 4, generator=generator), "S": torch.ones(4)}


def started(function, *arguments) -> multiprocessing.Process:
    """Forked, so that it costs milliseconds and not an import of torch."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process
