"""The same tasks as `engine.encode_locally`, on a Slurm or a Ray cluster; all machines share the output's
filesystem.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

from datatrove.executor import RayPipelineExecutor, SlurmPipelineExecutor

from data.engine import EncodePart, ReadPart, part_folders
from data.settings import PrepareSettings
from data.sources import Part, SourceSpec

REPOSITORY = Path(__file__).resolve().parent.parent
CPUS_PER_TASK = 1  # each task encodes in one thread: parts are many, and tasks then pack any machine
MEMORY_PER_TASK_GB = 2


class StillRunning(Exception):
    """The cluster is at work; the message says how far it is and what to do."""


def encode_on_slurm(
    settings: PrepareSettings,
    spec: SourceSpec,
    parts: list[Part],
    tokenizer_folder: Path,
    work: Path,
    why_slow: str | None,
) -> list[Path]:
    """Submit an array job for the parts that are not there; returns their folders once all are.

    Raises:
        StillRunning: after submitting, and while the job runs.
        ValueError: without `slurm_partition`, or if sbatch refuses.
    """
    folders = part_folders(work, parts)
    done = sum(folder.exists() for folder in folders)
    if done == len(parts):
        return folders
    job_file = work / "slurm_job"
    follow = "Run the same command again when it has ended, to go on."
    if job_file.exists() and (job := job_file.read_text()) and _is_queued(job):
        raise StillRunning(
            f"Slurm job {job} is at work: {done:,} of {len(parts):,} parts are encoded. {follow}"
        )
    if settings.slurm_partition is None:
        raise ValueError("--executor slurm needs --slurm_partition.")
    executor = SlurmPipelineExecutor(
        _pipeline(settings, spec, parts, folders, tokenizer_folder, why_slow),
        tasks=len(parts),
        time=settings.slurm_time,
        partition=settings.slurm_partition,
        qos="",
        cpus_per_task=CPUS_PER_TASK,
        mem_per_cpu_gb=MEMORY_PER_TASK_GB // CPUS_PER_TASK,
        workers=settings.workers or -1,
        job_name="prepare-token-shards",
        # Tasks start in a shell of their own: they get this interpreter's programs and this checkout.
        env_command=f"export PATH={shlex.quote(os.path.dirname(sys.executable))}:$PATH "
        f"PYTHONPATH={shlex.quote(os.fspath(REPOSITORY))}:$PYTHONPATH",
        logging_dir=os.fspath(work.absolute() / "log"),
        slurm_logs_folder=os.fspath(work.absolute() / "log" / "slurm"),
    )
    try:
        executor.run()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"The job could not be submitted with sbatch: {error}") from error
    job_file.write_text(str(executor.job_id))
    raise StillRunning(f"Slurm job {executor.job_id} was submitted for {len(parts) - done:,} parts. {follow}")


def _is_queued(job: str) -> bool:
    """Whether Slurm still has tasks of this job; one that it has forgotten has ended."""
    listed = subprocess.run(
        ["squeue", "--noheader", "--jobs", job], capture_output=True, text=True, check=False
    )
    return listed.returncode == 0 and bool(listed.stdout.strip())


def encode_on_ray(
    settings: PrepareSettings,
    spec: SourceSpec,
    parts: list[Part],
    tokenizer_folder: Path,
    work: Path,
    why_slow: str | None,
) -> list[Path]:
    """Encode the parts that are not there yet on the Ray cluster that RAY_ADDRESS names, or on one started
    here.
    """
    import ray  # an optional dependency

    folders = part_folders(work, parts)
    if not ray.is_initialized():
        path = os.pathsep.join(filter(None, [os.fspath(REPOSITORY), os.environ.get("PYTHONPATH")]))
        ray.init(runtime_env={"env_vars": {"PYTHONPATH": path}}, log_to_driver=False)
    RayPipelineExecutor(
        _pipeline(settings, spec, parts, folders, tokenizer_folder, why_slow),
        tasks=len(parts),
        workers=settings.workers or -1,
        cpus_per_task=CPUS_PER_TASK,
        mem_per_cpu_gb=MEMORY_PER_TASK_GB / CPUS_PER_TASK,
        logging_dir=os.fspath(work.absolute() / "log"),
    ).run()
    missing = [folder.name for folder in folders if not folder.exists()]
    if missing:
        raise ValueError(
            f"{len(missing):,} of {len(parts):,} parts failed on the cluster, such as {missing[0]}; their "
            "logs are in "
            f"{work / 'log' / 'logs'}. Run the same command again to go on."
        )
    return folders


def _pipeline(
    settings: PrepareSettings,
    spec: SourceSpec,
    parts: list[Part],
    folders: list[Path],
    tokenizer_folder: Path,
    why_slow: str | None,
) -> list:
    counts: dict[int, Counter[str]] = {}
    return [
        ReadPart(spec, parts, counts),
        EncodePart(
            folders,
            tokenizer_folder.absolute(),
            CPUS_PER_TASK,
            why_slow,
            None,
            settings.contamination,
            counts,
            owner=None,
        ),
    ]
