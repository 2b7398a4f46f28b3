"""The notebook that opens a model up runs from top to bottom, and is kept as it looked after the demo."""

import json
import re

import pytest
import yaml
from training_toys import ROOT, environment, train_here, write_toy_shards

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


def losses_in(printed):
    return [float(loss) for loss in re.search(r"validation loss ([\d.]+) → ([\d.]+)", printed).groups()]


def test_the_notebook_shows_the_demo_of_today():
    """It once kept showing the demo of an older recipe, which ended a nat higher."""
    printed = printed_by(nbformat.read(NOTEBOOK, as_version=4))
    recipe = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text(encoding="utf-8"))
    sizes = (
        "{n_layer} layers, {n_head} heads, {n_embd} wide, {train_tokenizer:,} words, {block_size} positions"
    )
    assert sizes.format(**recipe) in printed
    steps = recipe["max_steps"]
    assert f"{steps:,} steps, {steps * recipe['batch_tokens']:,} tokens" in printed
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    measured = re.search(r"validation at step 100 and at the end ([\d.]+) and ([\d.]+) nats/token", readme)
    assert measured, "README.md does not say any more how the demo ends"
    # The documentation of another Python is another text, by a tenth of a nat or so.
    assert losses_in(printed) == pytest.approx([float(loss) for loss in measured.groups()], abs=0.3)


def executed(monkeypatch, checkout):
    """The notebook, run in a checkout that has what it reads and nothing else."""
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    for name in ("data", "evaluation", "modeling_gpt_scratch", "training", "finetune.py"):
        (checkout / name).symlink_to(ROOT / name)
    (checkout / "notebooks").mkdir()
    for name, value in {
        **environment(),
        "NOTEBOOK_STEPS": "60",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(checkout / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    printed = printed_by(notebook)
    assert pictures_in(notebook) == PICTURES
    # By hand and by the model, in float32: sums in another order.
    differences = re.search(r"logits ([\d.e+-]+), attention ([\d.e+-]+)\n", printed)
    assert differences and max(map(float, differences.groups())) < 1e-4
    first, last = losses_in(printed)
    assert last < first
    return printed


@pytest.mark.slow
def test_the_notebook_runs_without_a_run_before_it(monkeypatch, tmp_path):
    """In a copy of the checkout that has no demo, so that the model is trained on the spot."""
    printed = executed(monkeypatch, tmp_path)
    assert "No demo here yet: a small model, trained for 60 steps just now." in printed


@pytest.mark.slow
def test_the_notebook_runs_on_what_a_run_leaves(monkeypatch, tmp_path):
    """As after the demo: the files are a real run's, of a small one."""
    artifacts = tmp_path / "artifacts"
    write_toy_shards(artifacts / "toy")
    (artifacts / "shards").mkdir()
    shards = (artifacts / "toy" / "shards").rename(artifacts / "shards" / "python-docs")
    train_here(shards=shards, run_dir=artifacts / "runs" / "demo", block_size=128, batch_tokens=1024)
    printed = executed(monkeypatch, tmp_path)
    assert "The demo's export." in printed and "2 layers, 2 heads, 32 wide, 300 words, 128 pos" in printed
    assert "12 steps, 12,288 tokens" in printed
