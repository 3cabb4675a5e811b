"""The checks of annotated types and shapes that are on in every test run.

Each test checks the first call of every function. Later calls in the same test nearly always repeat
its types, and checking all of them costs a test 30 ms.
"""

import functools
import inspect
import typing

import jaxtyping
import torch
from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeError))
"""Checks a function's annotated types; an int is a float."""

jaxtyped = jaxtyping.jaxtyped

test = 0
"""The number of the running test; conftest.py counts."""


def install():
    """Check the functions and dataclasses of lora_init, which must not be imported yet.

    A function is decorated at its first call. At the import that takes seconds for all of them.
    torch.compile cannot trace the checks, so they are off in compiled code. Nor can it trace a
    context manager in a wrapper, so generators are left out.
    """

    def at_first_call(*, typechecker):
        decorate = jaxtyped(typechecker=typechecker)

        def decorated(one):
            if inspect.isgeneratorfunction(one):
                return one
            return decorate(one) if inspect.isclass(one) else _at_first_call(one, decorate)

        return decorated

    jaxtyping.jaxtyped = at_first_call
    jaxtyping.install_import_hook("lora_init", "annotations.checked")


def _at_first_call(function, decorate):
    @functools.cache
    def decorated():
        try:
            hints = typing.get_type_hints(function)
        except NameError:  # a name that only type checkers import; jaxtyping checks the others
            return decorate(function)
        # Binding the axes of shapes takes most of the time, and few functions have any.
        shaped = any(map(_is_shaped, hints.values()))
        return jaxtyped(checked(function), typechecker=None) if shaped else checked(function)

    seen = 0  # the last test that called the function

    @functools.wraps(function)
    def call(*args, **kwargs):
        nonlocal seen
        if jaxtyping.config.jaxtyping_disable or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if seen == test:
            return function(*args, **kwargs)
        seen = test
        return decorated()(*args, **kwargs)

    return call


def _is_shaped(hint):
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_is_shaped, typing.get_args(hint)))
