"""Options of reproductions, and their smallest form, measured once in each test process."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from experiments.config.location import CONFIGURATIONS
from experiments.papers.application import register_schema, resolve
from experiments.papers.catalogue import load_reproduction
from experiments.papers.reproduction import Findings, Measurement, Options


def options_of(name: str, form: str, *overrides: str, **replaced: Any) -> Options:
    """The options that a command line would give the reproduction `name`, some then replaced."""
    register_schema(load_reproduction(name))
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGURATIONS / "papers" / name), version_base="1.3"):
        return replace(resolve(compose(form, overrides=list(overrides))), **replaced)


@cache
def smoke_measurement(name: str, **replaced: Any) -> Measurement:
    options = options_of(name, "smoke", "device=cpu", **replaced)
    return load_reproduction(name).measure(options)


@cache
def smoke_findings(name: str, **replaced: Any) -> Findings:
    return load_reproduction(name).conclude(smoke_measurement(name, **replaced))


@pytest.fixture(scope="session")
def composed_paper():
    """`composed_paper("fast_svd", "full", "ranks=[8]")` returns options."""
    return options_of


@pytest.fixture(scope="session")
def smoke():
    """`smoke("fast_svd")` returns the findings of the smoke form; options may be replaced."""
    return smoke_findings


@pytest.fixture(scope="session")
def smoke_rows():
    """`smoke_rows("first_step")` returns the measurement of the smoke form."""
    return smoke_measurement
