"""Where a run took place: versions, commit and hardware, recorded with every result."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "lora_init", "torch", "transformers", "accelerate", "numpy", "scipy", "safetensors",
    "tokenizers", "hydra-core", "omegaconf",
)  # fmt: skip


def describe_environment() -> dict[str, Any]:
    """Facts about this machine and this installation, as JSON types."""
    return {
        "python": platform.python_version(),
        "host": platform.node(),
        "platform": platform.platform(),
        "packages": {package: version(package) for package in PACKAGES},
        **git_state(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


@functools.cache
def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def git_state() -> dict[str, Any]:
    """The commit of this source tree and whether it has changes; None outside a repository."""

    def git(*arguments: str) -> str | None:
        command = ["git", *arguments]
        settings = {"capture_output": True, "text": True, "timeout": 10, "check": True}
        try:
            return subprocess.run(command, cwd=Path(__file__).parent, **settings).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain") if commit else None
    return {"git_commit": commit, "git_dirty": None if changes is None else bool(changes)}


@functools.cache
def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
