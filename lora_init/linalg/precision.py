"""Matrix products in the precision of their factors, whatever the process has set.

Factors, statistics and edits of a base weight must not depend on the settings of a training script.
Autocast and reduced float32 products (TF32 on a GPU, bfloat16 on some CPUs) would round them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

WITHOUT_FLOAT64 = ("mps",)
"""The types of devices that have no float64: Apple's GPUs."""


def wide_device(device: torch.device) -> torch.device:
    """The device for decompositions and float64: `device`, or the CPU if it has no float64."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def device_for(device: str | torch.device | None) -> torch.device | None:
    """The device that a user's `device=` names; None for the device of each weight.

    Raises:
        ValueError: torch does not know the device, or this machine does not have it.
    """
    if device is None or (device == "auto" and not torch.cuda.is_available()):
        return None
    try:
        place = wide_device(torch.device("cuda" if device == "auto" else device))
    except RuntimeError as error:
        raise ValueError(
            f"device={device!r} is not supported: must be 'auto', or a device of torch such as "
            "'cpu' or 'cuda:0'"
        ) from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={str(device)!r} is not supported: no CUDA device is present. Use device=None"
        )
    return place


def wide(values: Tensor) -> Tensor:
    """The tensor in float64, on its `wide_device`."""
    return values.to(wide_device(values.device)).double()


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute products in the dtype of their factors. Reduced float32 products stay as set."""
    active = [device for device in ("cpu", "cuda", "mps") if torch.is_autocast_enabled(device)]
    if not active:
        yield
        return
    with ExitStack() as stack:
        for device in active:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products with all their bits, and without autocast.

    Do not use it in the forward and backward pass of training, where the user decides. torch keeps
    these settings for the whole process. Enter this context before starting threads: inside it, an
    inner context changes and restores nothing.
    """
    with without_autocast():
        if torch.compiler.is_compiling():
            yield
            return
        reduced = _reduced_products()
        try:
            for owner, name, _ in reduced:
                setattr(owner, name, "ieee" if name == "fp32_precision" else False)
            yield
        finally:
            for owner, name, value in reduced:
                setattr(owner, name, value)


def _reduced_products() -> list[tuple[Any, str, Any]]:
    """Return owner, name and value of each setting that reduces float32 products now."""
    cuda = torch.backends.cuda.matmul
    if hasattr(cuda, "fp32_precision"):  # since torch 2.9, with a module for the CPU
        backends = cuda, torch.backends.mkldnn.matmul  # pyright: ignore  # missing in its stubs
        found = [(backend, "fp32_precision", backend.fp32_precision) for backend in backends]
    else:
        found = [(cuda, "allow_tf32", cuda.allow_tf32)]
    return [setting for setting in found if setting[2] not in ("ieee", False)]
