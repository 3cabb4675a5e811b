"""The built package works in a clean environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from clean_install import check, only_wheel
from lower_bounds import lower_bound

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_wheel_works_with_the_core_dependencies(tmp_path):
    """Installs torch into a new environment, which takes minutes."""
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    assert "imported in" in check(only_wheel(tmp_path))


def test_lower_bounds_are_stated():
    for package in ("torch", "transformers"):
        assert lower_bound(package).startswith(f"{package}==")
    with pytest.raises(SystemExit, match="no lower bound for nothing"):
        lower_bound("nothing")
