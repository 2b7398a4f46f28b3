"""The plan beside the run: seconds and bytes that --plan says, and those that the same run then takes.

    python -m benchmarks.plan

Real processes of train_accelerate.py. The run's seconds are those of its training, validations and samples,
as its last event has them; the plan's are of the same. Its bytes are its highest resident set, on a GPU those
that were reserved.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import ROOT, Result, Table, benchmark_parser, reported

sys.path.append(str(ROOT / "tests"))

from training_toys import write_toy_shards

SMALL = ["--n_layer", "4", "--n_head", "4", "--n_embd", "256"]
LARGER = ["--n_layer", "6", "--n_head", "6", "--n_embd", "384"]
# What is done once a step is most of a step in the first, and little of it in the last.
CASES = {
    "6 layers of 384, 1 row x 1 micro-batch": (LARGER, 1, 1),
    "6 layers of 384, 1 row x 8 micro-batches": (LARGER, 1, 8),
    "4 layers of 256, 4 rows x 8 micro-batches": (SMALL, 4, 8),
}
TOY = {"toy": (["--n_layer", "1", "--n_head", "2", "--n_embd", "32"], 1, 4)}
BLOCK = 256
ACTIVITIES = ("training", "validation", "samples")


def flags_of(
    size: list[str], rows: int, micro_batches: int, shards: Path, steps: int, threads: int
) -> list[str]:
    numbers = {
        "block_size": BLOCK,
        "micro_batch_size": rows,
        "batch_tokens": rows * micro_batches * BLOCK,
        "max_steps": steps,
        "warmup_steps": 0,
        "eval_every_steps": steps // 4,
        "eval_tokens": 16 * rows * BLOCK,
        "sample_every_steps": steps // 2,
        "save_every_steps": steps // 4,
        "sample_tokens": 32,
        "cpu_threads": threads,
    }
    chosen = [word for name, number in numbers.items() for word in (f"--{name}", str(number))]
    recipe = ["--config", str(ROOT / "recipes" / "demo.yaml"), "--shards", str(shards), "--compile", "none"]
    return [*recipe, *size, *chosen]


def start(flags: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "train_accelerate.py"), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def main() -> None:
    parser = benchmark_parser(str(__doc__))
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps = 8
    result = Result(
        "plan",
        "The plan beside the run",
        f"`--plan` and then the same run, of {arguments.steps} steps with four validations and checkpoints. "
        "Seconds are of training, validations and samples; memory is that of the process at its highest.",
    )
    with reported(result, arguments.json), tempfile.TemporaryDirectory() as temporary:
        shards = write_toy_shards(Path(temporary) / "toy", documents=400 if arguments.quick else 8000)
        rows = []
        for number, (name, case) in enumerate((TOY if arguments.quick else CASES).items()):
            flags = flags_of(*case, shards, arguments.steps, arguments.threads)
            output, run_dir = Path(temporary) / f"plan-{number}.json", Path(temporary) / f"run-{number}"
            start([*flags, "--run_dir", str(run_dir), "--plan", "--plan_output", str(output)])
            start([*flags, "--run_dir", str(run_dir)])
            plan = json.loads(output.read_text(encoding="utf-8"))
            ended = json.loads((run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()[-1])
            seconds = [plan["total_seconds"], sum(ended["seconds"].get(what, 0.0) for what in ACTIVITIES)]
            memory = [plan["total_memory_bytes"], ended["peak_memory_bytes"]]
            off = [planned / taken - 1 for planned, taken in (seconds, memory)]
            result.figures.append({"case": name, "plan": plan, "run": ended, "off": off})
            rows.append([name, *(f"{value:,.1f}" for value in seconds), f"{off[0]:+.1%}"])
            rows[-1] += [*(f"{value / 2**20:,.0f}" for value in memory), f"{off[1]:+.1%}"]
            print(rows[-1], flush=True)
        columns = ["", "planned s", "run's s", "off", "planned MiB", "run's MiB", "off"]
        result.tables.append(Table("", columns, rows))


if __name__ == "__main__":
    main()
