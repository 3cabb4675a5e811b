"""One mark per method, which differs from all others and is the same in every report."""

from experiments.report.palette import MARKS, RESERVE, marks
from lora_init import list_initializers


def test_no_two_methods_look_alike():
    methods = [spec.name for spec in list_initializers()]
    assert len(methods) > len(MARKS) + len(RESERVE), "otherwise no color is used twice"
    found = marks(methods)
    assert list(found) == methods
    assert len(set(found.values())) == len(methods)


def test_a_new_method_keeps_its_color_in_every_report():
    alone = marks(["mine"])["mine"]
    assert marks(["pissa", "mine", "kaiming"])["mine"] == alone
    assert alone.color in RESERVE
