"""Slurm and Ray run the same tasks and give the same bytes."""

import os
import stat

import pytest

from data.prepare import main
from tests.test_data_resilience import hashes, run, tokenizer_folder, write_files

__all__ = ["tokenizer_folder"]  # a fixture

SBATCH = r"""#!/bin/bash
# Stands in for Slurm's own: runs every task of the array here, one by one, and prints a job id.
script="${@: -1}"
export SLURM_NODELIST=localhost SLURM_JOB_ID=7 RUN_OFFSET=0
last=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\).*/\1/p' "$script")
for task in $(seq 0 "${last:--1}"); do
  SLURM_ARRAY_TASK_ID="$task" bash "$script" >> "$SLURM_LOG" 2>&1
done
echo "Submitted batch job 7"
"""
SRUN = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do [ "$1" = "-n" ] && shift; shift; done
exec "$@"
"""
SQUEUE = """#!/bin/sh
exit 0
"""
SCONTROL = """#!/bin/sh
echo localhost
"""


@pytest.mark.slow
def test_a_slurm_array_job_encodes_and_the_same_command_finishes(tmp_path, tokenizer_folder):
    """Slurm's programs are played by shell scripts; the job script, its environment and its tasks are
    real.
    """
    source = write_files(tmp_path / "source", files=2)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, content in {"sbatch": SBATCH, "srun": SRUN, "squeue": SQUEUE, "scontrol": SCONTROL}.items():
        (programs / name).write_text(content)
        (programs / name).chmod(stat.S_IRWXU)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_LOG": str(tmp_path / "slurm.log"),
    }
    arguments = (
        source,
        tmp_path / "slurm",
        tokenizer_folder,
        "--executor",
        "slurm",
        "--slurm_partition",
        "cpu",
    )
    submitted = run(*arguments, env=environment)
    assert submitted.returncode == 0, submitted.stderr
    assert "Slurm job 7 was submitted for 2 parts" in submitted.stdout
    assert not (tmp_path / "slurm" / "manifest.json").exists()
    finished = run(*arguments, env=environment)
    assert finished.returncode == 0, finished.stderr + (tmp_path / "slurm.log").read_text()
    here = run(source, tmp_path / "local", tokenizer_folder)
    assert here.returncode == 0, here.stderr
    assert hashes(tmp_path / "slurm") == hashes(tmp_path / "local")


def test_slurm_needs_a_partition_and_a_program(tmp_path, tokenizer_folder, capsys):
    source = write_files(tmp_path / "source", files=1, documents=5)
    flags = ["--source", str(source), "--output", str(tmp_path / "out"), "--tokenizer", tokenizer_folder]
    assert main([*flags, "--executor", "slurm"]) == 1
    assert "--slurm_partition" in capsys.readouterr().err
    assert main([*flags, "--executor", "pbs", "--workers", "0"]) == 1
    assert "executor='pbs' is none of local, slurm, ray; workers=0" in capsys.readouterr().err


@pytest.mark.slow
def test_a_ray_cluster_encodes_the_same_bytes(tmp_path, tokenizer_folder):
    pytest.importorskip("ray", reason="Ray is an option of preparation, not a dependency")
    source = write_files(tmp_path / "source", files=2)
    done = run(source, tmp_path / "ray", tokenizer_folder, "--executor", "ray")
    assert done.returncode == 0, done.stderr
    here = run(source, tmp_path / "local", tokenizer_folder)
    assert here.returncode == 0, here.stderr
    assert hashes(tmp_path / "ray") == hashes(tmp_path / "local")
