"""Products of parameters: the part that `make test` runs, and the rest, marked `exhaustive`.

A suite over methods, modules and settings is a product of hundreds. A mistake shows in one value or
in two that meet, seldom in three: `make test` runs members in which all of these occur, and
`make test-all` every one.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from itertools import combinations
from zlib import crc32

import pytest

every_member = True
"""False in a run without `exhaustive` tests: building them all takes a third of its start."""


def reduced(parameters: list) -> list:
    """`parameters` without those marked `exhaustive`, in a run that would deselect them."""
    return [p for p in parameters if every_member or not exhaustive(p)]


def exhaustive(parameter) -> bool:
    return any(mark.name == "exhaustive" for mark in parameter.marks)


def thinned(parameters: list, *features: Callable[..., Hashable]) -> list:
    """`parameters` with those marked `exhaustive` that show nothing new.

    Args:
        parameters: `pytest.param`s with an id, or tuples of values.
        features: each takes the values of one parameter and names what it shows, a value or several
            that meet. Every name that occurs is shown by a member without the mark.
    """
    members = [p if hasattr(p, "values") else pytest.param(*p) for p in parameters]
    shows = [{(n, feature(*p.values)) for n, feature in enumerate(features)} for p in members]
    kept, missing = set(), set().union(*shows)
    while missing:
        best = max(range(len(members)), key=lambda n: len(shows[n] & missing))
        kept.add(best)
        missing -= shows[best]
    rest = pytest.mark.exhaustive
    return reduced(
        [
            p if n in kept else pytest.param(*p.values, id=p.id, marks=(*p.marks, rest))
            for n, p in enumerate(members)
        ]
    )


def every_pair(parameters: list, count: int) -> list:
    """The same, with every two of the `count` values that meet somewhere."""
    return thinned(
        parameters,
        *(lambda *v, i=i, j=j: (str(v[i]), str(v[j])) for i, j in combinations(range(count), 2)),
    )


def every_value(parameters: Iterable, count: int) -> list:
    """The same, with every one of the `count` values somewhere."""
    return thinned(list(parameters), *(lambda *v, i=i: str(v[i]) for i in range(count)))


def chosen(parameters: Iterable, *ids: Hashable) -> list:
    """`parameters` with those marked `exhaustive` whose values are not among `ids`."""
    rest = pytest.mark.exhaustive
    return reduced([pytest.param(p, marks=() if p in ids else rest) for p in parameters])


def mark_exhaustive(items: list[pytest.Item]) -> None:
    """Of each test marked `sampled(n)`, mark all members but one in n as `exhaustive`.

    The members that stay have the smallest checksums of their names. So the sample is the same
    everywhere, and no value of a product is always in it or never.
    """
    tests = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled") and not item.get_closest_marker("exhaustive"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for members in tests.values():
        (step,) = members[0].get_closest_marker("sampled").args
        members.sort(key=lambda item: crc32(item.nodeid.encode()))
        for item in members[-(-len(members) // step) :]:
            item.add_marker(pytest.mark.exhaustive)
