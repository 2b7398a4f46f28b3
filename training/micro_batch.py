"""The largest micro-batch that fits, found by trying: `--find_micro_batch_size`."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from accelerate.utils import broadcast_object_list

from training.device import start_processes
from training.memory import DOES_NOT_FIT, data_limit, says_out_of_memory
from training.recipe import TrainSettings
from training.run_directory import on_main_process
from training.settings import SettingsError, settings_as_yaml
from training.sharding import is_sharding_asked_for

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
    and may run out of memory: the next smaller one is tried then.

    Raises:
        SettingsError: if not even one row fits, or if the model is sharded.
    """
    processes = start_processes()
    if processes.num_processes > 1 and is_sharding_asked_for():
        raise SettingsError(
            "find_micro_batch_size tries each size in a process of its own, which would hold all of a model "
            f"that FSDP2 is to share among {processes.num_processes:,}: what fits there says nothing. On the "
            "same processes, --plan prints what --micro_batch_size 1 takes and what there is; the part named "
            "activations grows with the rows."
        )
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
        if problem and rows == 1:
            what = "not even one row fits" if problem.is_of_memory else "a trial of one row failed"
            raise SettingsError(f"{what}: {problem.text}")
        if problem:
            why = "do not fit" if problem.is_of_memory else f"failed, not for want of memory: {problem.text}"
            print(f"{rows:,} rows: {why}")
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


@dataclass(frozen=True)
class Problem:
    """Why a trial ended without a plan, and whether that is because it had too little memory."""

    text: str
    is_of_memory: bool


def _try(settings: TrainSettings, script: str, rows: int) -> tuple[float, float, Problem | None]:
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
            eval_tokens=1,  # one batch
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
            return 0.0, 0.0, _problem(done.returncode, done.stderr or done.stdout)
        plan = json.loads(output.read_text(encoding="utf-8"))
        return plan["total_memory_bytes"], plan["memory_available_bytes"], None


def _problem(code: int, said: str) -> Problem:
    """What a trial that ended with `code` died of, by its last words."""
    lines = said.strip().splitlines() or [f"it ended with code {code}"]
    last = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
    # A system that has no more memory ends processes by SIGKILL, and lets them say nothing.
    return Problem(last, code == -9 or DOES_NOT_FIT in last or says_out_of_memory(last))


# A process that asks for more than there is must get an error, before the system starts to end processes.
TRIAL = """
import runpy, sys
limit = int(float(sys.argv[1]))
if limit > 0:
    import resource
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
sys.argv = sys.argv[2:]
sys.path.insert(0, __import__("os").path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
