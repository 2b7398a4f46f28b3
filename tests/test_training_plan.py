"""Before and during a run: what it will take, how far its budget goes, what its device can do."""

import json
import resource
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from training_toys import (
    TOY_SETTINGS,
    as_flags,
    environment,
    run_training,
    train_command,
    write_toy_shards,
)
from transformers import GPT2Config, GPT2LMHeadModel

from train_accelerate import main
from training.memory import TensorBytes, available_memory, peak_memory
from training.micro_batch import with_largest_micro_batch
from training.recipe import TrainSettings
from training.settings import SettingsError, parse_settings
from training.throughput import describe_machine, flops_per_token, peak_of

CPU = torch.device("cpu")


def train_here(**settings) -> None:
    try:
        main(as_flags({**TOY_SETTINGS, **settings}))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_toy_shards(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def complaints(**settings) -> str:
    with pytest.raises(SettingsError) as caught:
        parse_settings(TrainSettings, as_flags(settings))
    return str(caught.value)


# The plan


def test_a_plan_says_memory_time_and_money_and_touches_nothing(shards, tmp_path, capsys):
    output = tmp_path / "plan.json"
    train_here(shards=shards, run_dir=tmp_path / "run", plan="true", plan_steps=4, plan_output=output,
               max_steps=1000, batch_tokens=1024, price_per_gpu_hour_usd=3600,
               mixed_precision="bf16")  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    plan, text = json.loads(output.read_text()), capsys.readouterr().out
    assert plan["steps"] == 1000 and plan["tokens"] == 1_024_000
    assert plan["flops"] == pytest.approx(plan["tokens"] * (6 * plan["parameters"] + 12 * 2 * 32 * 32))
    memory = plan["memory_bytes"]
    assert memory["weights"] == memory["gradients"] == 4 * plan["parameters"]
    # Two moments a weight, and a step count a tensor.
    assert memory["optimizer"] == pytest.approx(8 * plan["parameters"], rel=0.01)
    assert memory["activations"] > 4 * 4 * 32 * 32 * 2 and memory["loss"] > 0
    assert plan["total_usd"] == pytest.approx(plan["total_seconds"])  # a dollar a second
    assert plan["seconds"]["training"] == pytest.approx(1000 * plan["seconds_per_step"])
    for told in (
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "loss",
        "tokens/s",
        "MFU",
        "USD",
        "1,024,000",
    ):
        assert told in text, told
    assert "A new run" not in text


@pytest.mark.slow
def test_a_plan_knows_the_memory_of_the_run_to_a_tenth(shards, tmp_path):
    """Of the process at its highest, after a validation, samples and checkpoints.

    Weights and moments are a third of it here, so that leaving out any part would show.
    """
    size = {"n_layer": 4, "n_head": 8, "n_embd": 512, "block_size": 128, "micro_batch_size": 4}
    size |= {"batch_tokens": 1024, "max_steps": 4, "save_every_steps": 2, "eval_every_steps": 2}
    output = tmp_path / "plan.json"
    run_training(
        shards=shards, run_dir=tmp_path / "run", plan="true", plan_steps=3, plan_output=output, **size
    )
    run_training(shards=shards, run_dir=tmp_path / "run", **size)
    finished = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[-1])
    planned = json.loads(output.read_text())["total_memory_bytes"]
    assert planned == pytest.approx(finished["peak_memory_bytes"], rel=0.1)


def test_a_plan_refuses_what_cannot_work_and_names_what_can(shards, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_here(shards=shards, run_dir=tmp_path / "run", plan="true", batch_tokens=224)
    assert "batch_tokens=224 is not a multiple of 128" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_here(shards=shards, run_dir=tmp_path / "run", plan="true", n_embd=65536, n_layer=24, n_head=8)
    text = capsys.readouterr().err
    assert "GB for weights, gradients and AdamW's moments alone" in text and "FSDP2 over" in text
    assert not (tmp_path / "run").exists()


def test_shards_that_are_not_there_yet_are_planned_with_a_stand_in(tmp_path, capsys):
    corpus = {"shards": tmp_path / "none", "source": "fineweb-edu", "train_tokenizer": "none"}
    train_here(run_dir=tmp_path / "run", plan="true", plan_steps=2, eval_tokens=64, **corpus)
    assert "Memory of a process" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# Micro-batches

SCRIPT = """
import json, sys, yaml
settings = yaml.safe_load(open(sys.argv[2]))
rows = settings["micro_batch_size"]
with open({log!r}, "a") as log:
    log.write(str(rows) + " ")
if rows > {most}:
    raise MemoryError("out of memory")
plan = {{"total_memory_bytes": 1e6 * rows, "memory_available_bytes": 1e12}}
json.dump(plan, open(settings["plan_output"], "w"))
"""


@pytest.mark.parametrize("most, tried", [(99, "1 2 24"), (6, "1 2 24 12 8 6"), (1, "1 2")])
def test_the_largest_micro_batch_is_found_by_backing_off(tmp_path, most, tried):
    """A script that fails above a size which its own account of its memory does not betray."""
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(SCRIPT.format(most=most, log=str(log)))
    settings = TrainSettings(
        block_size=32, batch_tokens=32 * 24, micro_batch_size=3, find_micro_batch_size=True
    )
    try:
        found = with_largest_micro_batch(settings, str(script))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert log.read_text().split() == tried.split()
    assert found.micro_batch_size == min(most, 24) and not found.find_micro_batch_size


def test_where_not_one_row_fits_the_reason_is_said(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(most=0, log=str(tmp_path / "log")))
    with pytest.raises(SettingsError, match=r"not even one row fits.*MemoryError: out of memory"):
        with_largest_micro_batch(TrainSettings(), str(script))
    AcceleratorState._reset_state(reset_partial_state=True)


def run_with_little_memory(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Under a limit of addresses, as by a shell's `ulimit -v`."""
    limit = (3_000_000_000, 3_000_000_000)
    return subprocess.run(
        command,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
        cwd=folder,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit),
    )


@pytest.mark.slow
def test_a_process_with_little_memory_finds_its_micro_batch_and_trains(shards, tmp_path):
    """512 rows would need some 2 GB more than the first."""
    size = {"block_size": 128, "batch_tokens": 512 * 128, "n_layer": 4, "n_embd": 64, "max_steps": 1,
            "warmup_steps": 0, "eval_tokens": 1024}  # fmt: skip
    command = train_command(shards=shards, run_dir=tmp_path / "run", find_micro_batch_size="true", **size)
    done = run_with_little_memory(command, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = next(line for line in done.stdout.splitlines() if "is the largest that fits" in line)
    assert 8 <= int(found.split()[0].split("=")[1]) < 512, found


@pytest.mark.slow
def test_a_run_that_runs_out_of_memory_says_what_to_do(shards, tmp_path):
    size = {
        "block_size": 128,
        "batch_tokens": 4096 * 128,
        "micro_batch_size": 4096,
        "n_embd": 64,
        "max_steps": 1,
    }
    command = train_command(shards=shards, run_dir=tmp_path / "run", warmup_steps=0, **size)
    done = run_with_little_memory(command, tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert (
        "micro_batch_size=4,096 does not fit the memory" in done.stderr
        and "--micro_batch_size 2048" in done.stderr
    )


def test_living_tensors_are_counted_and_views_are_not():
    counter, given = TensorBytes(), torch.ones(1000)
    counter.ignore([given])
    with counter:
        kept = given[:500] * 2
        del kept
        kept = given.view(10, 100) + 1
        view = kept.T
    assert counter.now == 4000 and counter.peak == 4000
    del kept, view
    assert counter.now == 0


def test_this_machine_has_memory_and_this_process_has_taken_some():
    assert 100e6 < peak_memory(CPU) < available_memory(CPU)


# Devices


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4), ("NVIDIA B200", 2250), ("NVIDIA L4", 121), ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5), ("AMD Instinct MI300X", 1307.4), ("Apple M1 Pro", 5.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 0), ("NVIDIA GeForce RTX 4080 SUPER", 0), ("NVIDIA L40", 0),
        ("Apple M4 Max", 0), ("", 0),
    ],
)  # fmt: skip
def test_the_table_knows_devices_by_their_whole_name(name, tflops):
    """A laptop's GPU has the number of a faster card, and a few words more."""
    found, source = peak_of(name)
    assert found == tflops * 1e12 and bool(source) == bool(tflops)


def test_a_device_that_is_not_in_the_table_is_measured_or_asked_for(accelerator):
    model = torch.nn.Linear(2, 2)
    measured = describe_machine(accelerator, TrainSettings(), model)
    assert (
        measured.peak_flops > 1e8 and "measured here by a matrix product in float32" in measured.peak_source
    )
    asked = describe_machine(accelerator, TrainSettings(peak_tflops=2.5), model)
    assert asked.peak_flops == pytest.approx(2.5e12) and "as asked" in asked.peak_source
    assert asked.mfu(1.25e12 / asked.flops_per_token) == pytest.approx(0.5)


def test_a_token_of_gpt2_costs_what_is_published():
    """Six a parameter and attention's share: 0.86 GFLOP at 1,024 tokens; frozen weights need no gradient."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    assert flops_per_token(model, 1024) == pytest.approx(0.86e9, rel=0.005)
    everything = flops_per_token(model, 1024)
    model.requires_grad_(False)
    assert flops_per_token(model, 1024) == everything - 2 * sum(p.numel() for p in model.parameters())
