"""One mark per method, which differs from all others and is the same in every report."""

from itertools import combinations

import numpy as np

from experiments.report.palette import MARKS, RESERVE, marks
from lora_init import list_initializers


def cielab(color: str) -> np.ndarray:
    """CIELAB (D65) of "#rrggbb". A distance of about 2 is just visible side by side."""
    srgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ linear / np.array([0.9505, 1.0, 1.089])
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_colors_are_far_apart():
    colors = [mark.color for mark in MARKS.values()] + list(RESERVE)
    for one, other in combinations(colors, 2):
        distance = np.linalg.norm(cielab(one) - cielab(other))
        assert distance > 20, f"{one} and {other} are {distance:.0f} apart"


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
