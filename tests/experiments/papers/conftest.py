"""Reproductions in their smallest form, measured once in each process of the tests."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

ROOT = Path(__file__).resolve().parents[3]

from experiments.papers.catalogue import load_paper  # noqa: E402
from experiments.papers.findings import Findings  # noqa: E402
from experiments.papers.reproduction import PaperSettings  # noqa: E402
from experiments.papers.application import register_schema, resolve  # noqa: E402


def settings_of(name: str, form: str, *overrides: str, **replaced: Any) -> PaperSettings:
    """The settings that a command line would give the reproduction `name`, some then replaced."""
    register_schema(load_paper(name))
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf" / "papers" / name), version_base="1.3"):
        return replace(resolve(compose(form, overrides=list(overrides))), **replaced)


@cache
def smoke_findings(name: str, **replaced: Any) -> Findings:
    return load_paper(name).reproduce(settings_of(name, "smoke", "device=cpu", **replaced))


@pytest.fixture(scope="session")
def composed_paper():
    """`composed_paper("fast_svd", "full", "ranks=[8]")` are its settings."""
    return settings_of


@pytest.fixture(scope="session")
def smoke():
    """`smoke("fast_svd")` are the findings of its smoke form; settings may be replaced."""
    return smoke_findings
