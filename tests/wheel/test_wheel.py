"""The built package works in a clean environment."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from built_wheel import unpacked_wheel
from clean_install import ROOT, check, only_wheel
from lower_bounds import lower_bound


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    return unpacked_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_has_every_module_and_configuration(site):
    """But the checks of a GPU, which need the tests of a clone."""
    installed = site / "lora_init_experiments"
    for folder, place in (("experiments", installed), ("conf", installed / "conf")):
        source = {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.*")}
        wanted = {str(path) for path in source if path.suffix != ".pyc" and path.parts[0] != "gpu"}
        assert wanted <= {str(path.relative_to(place)) for path in place.rglob("*.*")}
    assert (site / "hydra_plugins" / "lora_init_protocol.py").is_file()
    assert (site / "lora_init" / "py.typed").is_file()


def test_experiments_import_themselves_by_relative_names():
    """The package has another name in the wheel."""
    absolute = re.compile(r"^\s*(?:from|import) experiments\b", re.MULTILINE)
    assert not [p for p in (ROOT / "experiments").rglob("*.py") if absolute.search(p.read_text())]


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
