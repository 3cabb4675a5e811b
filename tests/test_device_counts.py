"""Launches, waits and decompositions of every method, held at what docs/gpu.md states.

`python tests/support/device_counts.py` prints a new table.
"""

from pathlib import Path

import pytest
from device_counts import COLUMNS_OF_TABLE, SETTINGS, counted
from products import chosen

PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"


def stated():
    """By method, the numbers of the table's row."""
    header = "| method | " + " | ".join(COLUMNS_OF_TABLE) + " |"
    lines = PAGE.read_text().split(header, 1)[1].splitlines()[2:]
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            break
        method, *numbers = (cell.strip() for cell in line.strip("|").split("|"))
        rows[method] = dict(zip(COLUMNS_OF_TABLE, map(int, numbers), strict=True))
    return rows


def test_every_method_has_a_row():
    assert list(stated()) == sorted(SETTINGS)


@pytest.mark.parametrize(
    "method", chosen(sorted(SETTINGS), "eva", "kaiming", "loftq", "milora", "pissa")
)
def test_counts_are_no_larger_than_stated(method):
    counts, limits = vars(counted(SETTINGS[method])), stated()[method]
    larger = {name: count for name, count in counts.items() if count > limits[name]}
    assert not larger, f"docs/gpu.md states {[(name, limits[name]) for name in larger]}"
