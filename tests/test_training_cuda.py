"""What only a GPU can show: that the host does not wait for it, and that a run on the CPU leaves it alone."""

import subprocess
import sys

import pytest
import torch
from training_toys import ROOT, TOY_SETTINGS, as_flags, environment, train_here, write_toy_shards

import train_accelerate
from training.interruption import Interruptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no NVIDIA GPU")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_toy_shards(tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_step_waits_for_the_gpu(shards, tmp_path, monkeypatch, precision, optimizer):
    """From the reading of a step's data until the processes agree on what comes after it, torch raises an
    error where the host would wait. Counting tokens once did, for each micro-batch.
    """
    begin, agree, watched = train_accelerate.islice, Interruptions.agree, []

    def begin_to_watch(*arguments):
        watched.append(True)
        if len(watched) > 2:  # the first steps make the optimizer's state
            torch.cuda.set_sync_debug_mode("error")
        return begin(*arguments)

    def watch_no_more(*arguments, **named):
        torch.cuda.set_sync_debug_mode("default")
        return agree(*arguments, **named)

    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(train_accelerate, "islice", begin_to_watch)
    monkeypatch.setattr(Interruptions, "agree", watch_no_more)
    try:
        train_here(
            shards=shards, run_dir=tmp_path / "run", max_steps=6, mixed_precision=precision,
            optimizer=optimizer, ema_decay=0.5,
        )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(watched) == 6


ON_THE_CPU = """
import sys
import torch
import train_accelerate
if torch.cuda.is_initialized():
    sys.exit(3)
train_accelerate.main(sys.argv[1:])
assert not torch.cuda.is_initialized()
"""


def test_a_run_on_the_cpu_leaves_the_gpu_alone(shards, tmp_path):
    """Looking at its random state alone takes half a gigabyte of it."""
    flags = as_flags({**TOY_SETTINGS, "shards": shards, "run_dir": tmp_path / "run", "max_steps": 2})
    variables = {**environment(), "ACCELERATE_USE_CPU": "true"}
    del variables["CUDA_VISIBLE_DEVICES"]
    done = subprocess.run(
        [sys.executable, "-c", ON_THE_CPU, *flags],
        env=variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode == 3:
        pytest.skip("a library starts the GPU when it is imported, as torchao 0.18 does")
    assert done.returncode == 0, done.stderr


def test_a_run_is_resumed_on_a_gpu_bit_for_bit(shards, tmp_path, monkeypatch):
    """With dropout, so that the GPU's random state counts."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    settings = {"shards": shards, "dropout": 0.2, "max_steps": 4, "deterministic": "true"}
    train_here(**settings, run_dir=tmp_path / "unbroken")
    for _ in range(4):
        train_here(**settings, run_dir=tmp_path / "broken", max_minutes=1e-9)
    ends = [tmp_path / run / "export" / "model.safetensors" for run in ("unbroken", "broken")]
    assert ends[0].read_bytes() == ends[1].read_bytes()
