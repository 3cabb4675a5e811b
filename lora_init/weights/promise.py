"""What the functions of a weight format must return, checked at every call.

A mistake in a format of another package becomes an error that names the format and the function.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BROKEN = (AttributeError, LookupError, NotImplementedError)
"""Errors that show a mistake in a format. Others, such as ValueError, are messages to the user."""


def _is_reason(found: Any) -> bool:
    return found is None or isinstance(found, str)


def _is_matrix(found: Any) -> bool:
    return isinstance(found, Tensor) and found.is_floating_point() and found.ndim in (2, 3)


def _is_shape(found: Any) -> bool:
    is_tuple = isinstance(found, tuple) and len(found) in (2, 3)
    return is_tuple and all(isinstance(size, int) for size in found)


def _are_names(found: Any) -> bool:
    return isinstance(found, tuple) and all(isinstance(name, str) for name in found)


_REASON = ("the reason as text, or None", _is_reason)
_MATRIX = ("a floating-point tensor, (out, in) or (experts, out, in)", _is_matrix)
PROMISES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "matches": ("True or False, for every module", lambda found: isinstance(found, bool)),
    "refusal": _REASON,
    "unreadable": _REASON,
    "opaque": _REASON,
    "unwritable": _REASON,
    "matrices": ("the names of the matrices, as a tuple", _are_names),
    "groups": ("an integer", lambda found: isinstance(found, int)),
    "shape": ("a tuple of integers, (out, in) or (experts, out, in)", _is_shape),
    "read": _MATRIX,
    "values": _MATRIX,
    "float_dtype": ("a torch.dtype", lambda found: isinstance(found, torch.dtype)),
    "describe": ("a text", lambda found: isinstance(found, str)),
}
"""By function: what it must return, in words and as a check."""


class Promising:
    """A class whose functions of `PROMISES` are checked, and those of its subclasses."""

    name: str

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        for name in PROMISES.keys() & vars(cls).keys():
            if inspect.isfunction(vars(cls)[name]):
                setattr(cls, name, _checked(vars(cls)[name], name))


def _checked(function: Callable, name: str) -> Callable:
    must, holds = PROMISES[name]

    @functools.wraps(function)
    def call(one: Promising, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            found = function(one, module, *args, **kwargs)
        except BROKEN as error:
            what = f"raised {type(error).__name__} ({error})"
            raise _mistake(one, name, module, what, must) from error
        if not holds(found):
            raise _mistake(one, name, module, f"returned {_shown(found)}", must)
        return found

    return call


def _mistake(one: Promising, name: str, module: nn.Module, what: str, must: str) -> TypeError:
    kind = type(one).__name__
    return TypeError(
        f"weight format {getattr(one, 'name', kind)!r} is not supported: "
        f"{kind}.{name}({type(module).__name__}) {what}: must return {must}. "
        f"Correct {name} in {kind}."
    )


def _shown(found: Any) -> str:
    if isinstance(found, Tensor):
        return f"a {found.dtype} tensor of shape {tuple(found.shape)}"
    return repr(found)[:100]
