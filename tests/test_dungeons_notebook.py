"""The notebook runs from its first cell to its last, and shows what it says it shows."""

import re

import pytest
from training_toys import ROOT, environment

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")


def test_the_notebook_is_kept_without_outputs():
    notebook = nbformat.read(ROOT / "notebooks" / "distillation.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert all(
        not cell.outputs and cell.execution_count is None
        for cell in notebook.cells
        if cell.cell_type == "code"
    )


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
