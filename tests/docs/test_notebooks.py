"""The notebooks of examples/ run, and are stored with their outputs."""

from __future__ import annotations

import ast
from pathlib import Path

import altair as alt
import nbformat
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = {
    "steps=25": "steps=2",
    "(3e-4, 1e-3, 3e-3)": "(1e-3,)",
    "held_out_rows = 512, 256": "held_out_rows = 64, 16",
}
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def code_cells(path):
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_run(path, monkeypatch):
    """With few training steps, rates and rows."""
    monkeypatch.chdir(EXAMPLES)
    scope = {"__name__": path.stem}
    charts = 0
    for number, cell in enumerate(code_cells(path)):
        source = cell.source
        for full, small in SMALL.items():
            source = source.replace(full, small)
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell {number}", "exec"), scope)
        if last is not None:
            shown = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), scope)
            if isinstance(shown, alt.TopLevelMixin):
                assert shown.to_dict()  # checks the chart
                charts += 1
    assert charts >= 2


def test_the_small_form_applies():
    text = "".join(path.read_text() for path in NOTEBOOKS)
    assert all(full in text for full in SMALL)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stored(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/svg+xml" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert "site-packages" not in path.read_text()
