"""The checks of annotated types and shapes that are on in every test run."""

import functools
import inspect

import jaxtyping
from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""Checks a function's annotated types; an int is a float."""

jaxtyped = jaxtyping.jaxtyped


def install():
    """Check the functions and dataclasses of lora_init, which must not be imported yet.

    jaxtyping decorates a function at its first call. At the import it takes seconds for all.
    Generators are left out. torch.compile cannot trace a context manager in a wrapper, even where
    the checks are off.
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
    decorated = functools.cache(lambda: decorate(function))

    @functools.wraps(function)
    def call(*args, **kwargs):
        one = function if jaxtyping.config.jaxtyping_disable else decorated()
        return one(*args, **kwargs)

    return call
