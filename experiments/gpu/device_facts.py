"""The device, its software, and the settings that decide about precision."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess

import torch

import lora_init

from .task import Task

PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "triton", "safetensors", "numpy", "scipy",
)  # fmt: skip
DRIVER = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def run(task: Task) -> None:
    versions = {package: version(package) for package in PACKAGES}
    task.record.row(
        "versions",
        lora_init=lora_init.__version__,
        python=platform.python_version(),
        **versions,
    )
    task.record.row("host", cores=torch.get_num_threads(), machine=platform.machine())
    task.record.row("precision", **precision_settings())
    if not task.cuda:
        task.record.row("device", device="cpu")
        task.record.note("no CUDA device: its facts are missing")
        return
    properties = torch.cuda.get_device_properties(task.device)
    free, total = torch.cuda.mem_get_info(task.device)
    task.record.row(
        "device",
        device=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        memory_gib=total / 2**30,
        free_gib=free / 2**30,
        cuda=torch.version.cuda,
        driver=driver_version(),
        linalg=str(torch.backends.cuda.preferred_linalg_library()),
    )
    for package in ("transformers", "peft", "bitsandbytes", "triton"):
        if versions[package] is None:
            task.record.note(f"{package} is not installed: measurements that need it are skipped")


def precision_settings() -> dict[str, object]:
    """The process-wide precision of float32 products and convolutions."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    found: dict[str, object] = {"deterministic": torch.are_deterministic_algorithms_enabled()}
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9; the two interfaces do not mix
        found["products"] = matmul.fp32_precision
        found["convolutions"] = cudnn.conv.fp32_precision
    else:
        found["products_tf32"] = matmul.allow_tf32
        found["convolutions_tf32"] = cudnn.allow_tf32
    found["reduced_bf16_sums"] = str(matmul.allow_bf16_reduced_precision_reduction)
    return found


def version(package: str) -> str | None:
    """The installed version; None if the package is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """The driver's version; None if nvidia-smi does not print it."""
    try:
        done = subprocess.run(DRIVER, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None
