"""The same tasks as `engine.encode_locally`, on a Slurm or a Ray cluster; all machines share the output's
filesystem.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from datatrove.executor import RayPipelineExecutor, SlurmPipelineExecutor

from data.engine import Job, Stage, stages
from data.progress import Task
from data.settings import PrepareSettings

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = 3  # of failed tasks that a message names


class StillRunning(Exception):
    """The cluster is at work; the message says how far it is and what to do."""


def encode_on_slurm(job: Job, settings: PrepareSettings) -> list[Path]:
    """Submit array jobs for what is not there, one a stage; returns the parts' folders once all are.

    Raises:
        StillRunning: after submitting, again too, and while the jobs run.
        ValueError: without `slurm_partition`, or if sbatch refuses.
    """
    folders = job.folders
    done = sum(folder.exists() for folder in folders)
    if done == len(folders):
        return folders
    job_file = job.work / "slurm_job"
    follow = f"Run the same command again when it has ended, to go on. Logs are in {job.work / 'log'}."
    if job_file.exists() and (number := job_file.read_text()) and _is_queued(number):
        raise StillRunning(
            f"Slurm job {number} is at work: {done:,} of {len(folders):,} parts are encoded. {follow}"
        )
    if settings.slurm_partition is None:
        raise ValueError("--executor slurm needs --slurm_partition.")
    # A job whose forerunner failed would otherwise wait in the queue for ever.
    sbatch = {"kill-on-invalid-dep": "yes"}
    if settings.slurm_account is not None:
        sbatch["account"] = settings.slurm_account
    executor = None
    steps = stages(job, owner=None)
    before = f"Slurm job {job_file.read_text()} has ended; {_missing(steps)} " if job_file.exists() else ""
    for stage in steps:
        executor = SlurmPipelineExecutor(
            stage.steps,
            tasks=len(stage.tasks),
            time=settings.slurm_time,
            partition=settings.slurm_partition,
            qos=settings.slurm_qos or "",
            cpus_per_task=settings.slurm_cpus,
            mem_per_cpu_gb=-(-settings.slurm_memory_gb // settings.slurm_cpus),  # sbatch takes whole ones
            workers=settings.workers or -1,
            job_name=f"{stage.name}-token-shards",
            depends=executor,
            sbatch_args=dict(sbatch),
            # Tasks start in a shell of their own: they get this interpreter's programs and this checkout.
            env_command=f"export PATH={shlex.quote(os.path.dirname(sys.executable))}:$PATH "
            f"PYTHONPATH={shlex.quote(os.fspath(REPOSITORY))}:$PYTHONPATH",
            logging_dir=os.fspath(stage.log),
            slurm_logs_folder=os.fspath(stage.log / "slurm"),
        )
    assert executor is not None
    try:
        executor.run()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"The job could not be submitted with sbatch: {error}") from error
    job_file.write_text(str(executor.job_id))
    raise StillRunning(
        f"{before}Slurm job {executor.job_id} was submitted for {len(folders) - done:,} parts. {follow}"
    )


def _missing(steps: list[Stage]) -> str:
    """What of the first stage that is not complete was not done, in a sentence."""
    for stage in steps:
        missing = [task for task in stage.tasks if not task.done.exists()]
        if missing:
            break
    examples = "; ".join(f"{task.label}{_of_files(task)}" for task in missing[:EXAMPLES])
    return (
        f"{len(missing):,} of {len(stage.tasks):,} tasks of {stage.name} failed or never began, such as "
        f"{examples}; their logs are in {stage.log}."
    )


def _is_queued(job: str) -> bool:
    """Whether Slurm still has tasks of this job; one that it has forgotten has ended."""
    listed = subprocess.run(
        ["squeue", "--noheader", "--jobs", job], capture_output=True, text=True, check=False
    )
    return listed.returncode == 0 and bool(listed.stdout.strip())


def _of_files(task: Task) -> str:
    return f" ({task.files[0]}{', …' * (len(task.files) > 1)})" if task.files else ""


def encode_on_ray(job: Job, settings: PrepareSettings) -> list[Path]:
    """Encode the parts that are not there yet on the Ray cluster that RAY_ADDRESS names, or on one started
    here.
    """
    try:
        import ray  # an optional dependency
    except ImportError as error:
        raise ValueError(f"--executor ray needs Ray ({error}): pip install ray.") from error
    if not ray.is_initialized():
        path = os.pathsep.join(filter(None, [os.fspath(REPOSITORY), os.environ.get("PYTHONPATH")]))
        ray.init(runtime_env={"env_vars": {"PYTHONPATH": path}}, log_to_driver=False)
    for stage in stages(job, owner=None):
        RayPipelineExecutor(
            stage.steps,
            tasks=len(stage.tasks),
            workers=settings.workers or -1,
            cpus_per_task=settings.slurm_cpus,
            mem_per_cpu_gb=settings.slurm_memory_gb / settings.slurm_cpus,
            logging_dir=os.fspath(stage.log),
        ).run()
        if any(not task.done.exists() for task in stage.tasks):
            raise ValueError(f"On the cluster, {_missing([stage])} Run the same command again to go on.")
    return job.folders
