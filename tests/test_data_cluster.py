"""Slurm and Ray run the same tasks and give the same bytes."""

import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from data.prepare import TRY_AGAIN_LATER, main
from data.shards import read_manifest
from tests.test_data_resilience import hashes, run, tokenizer_folder, write_files

__all__ = ["tokenizer_folder"]  # a fixture
PATH = f"{os.environ['PATH']}:/usr/sbin"  # where Debian has the daemons

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={next_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
ReturnToService=2
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=cpu Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path):
    """A Slurm of one machine with two cores, from Debian's packages; yields the environment of its users."""
    missing = [
        name
        for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun")
        if not shutil.which(name, path=PATH)
    ]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here; on Debian: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts jobs as their users, which takes root")
    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)  # munge's socket stands here, and wants a folder that others may look into
    with socket.socket() as taken, socket.socket() as also_taken:
        taken.bind(("127.0.0.1", 0))
        also_taken.bind(("127.0.0.1", 0))
        port, next_port = taken.getsockname()[1], also_taken.getsockname()[1]
    host = socket.gethostname().split(".")[0]
    configuration = folder / "slurm.conf"
    configuration.write_text(SLURM_CONF.format(host=host, port=port, next_port=next_port, folder=folder))
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(configuration)}
    munge = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key"]
    munge += [f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"]
    munge += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    daemons = []
    try:
        for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
            with open(folder / f"{command[0]}.start.log", "wb") as log:
                daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(1)
        for _ in range(60):
            state = subprocess.run(
                ["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True
            )
            if state.stdout.strip() == "idle":
                break
            time.sleep(1)
        else:
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log"))
            raise AssertionError(f"Slurm did not come up: {state.stdout}{state.stderr}\n{logs}")
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=60)


@pytest.mark.slow
def test_slurm_encodes_and_the_same_command_finishes(tmp_path, tokenizer_folder, slurm):
    """Near duplicates too: three jobs that depend on one another, before the encoding."""
    source = write_files(tmp_path / "source", files=2)
    flags = ("--executor", "slurm", "--slurm_partition", "cpu", "--near_deduplicate")
    arguments = (source, tmp_path / "out", tokenizer_folder, *flags)
    submitted = run(*arguments, env=slurm)
    # `prepare && train` must not go on to the training.
    assert submitted.returncode == TRY_AGAIN_LATER, submitted.stderr
    assert "was submitted for 2 parts" in submitted.stdout
    at_work = run(*arguments, env=slurm)
    assert at_work.returncode == TRY_AGAIN_LATER
    assert "is at work: " in at_work.stdout, at_work.stdout + at_work.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()
    _wait_for_empty_queue(slurm)
    finished = run(*arguments, env=slurm)
    logs = [path.read_text()[-1500:] for path in (tmp_path / "out").rglob("*.out")]
    assert finished.returncode == 0, finished.stderr + "\n".join(logs)
    here = run(source, tmp_path / "local", tokenizer_folder, "--near_deduplicate")
    assert here.returncode == 0, here.stderr
    assert hashes(tmp_path / "out") == hashes(tmp_path / "local")
    assert read_manifest(tmp_path / "out").counts["near_duplicates"] > 0


@pytest.mark.slow
def test_a_task_that_fails_on_slurm_is_tried_again_by_the_same_command(tmp_path, tokenizer_folder, slurm):
    source = write_files(tmp_path / "source", files=2, documents=20)
    whole = (source / "1.jsonl").read_bytes()
    (source / "1.jsonl").write_bytes(whole[:-10] + b" " * 10)  # the size is what the run goes by
    arguments = (
        source,
        tmp_path / "out",
        tokenizer_folder,
        "--executor",
        "slurm",
        "--slurm_partition",
        "cpu",
        *("--slurm_account", "physics", "--slurm_cpus", "2", "--slurm_memory_gb", "3"),
    )
    assert "submitted for 2 parts" in run(*arguments, env=slurm).stdout
    script = (tmp_path / "out" / ".work" / "log" / "encoding" / "launch_script.slurm").read_text()
    for option in ("account=physics", "cpus-per-task=2", "mem-per-cpu=2G"):
        assert f"#SBATCH --{option}\n" in script
    _wait_for_empty_queue(slurm)
    assert sorted(path.name for path in (tmp_path / "out" / ".work" / "parts").glob("?????")) == ["00000"]
    (source / "1.jsonl").write_bytes(whole)
    again = run(*arguments, env=slurm).stdout
    assert "submitted for 1 parts" in again
    # Once it said no more than that, whatever had become of the job before.
    assert "has ended; 1 of 2 tasks of encoding failed or never began, such as part 00001 (1.jsonl" in again
    _wait_for_empty_queue(slurm)
    finished = run(*arguments, env=slurm)
    assert finished.returncode == 0, finished.stderr
    assert read_manifest(tmp_path / "out").counts["documents"] == 40


def _wait_for_empty_queue(environment):
    for _ in range(200):
        queue = subprocess.run(["squeue", "-h"], env=environment, capture_output=True, text=True, check=True)
        if not queue.stdout.strip():
            return
        time.sleep(1)
    raise AssertionError(f"still in the queue: {queue.stdout}")


def test_slurm_needs_a_partition_and_a_program(tmp_path, tokenizer_folder, capsys):
    source = write_files(tmp_path / "source", files=1, documents=5)
    flags = ["--source", str(source), "--output", str(tmp_path / "out"), "--tokenizer", tokenizer_folder]
    assert main([*flags, "--executor", "slurm"]) == 1
    assert "--slurm_partition" in capsys.readouterr().err
    assert main([*flags, "--executor", "pbs", "--workers", "0"]) == 1
    assert "executor='pbs' is none of local, slurm, ray; workers=0" in capsys.readouterr().err


def test_a_missing_ray_is_one_line(tmp_path, tokenizer_folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    source = write_files(tmp_path / "source", files=1, documents=5)
    flags = ["--source", str(source), "--output", str(tmp_path / "out"), "--tokenizer", tokenizer_folder]
    assert main([*flags, "--executor", "ray"]) == 1
    assert capsys.readouterr().err.startswith("error: --executor ray needs Ray")


@pytest.mark.slow
def test_a_ray_cluster_drops_near_copies_and_encodes_the_same_bytes(tmp_path, tokenizer_folder):
    pytest.importorskip("ray", reason="Ray is an option of preparation, not a dependency")
    source = write_files(tmp_path / "source", files=2)
    done = run(source, tmp_path / "ray", tokenizer_folder, "--executor", "ray", "--near_deduplicate")
    assert done.returncode == 0, done.stderr
    here = run(source, tmp_path / "local", tokenizer_folder, "--near_deduplicate")
    assert here.returncode == 0, here.stderr
    assert hashes(tmp_path / "ray") == hashes(tmp_path / "local")
    assert read_manifest(tmp_path / "ray").counts["near_duplicates"] > 0
