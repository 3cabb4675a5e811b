"""The checks of annotated types and shapes that are on in every test run."""

import inspect

import jaxtyping
from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""Decorates every function of lora_init during the tests; an int is a float."""

jaxtyped = jaxtyping.jaxtyped


def install():
    """Check the functions and dataclasses of lora_init, which must not be imported yet.

    Generators are left out. torch.compile cannot trace a context manager in a wrapper, even where
    the checks are off.
    """

    def checked_function(*, typechecker):
        decorate = jaxtyped(typechecker=typechecker)
        return lambda one: one if inspect.isgeneratorfunction(one) else decorate(one)

    jaxtyping.jaxtyped = checked_function
    jaxtyping.install_import_hook("lora_init", "annotations.checked")
