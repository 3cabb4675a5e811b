"""The single input of an adapted layer, passed by position or by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

NAMES = ("input", "x")
"""The names of this argument in torch's and transformers' modules."""


def only_input(base: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """Return the input of a call ``layer(x)``, ``layer(input=x)`` or ``layer(x=x)``.

    Raises:
        TypeError: the number of inputs is not one, or the name is unknown.
    """
    if len(args) == 1 and not kwargs:
        return args[0]
    if not args and len(kwargs) == 1:
        name, value = next(iter(kwargs.items()))
        if name in NAMES or name in type(base).forward.__code__.co_varnames[1:2]:
            return value
    given = [*map(str, range(len(args))), *kwargs]
    raise TypeError(
        f"an adapted {type(base).__name__} takes one input, and was called with the arguments "
        f"{', '.join(given) or 'none'}; pass layer(x), layer(input=x) or layer(x=x)"
    )
