"""The registered methods as parameters of tests, and the few that stand for all.

A layer treats every method alike that does the same to its base and trains the same factors. What
follows a start therefore needs each method once, and each such group at every setting. `make test`
runs that part, and `make test-all` runs every member.
"""

import pytest
from products import chosen, reduced, thinned

from lora_init import list_initializers

SPECS = {spec.name: spec for spec in list_initializers()}
METHODS = list(SPECS)
PRESERVING = [name for name, spec in SPECS.items() if spec.preserves_output]
KEEPING = [name for name, spec in SPECS.items() if spec.base == "keep"]
SUBTRACTING = [name for name, spec in SPECS.items() if spec.base == "subtract"]
REPLACING = [name for name, spec in SPECS.items() if spec.base == "replace"]
RESTORABLE = KEEPING + SUBTRACTING
WITH_DATA = [name for name, spec in SPECS.items() if spec.needs_data]
WITHOUT_DATA = [name for name, spec in SPECS.items() if not spec.needs_data]
# The first method of a group stands for it, and the best known ones come first.
FIRST = [name for name in ("kaiming", "pissa", "loftq", "eva", "corda", "lora_ga") if name in SPECS]


def handling(method: str) -> tuple:
    """What an adapted layer depends on: the base's treatment, and the factors that are frozen."""
    return SPECS[method].base, SPECS[method].frozen


def behavior(method: str) -> tuple:
    """What a start depends on: the same, what the method reads, and whether the output changes."""
    spec = SPECS[method]
    return *handling(method), tuple(sorted(spec.reads)), spec.preserves_output


def one_of_each(methods: list[str], group=handling) -> list:
    """`methods` with those marked `exhaustive` whose group an earlier one shows."""
    ordered = [name for name in FIRST if name in methods]
    ordered += [name for name in methods if name not in ordered]
    return chosen(methods, *{group(name): name for name in reversed(ordered)}.values())


def across(methods: list[str], values: list, group=handling) -> list:
    """(method, value) with every value at the first method of each group."""
    shown = {p.values[0] for p in one_of_each(methods, group) if not p.marks}
    rest = pytest.mark.exhaustive
    return reduced(
        [
            pytest.param(method, value, marks=() if method in shown else rest)
            for method in methods
            for value in values
        ]
    )


def every_method_and_group(parameters: list) -> list:
    """(method, case, variant) with every method, and every group and case at every variant."""
    return thinned(
        parameters,
        lambda method, case, variant: method,
        lambda method, case, variant: (handling(method), str(case)),
        lambda method, case, variant: (handling(method), variant),
        lambda method, case, variant: (str(case), variant),
    )


every_method = pytest.mark.parametrize("method", METHODS)
