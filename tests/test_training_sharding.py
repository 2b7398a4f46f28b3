"""FSDP2 as accelerate_configs/fsdp2.yaml starts it, really sharding, on gloo (tests/fsdp2_on_cpu.py)."""

import json
import os
import sys

import pytest
from sharded_steps import ROWS, TOKENS, VOCABULARY
from training_toys import ROOT, environment, metrics_of, run_to_its_end, run_training, write_toy_shards

from training.settings import SettingsError
from training.sharding import sharding_plugin

LAUNCH = ["--config_file", str(ROOT / "accelerate_configs" / "fsdp2.yaml")]
LAUNCH += ["--num_processes", "2", "--main_process_port", "0"]
SCRIPT = ROOT / "tests" / "fsdp2_on_cpu.py"


@pytest.fixture(scope="module")
def found() -> dict:
    """What tests/sharded_steps.py says of one batch on two processes in bfloat16."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH]
    command.append(str(ROOT / "tests" / "sharded_steps.py"))
    done = run_to_its_end(command, env={**environment(), "PYTHONPATH": paths})
    lines = [line for line in done.stdout.splitlines() if line.startswith("found: ")]
    assert done.returncode == 0 and len(lines) == 1, done.stdout + done.stderr
    return json.loads(lines[0].removeprefix("found: "))


def test_a_sharded_batch_in_pieces_takes_the_step_of_the_whole_one(found):
    """Sums over pieces and processes were bfloat16 once: 64 pieces were 1% off, and the loss had 3 digits."""
    assert found["kinds"] == ["DTensor"]
    assert found["loss_type"] == "torch.float32"
    # bfloat16's own rounding of the forward, of which the loss averages two thousand.
    assert found["loss"] == pytest.approx(found["plain_loss"], rel=2e-4)
    # Each piece's gradient is rounded to bfloat16 once (2⁻⁹ = 0.2%); more pieces must not add to that.
    assert all(off < 0.004 for off in found["off"].values()), found["off"]


def test_a_sharded_model_trains_without_its_logits(found):
    """A unit of its own, as Accelerate would have it, the head made all of them, and a float32 copy."""
    assert found["head"] == "Linear"
    assert 0 < found["largest"] < ROWS * TOKENS * VOCABULARY


def test_the_first_version_of_fsdp_is_refused(monkeypatch):
    assert sharding_plugin("bf16") is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SettingsError, match="fsdp_version: 2"):
        sharding_plugin("bf16")


@pytest.mark.slow
def test_a_sharded_run_that_is_to_be_compiled_whole_trains_samples_and_scores(tmp_path):
    """Compiled whole, sampling called the model past the hooks that gather its weights, and the run ended."""
    questions = tmp_path / "questions.jsonl"
    question = {"ind": 1, "activity_label": "Delving", "ctx_a": "The model reads.", "ctx_b": "", "label": 2}
    question |= {"ctx": "The model reads.", "endings": ["the token", "a deep step", "never", "loss"]}
    question |= {"split": "val", "split_type": "indomain", "source_id": "toy"}
    questions.write_text(json.dumps(question) + "\n")
    run = tmp_path / "run"
    done = run_training(
        *LAUNCH, script=SCRIPT, shards=write_toy_shards(tmp_path / "toy"), run_dir=run, max_steps=2,
        warmup_steps=1, compile="whole", mixed_precision="bf16", hellaswag_questions=questions,
    )  # fmt: skip
    assert "torch.compile regional (FSDP2 is compiled block by block, not whole as asked)" in done.stdout
    assert done.stdout.count("every parameter is a DTensor") == 2 and "  | " in done.stdout
    names = set().union(*metrics_of(run))
    assert {"loss", "validation_loss", "hellaswag_acc_norm"} <= names
    assert (run / "export" / "model.safetensors").exists()
