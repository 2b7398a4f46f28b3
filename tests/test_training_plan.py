"""Before and during a run: what it will take, how far its budget goes, what its device can do."""

import json
import math
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from training_toys import (
    ROOT,
    TOY_SETTINGS,
    as_flags,
    environment,
    run_training,
    train_command,
    write_toy_shards,
)
from transformers import GPT2Config, GPT2LMHeadModel

from train_accelerate import main
from training.memory import TensorBytes, available_memory
from training.micro_batch import with_largest_micro_batch
from training.plan import _plan, _refuse_what_is_too_large, is_out_of_memory
from training.probe import Probe, probe_settings, read_probe, seconds_of_a_step
from training.recipe import TrainSettings
from training.settings import SettingsError, parse_settings
from training.throughput import MEASURED_IN, describe_machine, flops_per_token, peak_of

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
    assert {"training", "validation", "samples"} <= plan["seconds"].keys()
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
    assert "GB for weights, gradients and the optimizer's moments alone" in text and "FSDP2 over" in text
    for output, why in ((tmp_path / "none" / "plan.json", "there is no folder"), (tmp_path, "is a folder")):
        with pytest.raises(SystemExit):  # once after all steps had been taken
            train_here(shards=shards, run_dir=tmp_path / "run", plan="true", plan_output=output)
        said = capsys.readouterr()
        assert f"--plan_output {output} cannot be written" in said.err and why in said.err
        assert "Running on" not in said.out
    assert not (tmp_path / "run").exists()


def test_a_frozen_base_needs_memory_for_its_weights_alone(accelerator):
    """LoRA on a base that fills half of the memory fits; training all of it does not."""
    side = int((available_memory(CPU) / 2 / 4) ** 0.5)
    settings = TrainSettings()
    with torch.device("meta"):
        model = nn.ModuleDict({"base": nn.Linear(side, side, bias=False), "adapter": nn.Linear(8, 8)})
    with pytest.raises(SettingsError, match="moments alone"):
        _refuse_what_is_too_large(model, settings, accelerator)
    model["base"].requires_grad_(False)
    _refuse_what_is_too_large(model, settings, accelerator)


def test_what_is_done_once_a_step_is_counted_once():
    """A step of n micro-batches of 1 s each, with an update of 0.3 s: it was once n / 2 updates."""
    assert seconds_of_a_step(1, 1.3, math.nan) == 1.3
    assert seconds_of_a_step(2, 1.3, 2.3) == pytest.approx(2.3)
    assert seconds_of_a_step(64, 1.3, 2.3) == pytest.approx(64.3)
    # Disturbed measurements: an update takes no less than nothing.
    assert seconds_of_a_step(10, 0.5, 2.0) == pytest.approx(10.0)
    assert seconds_of_a_step(10, 2.5, 2.0) == pytest.approx(10.0)


def test_a_plans_times_are_those_of_the_steps_and_of_the_second_looks(accelerator, tmp_path):
    """From files as a probe leaves them: rows that are not full, a first validation that compiles."""

    def probe(name: str, step_seconds: float, tokens: int) -> Probe:
        folder = tmp_path / name
        folder.mkdir()
        lines, seconds = [], [9.0, 1.5, *[step_seconds] * 18]
        for step, took in enumerate(seconds, start=1):
            lines.append(
                {"step": step, "tokens": tokens * step, "loss": 1.0, "tokens_per_second": tokens / took}
            )
        lines.append({"step": 20, "tokens": tokens * 20, "validation_loss": 1.0})
        started = {"event": "started", "processes": 1, "validation_rows": 10**6, "peak_tflops": 1.0,
                   "flops_per_token": 1e6}  # fmt: skip
        ended = {"event": "finished", "seconds": {"training": 99.0, "validation": 7.0, "samples": 1.0},
                 "last_seconds": {"training": 1.0, "validation": 2.0, "samples": 0.5}}  # fmt: skip
        for file, content in (("metrics.jsonl", lines), ("events.jsonl", [started, ended])):
            (folder / file).write_text("".join(json.dumps(line) + "\n" for line in content))
        return read_probe(folder)

    settings = TrainSettings(
        block_size=128, micro_batch_size=8, batch_tokens=64 * 1024, max_steps=1000, eval_every_steps=100,
        eval_tokens=80 * 1024, sample_every_steps=500, price_per_gpu_hour_usd=3600.0,
    )  # fmt: skip
    settings_of_probe = probe_settings(settings, 1, CPU, tmp_path, micro_batches=2, looks=True)
    assert settings_of_probe.batch_tokens == 2048 and settings_of_probe.eval_tokens == 8 * 1024
    # A micro-batch is named 1,024 tokens and has 700 in its rows; it takes a second, the update 0.2 s.
    both, single = probe("both", 2.2, 1400), probe("single", 1.2, 700)
    plan = _plan(settings, settings_of_probe, both, single, {"weights": 1.0}, 10)
    assert plan.seconds_per_step == pytest.approx(64.2)
    assert plan.tokens == 1000 * 64 * 700
    assert plan.tokens_per_second == pytest.approx(64 * 700 / 64.2)
    assert plan.seconds == pytest.approx({
        "training": 64_200.0,
        "validation": 10 * 2.0 * 10,  # of ten times the tokens
        "samples": 2 * 0.5,
        "compilation, first calls": (9.0 + 1.5 + 2.2 - 3 * 2.2) + (7.0 - 4.0),
    })  # fmt: skip
    assert plan.total_usd == pytest.approx(plan.total_seconds)


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


def test_what_fails_for_another_reason_than_memory_is_said_with_it(tmp_path, capsys):
    """It was once called too large, and its reason was dropped."""
    script = tmp_path / "script.py"
    broken = SCRIPT.replace(
        'MemoryError("out of memory")', 'RuntimeError("a worker is out of shared memory")'
    )
    settings = TrainSettings(block_size=32, batch_tokens=32 * 4, micro_batch_size=1)
    script.write_text(broken.format(most=1, log=str(tmp_path / "log")))
    assert with_largest_micro_batch(settings, str(script)).micro_batch_size == 1
    said = capsys.readouterr().out
    assert "2 rows: failed, not for want of memory: RuntimeError: a worker is out of shared" in said
    script.write_text(broken.format(most=0, log=str(tmp_path / "log")))
    with pytest.raises(SettingsError, match="a trial of one row failed: RuntimeError: a worker"):
        with_largest_micro_batch(settings, str(script))
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    "text, is_memory",
    [
        ("CUDA out of memory. Tried to allocate 20.00 GiB", True),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.", True),
        ("unable to mmap 99 bytes from file <x>: Cannot allocate memory (12)", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("DataLoader worker (pid 9) is killed by signal: Bus error. It is possible that dataloader's workers "
         "are out of shared memory. Please try to raise your shared memory limit.", False),
        ("unable to allocate shared memory(shm) for file </torch_9>: Cannot allocate memory (12)", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)  # fmt: skip
def test_memory_that_ran_out_is_told_from_other_errors_by_their_words(text, is_memory):
    assert is_out_of_memory(RuntimeError(text)) == is_memory


SHARDED = """
from training.device import as_script
from training.micro_batch import with_largest_micro_batch
from training.recipe import TrainSettings
with as_script():
    with_largest_micro_batch(TrainSettings(), __file__)
"""
ALONE_WITH_ITS_ERROR = """
import torch
from training.device import as_script, start_processes
from training.plan import plan_or_run
from training.recipe import TrainSettings
def run(settings, model):
    if start_processes().process_index == 1:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
    torch.distributed.barrier()
with as_script():
    plan_or_run(TrainSettings(micro_batch_size=6), lambda: None, run, __file__)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, code, said",
    [
        ("fsdp2", SHARDED, "which would hold all of a model that FSDP2 is to share among 2"),
        ("ddp", ALONE_WITH_ITS_ERROR, "micro_batch_size=6 does not fit the memory (DefaultCPUAllocator"),
    ],
)  # fmt: skip
def test_two_processes_say_why_they_cannot_go_on(tmp_path, config, code, said):
    """Also where only the second has the error: its advice was once lost."""
    script = tmp_path / "script.py"
    script.write_text(code)
    config_file = ROOT / "accelerate_configs" / f"{config}.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config_file)]
    done = subprocess.run(
        [*launch, "--num_processes", "2", "--main_process_port", "0", str(script)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode and "error: " in done.stderr and said in done.stderr, done.stderr


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


# Devices


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4), ("NVIDIA B200", 2250), ("NVIDIA L4", 121), ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5), ("AMD Instinct MI300X", 1307.4), ("Apple M1 Pro", 5.2),
        ("NVIDIA GeForce RTX 4080 SUPER", 104.5), ("NVIDIA GeForce RTX 3060", 25.5),
        ("NVIDIA GeForce RTX 5060 Ti", 47.4), ("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-16GB", 112),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 0), ("NVIDIA GeForce RTX 4060 Laptop GPU", 0),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 0), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 0),
        ("GRID A100-4C", 0), ("NVIDIA L40", 0), ("Apple M4 Max", 0), ("", 0),
    ],
)  # fmt: skip
def test_the_table_knows_devices_by_their_whole_name(name, tflops):
    """A laptop's GPU has the number of a faster card and a few words more, and so has a slice of a GPU."""
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


@pytest.mark.parametrize("precision, measured_in", [("no", "float32"), ("bf16", "bfloat16")])
def test_a_device_is_measured_in_the_type_that_the_run_multiplies_in(precision, measured_in):
    """The run's own random numbers are left alone; those of GPUs in float16 and FP8 are tried on GPUs."""
    AcceleratorState._reset_state(reset_partial_state=True)
    model, before = nn.Linear(2, 2), torch.get_rng_state()
    machine = describe_machine(Accelerator(cpu=True, mixed_precision=precision), TrainSettings(), model)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert machine.peak_source == f"measured here by a matrix product in {measured_in}"
    assert torch.equal(before, torch.get_rng_state())


def test_no_precision_but_float32_is_measured_in_float32():
    """Runs in float16 and FP8 once were, and used more than all of what they were given."""
    assert MEASURED_IN.keys() == {"bf16", "fp16", "fp8"} and torch.float32 not in MEASURED_IN.values()


def test_a_token_of_gpt2_costs_what_is_published():
    """Six a parameter and attention's share: 0.86 GFLOP at 1,024 tokens; frozen weights need no gradient."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    assert flops_per_token(model, 1024) == pytest.approx(0.86e9, rel=0.005)
    everything = flops_per_token(model, 1024)
    model.requires_grad_(False)
    assert flops_per_token(model, 1024) == everything - 2 * sum(p.numel() for p in model.parameters())
