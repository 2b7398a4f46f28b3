"""Scaling: tokens/s at one and two processes, and memory by model size, beside what --plan says.

    python -m benchmarks.scaling

Real runs of train_accelerate.py, one thread a process where there is no GPU. Two processes take twice the
batch. On a CPU, where Accelerate shards nothing, FSDP2 is that of tests/fsdp2_on_cpu.py, through gloo. Memory
is the highest resident set of a training process.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ROOT, Result, Table, benchmark_parser, median, reported

sys.path.append(str(ROOT / "tests"))

from training_toys import write_toy_shards

SIZES = {
    "4 layers of 256": ["--n_layer", "4", "--n_head", "4", "--n_embd", "256"],
    "8 layers of 512": ["--n_layer", "8", "--n_head", "8", "--n_embd", "512"],
}
TOY = {"toy": ["--n_layer", "1", "--n_head", "2", "--n_embd", "32"]}
ONE, CHECKPOINTED, DDP, FSDP2 = "one process", "one, activation checkpointing", "two, DDP", "two, FSDP2"
KINDS = {ONE: 1, CHECKPOINTED: 1, DDP: 2, FSDP2: 2}
ROWS, BLOCK = 8, 256
POLL_SECONDS = 0.05


def command_of(kind: str, on_gpu: bool) -> list[str]:
    if KINDS[kind] == 1:
        return [sys.executable, str(ROOT / "train_accelerate.py")]
    config = ROOT / "accelerate_configs" / ("ddp.yaml" if kind == DDP else "fsdp2.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launch += ["--num_processes", str(KINDS[kind]), "--main_process_port", "0"]
    script = "train_accelerate.py" if on_gpu or kind == DDP else "tests/fsdp2_on_cpu.py"
    return [*launch, str(ROOT / script)]


def descendants(process: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{process}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def peak_of(process: int) -> int:
    """Bytes; 0 if it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 2**10
    except (OSError, IndexError):
        return 0


def run(command: list[str]) -> float:
    """Runs to the end; the highest resident set among its processes, in bytes."""
    peak = 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            peak = max([peak, *map(peak_of, [process.pid, *descendants(process.pid)])])
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{output.read()[-2000:]}")
    return peak


def measure(kind: str, size: list[str], base: Path, arguments: Any) -> dict[str, Any]:
    """A run of some steps and the plan of the same run."""
    rows, block = (2, 32) if arguments.quick else (ROWS, BLOCK)
    run_dir, plan = Path(tempfile.mkdtemp(dir=base)), base / "plan.json"
    flags = ["--config", str(ROOT / "recipes" / "demo.yaml"), "--shards", str(base / "toy" / "shards"), *size]
    flags += ["--block_size", str(block), "--micro_batch_size", str(rows), "--warmup_steps", "0"]
    flags += ["--batch_tokens", str(rows * block * KINDS[kind]), "--max_steps", str(arguments.steps)]
    flags += ["--log_every_steps", "1", "--eval_tokens", str(rows * block), "--sample_tokens", "1"]
    # With a checkpoint half-way, whose copy is in memory from then on, beside the steps after it.
    flags += ["--save_every_steps", str(arguments.steps // 2), "--cpu_threads", "1"]
    flags += ["--activation_checkpointing", "true" if kind == CHECKPOINTED else "false"]
    command = command_of(kind, arguments.device == "cuda")
    peak = run([*command, *flags, "--run_dir", str(run_dir / "run")])
    lines = [json.loads(line) for line in (run_dir / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    planned = [
        "--plan",
        "--plan_steps",
        "5",
        "--plan_output",
        str(plan),
        "--run_dir",
        str(run_dir / "planned"),
    ]
    run([*command, *flags, *planned])
    return {
        "kind": kind,
        "processes": KINDS[kind],
        "tokens_per_second": median(rates[len(rates) // 3 :]),  # the first third warms up
        "peak_bytes": peak,
        "planned_bytes": json.loads(plan.read_text())["total_memory_bytes"],
    }


def main() -> None:
    parser = benchmark_parser(str(__doc__))
    parser.add_argument("--steps", type=int, default=24, help="of each run")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.kinds = 4, [ONE, DDP]
    sizes = TOY if arguments.quick else SIZES
    result = Result(
        "scaling",
        "Scaling",
        "Real runs, a thread a process, on one machine. Efficiency is tokens/s over those of as many single "
        "processes; memory is that of the largest process, with Python and its libraries, beside --plan's.",
    )
    if torch.cuda.is_available():
        raise SystemExit("on GPUs `--plan` under the launcher tells the same; this one reads resident sets")
    result.not_run.append(["GPUs", "none here; `--plan` under `accelerate launch` tells each figure there"])
    with reported(result, arguments.json), tempfile.TemporaryDirectory() as temporary:
        write_toy_shards(Path(temporary) / "toy", documents=400 if arguments.quick else 8000)
        rows = []
        for name, size in sizes.items():
            alone = None
            for kind in arguments.kinds:
                found = measure(kind, size, Path(temporary), arguments)
                alone = alone or found
                efficiency = found["tokens_per_second"] / alone["tokens_per_second"] / found["processes"]
                off = found["planned_bytes"] / found["peak_bytes"] - 1
                result.figures.append({"model": name, **found, "efficiency": efficiency, "plan_off": off})
                rows.append([name, kind, f"{found['tokens_per_second']:,.0f}", f"{efficiency:.2f}"])
                rows[-1] += [f"{found['peak_bytes'] / 2**20:,.0f}", f"{found['planned_bytes'] / 2**20:,.0f}"]
                rows[-1].append(f"{off:+.0%}")
                print(rows[-1], flush=True)
        columns = [
            "model",
            "processes",
            "tokens/s",
            "efficiency",
            "peak MiB",
            "planned MiB",
            "plan beside peak",
        ]
        result.tables.append(Table("", columns, rows))


if __name__ == "__main__":
    main()
