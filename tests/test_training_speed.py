"""The speed recipe's parts in whole runs: Muon, the average of the weights, separate documents."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from training_toys import ROOT, TOY_SETTINGS, as_flags, metrics_of, run_training, write_toy_shards

from train_accelerate import main
from training.checkpoint import latest_checkpoint

SPEED = {
    "optimizer": "muon",
    "schedule": "trapezoidal",
    "ema_decay": 0.8,
    "mask_documents": True,
    "max_steps": 6,
    "eval_every_steps": 3,
}


def train_here(**settings) -> None:
    """A run of the toy in this process, as if it were a new one."""
    try:
        main(as_flags({**TOY_SETTINGS, **SPEED, **settings}))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_toy_shards(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def unbroken(shards, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    train_here(shards=shards, run_dir=run, dropout=0.2)
    return run


def test_a_speed_run_stopped_after_every_other_step_matches_an_unbroken_one(unbroken, shards, tmp_path):
    run = tmp_path / "run"
    for _ in range(6):
        train_here(shards=shards, run_dir=run, dropout=0.2, max_minutes=1e-9)
    assert metrics_of(run) == metrics_of(unbroken)
    for name in ("model.safetensors", "optimizer.safetensors", "random_states.safetensors"):
        ends = [latest_checkpoint(folder) / name for folder in (run, unbroken)]
        assert ends[0].read_bytes() == ends[1].read_bytes(), name
    for folder in ("export", "export-ema"):
        ends = [path / folder / "model.safetensors" for path in (run, unbroken)]
        assert ends[0].read_bytes() == ends[1].read_bytes(), folder


def test_documents_that_are_to_be_kept_apart_are_in_the_first_batch_already(unbroken, shards, tmp_path):
    """The flag was once read by nobody, and a run with it was the run without."""
    train_here(shards=shards, run_dir=tmp_path / "run", dropout=0.2, max_steps=2, mask_documents=False)
    together, apart = (metrics_of(run)[0]["loss"] for run in (tmp_path / "run", unbroken))
    assert abs(together - apart) > 1e-4


def test_the_average_is_validated_and_exported_beside_the_weights(unbroken):
    validations = [line for line in metrics_of(unbroken) if "validation_loss" in line]
    assert [line["step"] for line in validations] == [3, 6]
    assert all(line["averaged_validation_loss"] != line["validation_loss"] for line in validations)
    weights, average = (load_file(unbroken / f / "model.safetensors") for f in ("export", "export-ema"))
    kept = load_file(latest_checkpoint(unbroken) / "optimizer.safetensors")
    assert weights.keys() == average.keys()
    for name, tensor in average.items():
        assert not torch.equal(tensor, weights[name]), name
        assert torch.equal(tensor, kept[f"{name}/average"][: len(tensor)]), name
    card = (unbroken / "export-ema" / "README.md").read_text()
    assert f"| validation loss | {validations[-1]['averaged_validation_loss']:.4f} nats/token |" in card


@pytest.mark.slow
def test_muon_on_sharded_matrices_takes_the_steps_of_whole_ones(shards, tmp_path):
    """FSDP2 cuts each matrix in two; the update needs all of it (tests/fsdp2_on_cpu.py)."""
    settings = {**SPEED, "mask_documents": False, "shards": shards}
    config = ROOT / "accelerate_configs" / "fsdp2.yaml"
    launch = ["--config_file", str(config), "--num_processes", "2", "--main_process_port", "0"]
    alone, sharded = tmp_path / "alone", tmp_path / "sharded"
    train_here(run_dir=alone, **settings)
    script = ROOT / "tests" / "fsdp2_on_cpu.py"
    run_training(*launch, script=script, **{**settings, "run_dir": sharded, "max_minutes": 1e-9})
    done = run_training(*launch, script=script, **{**settings, "run_dir": sharded})
    assert "every parameter is a DTensor" in done.stdout and "Going on from step 1" in done.stdout
    for one, other in zip(metrics_of(alone), metrics_of(sharded), strict=True):
        assert one == pytest.approx(other, rel=2e-3)  # bfloat16 inside Muon rounds other float32 sums
    for folder in ("export", "export-ema"):
        one, other = (load_file(run / folder / "model.safetensors") for run in (alone, sharded))
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-2, atol=2e-3)
