"""Whether a live model's tensors are here, whole: what wraps it may have taken them elsewhere."""

from __future__ import annotations

from torch import Tensor

FSDP1 = "_fsdp_wrapped_module"
"""What FullyShardedDataParallel puts into the names of what it wraps."""


def absence(parameter: Tensor) -> str | None:
    """Why the matrix cannot be read or exchanged in place; None where it can."""
    if type(parameter.data).__name__ == "DTensor":
        return "sharded, a DTensor"
    if hasattr(parameter, "ds_id"):
        return "partitioned by DeepSpeed ZeRO-3"
    if parameter.is_meta:
        return "offloaded, on the meta device"
    if type(parameter).__name__ == "FlatParameter" or is_flattened(parameter):
        return "flattened by FullyShardedDataParallel"
    return None


def is_flattened(parameter: Tensor) -> bool:
    """Whether FSDP1 holds this matrix as a piece of a vector; `summon_full_params` gives it back.

    A vector's shape does not tell.
    """
    return getattr(parameter, "_fsdp_flattened", False) and parameter.ndim < 2
