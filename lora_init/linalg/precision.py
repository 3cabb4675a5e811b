"""Products in the precision of their factors, whatever the process has set.

Factors, statistics and edits of a base must not depend on a training script's settings. Autocast
and reduced float32 products (TF32 on a GPU, bfloat16 on some CPUs) would round them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

DEVICES = ("cpu", "cuda")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Products in the dtype of their factors. Reduced float32 products stay as they are set."""
    with ExitStack() as stack:
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Products in the dtype of their factors, float32 ones with all of their bits.

    Not for the forward and backward pass of training, where the user decides. torch has these
    settings for the whole process. Nothing is set, and nothing restored, where they are exact
    already: work that is shared out to threads enters this context before the threads do.
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
    """Owner, name and value of each setting that reduces float32 products now."""
    cuda = torch.backends.cuda.matmul
    if hasattr(cuda, "fp32_precision"):  # since torch 2.9, as the module for the CPU
        backends = cuda, torch.backends.mkldnn.matmul
        found = [(backend, "fp32_precision", backend.fp32_precision) for backend in backends]
    else:
        found = [(cuda, "allow_tf32", cuda.allow_tf32)]
    return [setting for setting in found if setting[2] not in ("ieee", False)]
