"""Start-up: process start to first step, first to last byte of a checkpoint, resume to first step.

    python -m benchmarks.startup

Real processes of train_accelerate.py with the demo's model, on shards that exist. The first step's end is the
moment its line stands in metrics.jsonl. A checkpoint lasts from its folder's appearance to its marker's. With
--compiled also the same with torch.compile, with an empty cache of compiled code and with that cache.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Result, Table, benchmark_parser, median, reported, with_spread

sys.path.append(str(ROOT / "tests"))

from training_toys import write_toy_shards

POLL_SECONDS = 0.002
SAVE_AT_STEP = 3
TOY = ["--n_layer", "1", "--n_head", "2", "--n_embd", "32", "--block_size", "32", "--batch_tokens", "256"]


def watched(flags: list[str], run_dir: Path, environment: dict[str, str], save: bool) -> dict[str, float]:
    """Start a run; seconds to its first new step and, if it is to `save`, of its first checkpoint."""
    metrics, checkpoints = run_dir / "metrics.jsonl", run_dir / "checkpoints"
    lines_before = metrics.read_text(encoding="utf-8").count('"loss"') if metrics.exists() else 0
    already = set(checkpoints.iterdir()) if checkpoints.exists() else set()
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_accelerate.py"), *flags, "--run_dir", str(run_dir)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
    )
    first_byte = 0.0
    try:
        while process.poll() is None and not (
            "first_step" in seconds and (not save or "checkpoint" in seconds)
        ):
            time.sleep(POLL_SECONDS)
            now = time.perf_counter()
            if "first_step" not in seconds and metrics.exists():
                lines = metrics.read_text(encoding="utf-8", errors="ignore").count('"loss"')
                if lines > lines_before:
                    seconds["first_step"] = now - began
            new = set(checkpoints.iterdir()) - already if save and checkpoints.exists() else set()
            if new and not first_byte:
                first_byte = now
            if first_byte and any((folder / "COMPLETE").exists() for folder in new):
                seconds.setdefault("checkpoint", now - first_byte)
    finally:
        process.kill()
        errors = process.communicate()[1]
    if "first_step" not in seconds or (save and "checkpoint" not in seconds):
        raise RuntimeError(f"the run ended before its first step or checkpoint:\n{errors.decode()[-2000:]}")
    return seconds


def measure(flags: list[str], base: Path, environment: dict[str, str], rounds: int) -> dict[str, list[float]]:
    """Each figure once a round, every round in a new run directory."""
    found: dict[str, list[float]] = {"start": [], "checkpoint": [], "resume": []}
    for number in range(rounds):
        run_dir = base / f"run-{number}"
        fresh = watched(flags, run_dir, environment, save=True)
        found["start"].append(fresh["first_step"])
        found["checkpoint"].append(fresh["checkpoint"])
        found["resume"].append(watched(flags, run_dir, environment, save=False)["first_step"])
    return found


def main() -> None:
    parser = benchmark_parser(str(__doc__))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="with torch.compile as well: minutes more")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds = 1
    result = Result(
        "startup",
        "Start-up",
        "Real processes of `train_accelerate.py` with the demo's model on shards that exist, median of "
        f"{arguments.rounds} runs. Libraries are in the page cache after the first. Training goes on "
        "while a checkpoint is written.",
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with reported(result, arguments.json), tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        shards = write_toy_shards(base / "toy", documents=400 if arguments.quick else 8000)
        flags = [
            "--config",
            str(ROOT / "recipes" / "demo.yaml"),
            "--shards",
            str(shards),
            "--warmup_steps",
            "0",
        ]
        flags += ["--max_steps", "100000", "--log_every_steps", "1", "--eval_every_steps", "100000"]
        flags += [
            "--sample_every_steps",
            "100000",
            "--save_every_steps",
            str(SAVE_AT_STEP),
            "--keep_last",
            "1000",
        ]
        flags += ["--eval_tokens", "4096", "--sample_tokens", "1"]
        flags += ["--cpu_threads", str(arguments.threads), *(TOY if arguments.quick else [])]
        rows: list[list[str]] = []

        def add(name: str, values: list[float]) -> None:
            rows.append([name, with_spread(values, ",.2f")])
            result.figures.append({"what": name, "seconds": values, "median": median(values)})

        found: dict[str, Any] = measure([*flags, "--compile", "none"], base, environment, arguments.rounds)
        add("process start to the end of the first step", found["start"])
        add("first to last byte of a checkpoint", found["checkpoint"])
        add("the same command again, to the end of its first step", found["resume"])
        if arguments.compiled:
            compiling = {**environment, "TORCHINDUCTOR_CACHE_DIR": str(base / "cache")}
            whole = [*flags, "--compile", "whole"]
            cold, warm = (watched(whole, base / name, compiling, save=False) for name in ("cold", "warm"))
            add("compiled, nothing cached: process start to the end of the first step", [cold["first_step"]])
            add("compiled, cached by the run before: the same", [warm["first_step"]])
        result.tables.append(Table("", ["", "seconds (smallest–largest)"], rows))


if __name__ == "__main__":
    main()
