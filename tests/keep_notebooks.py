"""Run the notebooks and keep what they show: `python -m tests.keep_notebooks`, after the demo.

play.ipynb shows that run and its speed. What libraries say on stderr is of this machine, and left out.
"""

import os
from pathlib import Path

import nbclient
import nbformat

from tests.training_toys import ROOT, environment

NAMES = ("play.ipynb", "distillation.ipynb")


def keep(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=1800, record_timing=False, resources=resources).execute()
    for cell in cells:
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    os.environ |= {**environment(), "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    for name in NAMES:
        keep(ROOT / "notebooks" / name)
        print(f"notebooks/{name}: {(ROOT / 'notebooks' / name).stat().st_size:,} bytes")
