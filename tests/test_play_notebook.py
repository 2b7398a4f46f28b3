"""The notebook that opens a model up runs from top to bottom, and is kept as it looked after the demo."""

import json
import re

import pytest
from training_toys import ROOT, environment

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")

NOTEBOOK = ROOT / "notebooks" / "play.ipynb"
PICTURES = 11
MOST_BYTES = 1_500_000


def outputs_of(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed_by(notebook):
    return "".join(o.get("text", "") for o in outputs_of(notebook) if o.output_type == "stream")


def pictures_in(notebook):
    return sum("image/png" in o.get("data", {}) for o in outputs_of(notebook))


def test_the_notebook_is_kept_with_what_the_demo_showed():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))  # from top to bottom, in one go
    assert pictures_in(notebook) == PICTURES
    assert "The demo's export." in printed_by(notebook)
    kinds = {output.output_type for output in outputs_of(notebook)}
    assert "error" not in kinds and not any(o.get("name") == "stderr" for o in outputs_of(notebook))
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    words = json.dumps([{k: v for k, v in o.items() if k != "data"} for o in outputs_of(notebook)])
    assert not re.search(r"/(home|root|tmp|Users|usr|mnt|work)/|site-packages", words)


@pytest.mark.slow
def test_the_notebook_runs_without_a_run_before_it(monkeypatch, tmp_path):
    """In a copy of the checkout that has no demo, so that the model is trained on the spot."""
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    for name in ("data", "evaluation", "modeling_gpt_scratch", "training", "finetune.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "notebooks").mkdir()
    for name, value in {
        **environment(),
        "NOTEBOOK_STEPS": "60",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    printed = printed_by(notebook)
    assert "No demo here yet: a small model, trained for 60 steps just now." in printed
    assert pictures_in(notebook) == PICTURES
    # By hand and by the model, in float32: sums in another order.
    differences = re.search(r"logits ([\d.e+-]+), attention ([\d.e+-]+)\n", printed)
    assert differences and max(map(float, differences.groups())) < 1e-4
    first, last = map(float, re.search(r"validation loss ([\d.]+) → ([\d.]+)", printed).groups())
    assert last < first
