"""What `make test` leaves out, others show."""

from itertools import combinations, product

import products
import pytest
from products import every_pair, exhaustive, thinned

VALUES = list(product("abcd", (1, 2, 3), "xy"))


@pytest.fixture(autouse=True)
def every_member(monkeypatch):
    monkeypatch.setattr(products, "every_member", True)


def split(parameters):
    """Members without and with the mark."""
    return (
        [p for p in parameters if not exhaustive(p)],
        [p for p in parameters if exhaustive(p)],
    )


def test_every_two_values_that_meet_are_kept():
    kept, rest = split(every_pair(VALUES, 3))
    assert {p.values for p in kept} | {p.values for p in rest} == set(VALUES)
    assert len(kept) == 12, "4 × 3 is the least"
    for i, j in combinations(range(3), 2):
        met = {(p.values[i], p.values[j]) for p in kept}
        assert met == {(value[i], value[j]) for value in VALUES}


def test_what_a_feature_names_is_kept():
    kept, rest = split(
        thinned(
            VALUES, lambda letter, number, sign: letter, lambda letter, number, sign: (number, sign)
        )
    )
    assert {p.values[0] for p in kept} == set("abcd")
    assert {p.values[1:] for p in kept} == {value[1:] for value in VALUES}
    assert len(kept) == 6
    assert len(rest) == len(VALUES) - 6


def test_ids_marks_and_order_stay():
    skip = pytest.mark.skip(reason="not here")
    made = thinned([pytest.param(n, id=f"n{n}", marks=skip) for n in (3, 1, 3)], lambda n: n)
    assert [p.id for p in made] == ["n3", "n1", "n3"]
    assert [p.values for p in made] == [(3,), (1,), (3,)]
    assert [[mark.name for mark in p.marks] for p in made] == [
        ["skip"], ["skip"], ["skip", "exhaustive"]
    ]  # fmt: skip


def test_a_run_without_exhaustive_tests_builds_the_others_only(monkeypatch):
    monkeypatch.setattr(products, "every_member", False)
    assert [p.values for p in thinned([("a", 1), ("b", 1)], lambda letter, number: number)] == [
        ("a", 1)
    ]
