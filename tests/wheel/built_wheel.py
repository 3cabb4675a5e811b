"""The wheel of this source tree, unpacked: what pip would put into site-packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from clean_install import ROOT, only_wheel

SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
FOLDERS = ("lora_init", "experiments", "conf", "hydra_plugins")
BUILD = "import setuptools.build_meta as backend, sys; backend.build_wheel(sys.argv[1])"


def unpacked_wheel(folder: Path) -> Path:
    """Build a copy of the sources, since a build leaves files, and unpack the wheel."""
    copy, site = folder / "source", folder / "site"
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    for name in SOURCES:
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-c", BUILD, str(folder)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(only_wheel(folder)) as wheel:
        wheel.extractall(site)
    return site
