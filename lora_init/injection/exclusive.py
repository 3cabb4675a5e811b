"""Check whether a parameter's memory may be modified: no other tensor or process may use it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _counts(tensor: Tensor) -> tuple[int, int] | None:
    """Reference counts of the tensor's storage and of the tensor, or None if torch lacks them."""
    of_storage = getattr(torch._C, "_storage_Use_Count", None)
    of_tensor = getattr(tensor, "_use_count", None)
    if of_storage is None or of_tensor is None:
        return None
    return of_storage(tensor.untyped_storage()._cdata), of_tensor()


_ALONE = _counts(nn.Parameter(torch.empty(1)))


def is_exclusive(parameter: nn.Parameter) -> bool:
    """Whether an in-place change of this CPU parameter is visible only through the parameter.

    False for memory

    - that is mapped from a file or comes from numpy (torch cannot resize it),
    - that is shared with other processes,
    - that another tensor uses (a state dict, another model, a view),
    - that the graph of an earlier forward pass holds.

    Also False where this cannot be determined.
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
