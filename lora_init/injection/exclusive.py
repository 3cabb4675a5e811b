"""Whether a parameter's memory may be written to: it is torch's own, and nobody else has a look."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _counts(tensor: Tensor) -> tuple[int, int] | None:
    """How many hold the tensor's memory and how many the tensor, where torch tells."""
    of_storage = getattr(torch._C, "_storage_Use_Count", None)
    of_tensor = getattr(tensor, "_use_count", None)
    if of_storage is None or of_tensor is None:
        return None
    return of_storage(tensor.untyped_storage()._cdata), of_tensor()


_ALONE = _counts(nn.Parameter(torch.empty(1)))


def is_exclusive(parameter: nn.Parameter) -> bool:
    """Whether a change of this CPU parameter in place is seen by those only who hold it itself.

    False for memory that a file is mapped into or that comes from numpy (torch cannot resize it),
    that processes share, that another tensor shows too (a state dict, another model, a view), or
    that the graph of an earlier forward pass keeps; and wherever that cannot be known.
    """
    if parameter.device.type != "cpu" or type(parameter.data) is not Tensor:
        return False
    if parameter.is_inference() or parameter.is_shared():
        return False
    storage = parameter.untyped_storage()
    if not storage.resizable() or storage.nbytes() != parameter.nbytes:
        return False
    del storage
    return _ALONE is not None and _counts(parameter) == _ALONE
