"""The adapter of a linear layer whose weight is sharded by tensor parallelism.

The module's own code communicates before and after its product: torch's in hooks, transformers' in
a replaced forward. The adapter's product is added in between, to the result of `linear`, so both
are summed or gathered together.

| the weight is sharded by | x | A x | B A x, as W x |
|---|---|---|---|
| outputs | on each rank | on each rank | by outputs |
| inputs | by inputs | a partial sum | a partial sum |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lora_init.weights.sharded import is_dtensor, local_part


class AddedToProduct(TorchFunctionMode):
    """A context in which `linear(x, …)` returns its result plus `delta(x)`."""

    def __init__(self, delta: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.delta = delta

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not functional.linear:
            return result
        return (result + self.delta(args[0])).to(result.dtype)


def beside(factor: Tensor, x: Tensor) -> Tensor:
    """The factor in the form of x: a DTensor, or this rank's part of it.

    The gradient of a DTensor that each rank holds is summed over the ranks.
    """
    if not is_dtensor(x):
        return local_part(factor)
    parts: Any = factor
    return parts.redistribute(placements=parts.placements)
