"""Launches, waits and decompositions of every method, held at what docs/gpu.md states.

`python tests/support/device_counts.py` writes the table. A method without a row must not need more
than the largest of the rows.
"""

import pytest
from device_counts import COLUMNS_OF_TABLE, PAGE, SETTINGS, counted
from products import chosen


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


def test_rows_are_those_of_methods():
    rows = stated()
    assert list(rows) == sorted(rows)
    assert set(rows) <= set(SETTINGS)


@pytest.mark.parametrize(
    "method", chosen(sorted(SETTINGS), "eva", "kaiming", "loftq", "milora", "pissa")
)
def test_counts_are_no_larger_than_stated(method):
    rows = stated()
    largest = {name: max(row[name] for row in rows.values()) for name in COLUMNS_OF_TABLE}
    counts, limits = vars(counted(SETTINGS[method])), rows.get(method, largest)
    larger = {name: count for name, count in counts.items() if count > limits[name]}
    assert not larger, f"docs/gpu.md states {[(name, limits[name]) for name in larger]}"
