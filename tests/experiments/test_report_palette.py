"""One mark a method: apart from all others, and the same in every report."""

from experiments.report.palette import MARKS, RESERVE, marks
from lora_init import list_initializers


def test_no_two_methods_look_alike():
    methods = [spec.name for spec in list_initializers()]
    assert len(methods) > len(MARKS) + len(RESERVE), "else a colour would never come again"
    found = marks(methods)
    assert list(found) == methods
    assert len(set(found.values())) == len(methods)


def test_newcomers_share_a_colour_only_where_there_are_no_more():
    for count in range(1, len(RESERVE) + 1):
        found = marks([f"newcomer {i}" for i in range(count)])
        assert len({mark.color for mark in found.values()}) == count


def test_a_mark_follows_from_the_name():
    alone = marks(["mine"])["mine"]
    assert marks(["pissa", "mine", "kaiming"])["mine"] == alone
    assert alone.color in RESERVE
    assert len(marks([f"newcomer {i}" for i in range(99)])) == 99
