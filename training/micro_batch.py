"""The largest micro-batch that fits, found by trying: `--find_micro_batch_size`."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

from accelerate.utils import broadcast_object_list

from training.device import start_processes
from training.memory import data_limit
from training.recipe import TrainSettings
from training.run_directory import on_main_process
from training.settings import SettingsError, settings_as_yaml

# Of the available memory; a long run meets batches and fragments that a few steps do not.
PART_TO_FILL = 0.95
STEPS_OF_A_TRIAL = 3
PATIENCE = timedelta(hours=2)
# What launchers tell a process about the others; a trial is alone.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "FSDP_", "ACCELERATE_USE_FSDP")


def with_largest_micro_batch(settings: TrainSettings, script: str) -> TrainSettings:
    """`settings` with the largest `micro_batch_size` that divides the batch and fits.

    Every process calls this. Each candidate is tried in a process of its own, which runs `script --plan`
    and may run out of memory: the next smaller one is tried then. Where memory is sharded, what fits one
    process alone is found.

    Raises:
        SettingsError: if not even one row fits.
    """
    processes = start_processes()
    found: list[int] = []
    on_main_process(
        processes, lambda: found.append(_search(settings, script, processes.num_processes)), patience=PATIENCE
    )
    rows = broadcast_object_list(found or [0])[0]
    return dataclasses.replace(settings, micro_batch_size=rows, find_micro_batch_size=False)


def _search(settings: TrainSettings, script: str, processes: int) -> int:
    in_a_step, rest = divmod(settings.batch_tokens, settings.block_size * processes)
    if rest or not in_a_step:
        raise SettingsError(
            f"batch_tokens={settings.batch_tokens:,} is not a multiple of block_size {settings.block_size:,} "
            f"x {processes} processes, so no micro-batch divides it"
        )
    candidates = [rows for rows in range(1, in_a_step + 1) if in_a_step % rows == 0]
    settings = dataclasses.replace(settings, batch_tokens=settings.batch_tokens // processes)
    tried: dict[int, tuple[float, float]] = {}  # rows -> bytes needed and available
    limit = in_a_step + 1  # too many
    while True:
        rows = _next(candidates, tried, limit)
        if rows is None:
            best = max(tried)
            print(f"micro_batch_size={best:,} is the largest that fits.")
            return best
        needed, available, problem = _try(settings, script, rows)
        if problem and not tried and rows == 1:
            raise SettingsError(f"not even one row fits, or it fails for another reason: {problem}")
        if problem:
            print(f"{rows:,} rows: do not fit")
            limit = rows
        else:
            print(f"{rows:,} rows: {needed / 1e9:,.2f} GB of {available / 1e9:,.2f} GB")
            tried[rows] = (needed, available)


def _next(candidates: list[int], tried: dict[int, tuple[float, float]], limit: int) -> int | None:
    """The largest candidate that should fit by a straight line through what was tried; None at the end."""
    larger = [rows for rows in candidates if max(tried, default=0) < rows < limit]
    if len(tried) < 2:
        return larger[0] if larger else None
    (least, (base, _)), (most, (top, available)) = min(tried.items()), max(tried.items())
    per_row = max((top - base) / (most - least), 1.0)
    fitting = [rows for rows in larger if base + per_row * (rows - least) <= PART_TO_FILL * available]
    return fitting[-1] if fitting else None


def _try(settings: TrainSettings, script: str, rows: int) -> tuple[float, float, str]:
    """Bytes that a run with so many rows needs and has; or why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        output, config = Path(folder, "plan.json"), Path(folder, "trial.yaml")
        trial = dataclasses.replace(
            settings,
            micro_batch_size=rows,
            plan=True,
            plan_steps=STEPS_OF_A_TRIAL,
            plan_output=str(output),
            find_micro_batch_size=False,
        )
        config.write_text(settings_as_yaml(trial), encoding="utf-8")
        alone = {
            name: value
            for name, value in os.environ.items()
            if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
        }
        limits = data_limit()
        done = subprocess.run(
            [sys.executable, "-c", TRIAL, str(limits), script, "--config", str(config)],
            env=alone,
            capture_output=True,
            text=True,
        )
        if done.returncode or not output.exists():
            lines = (done.stderr or done.stdout).strip().splitlines()
            return 0.0, 0.0, lines[-1] if lines else f"it ended with code {done.returncode}"
        plan = json.loads(output.read_text(encoding="utf-8"))
        return plan["total_memory_bytes"], plan["memory_available_bytes"], ""


# A process that asks for more than there is must get an error, before the system starts to end processes.
TRIAL = """
import resource, runpy, sys
limit = int(float(sys.argv[1]))
if limit > 0:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
sys.argv = sys.argv[2:]
sys.path.insert(0, __import__("os").path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
