"""The notebook runs from its first cell to its last, and shows what it says it shows."""

import re

import pytest
from training_toys import ROOT, environment

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")


def test_the_notebook_is_kept_as_it_ran():
    """From top to bottom, in one go, and small enough to be looked at in a diff."""
    path = ROOT / "notebooks" / "distillation.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert path.stat().st_size < 1_000_000


@pytest.mark.slow
def test_the_notebook_about_distillation_runs(monkeypatch):
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    for name, value in {
        **environment(),
        "NOTEBOOK_STEPS": "4",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(ROOT / "notebooks" / "distillation.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    printed = "".join(o.get("text", "") for o in outputs if o.output_type == "stream")
    assert len(pictures) == 3
    gaps = [float(x) for x in re.findall(r"KL\(teacher ‖ student .*?\): ([\d.]+) nats", printed)]
    assert len(gaps) == 2
