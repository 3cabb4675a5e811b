"""A cache of its own for a test, and one that must not warn."""

from __future__ import annotations

import warnings

import pytest
from stores import LARGE

from lora_init.cache import Cache


@pytest.fixture
def store(tmp_path):
    return Cache(tmp_path / "cache", LARGE)


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
