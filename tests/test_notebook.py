"""The notebook of the manual runs from top to bottom, and is stored without what a machine made of it."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tests.flags import xla_flags

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "notebooks" / "look_inside.ipynb"


def test_the_notebook_is_stored_without_outputs():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert len(cells) > 5
    assert not any(cell.outputs or cell.execution_count for cell in cells)


def test_the_notebook_runs(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", xla_flags())
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    made = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in made) == 4
    assert not any(output.output_type == "error" for output in made)
