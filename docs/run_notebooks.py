"""Execute the notebooks of examples/ and store their outputs: `make notebooks`."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def execute(path: Path) -> None:
    """Run all cells in a new kernel. Warnings and progress bars are not stored."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, resources={"metadata": {"path": str(EXAMPLES)}}, record_timing=False
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for path in sorted(EXAMPLES.glob("*.ipynb")):
        execute(path)
        print(f"examples/{path.name}")
