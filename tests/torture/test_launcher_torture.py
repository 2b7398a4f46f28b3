"""What Ctrl-C and a lost launcher do to a run below `accelerate launch`, which has signals of its own."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import faults
import psutil
import pytest
from faults import PROCESSES, run
from promises import SAME, assert_like, finish, wait_until
from training_toys import (
    ROOT,
    TOY_SETTINGS,
    as_flags,
    environment,
    free_port,
    kill_family,
    train_command,
)

from training.checkpoint import complete_checkpoints
from training.interruption import SECONDS_BETWEEN_LOOKS_AT_STOP_FILE

pytestmark = pytest.mark.slow

CONFIGS = ROOT / "accelerate_configs"
SCALING = ROOT / "docs" / "scaling.md"
WAITING_STEP = ROOT / "tests" / "torture" / "waiting_step.py"


class Launched:
    """A run below `accelerate launch`, in a process group of its own as a terminal makes it.

    Its sixth step waits until `flag` is removed. `command` is what starts it, `accelerate launch` by default.
    """

    def __init__(
        self,
        settings: dict,
        config: str,
        *more: str,
        command: list[str] | None = None,
        variables: dict[str, str] | None = None,
    ):
        self.processes: list[psutil.Process] = []
        self.flag = Path(settings["run_dir"]).with_name("waiting")
        self.log = Path(settings["run_dir"]).with_name(f"log-{'-'.join(more[-2:])}")
        launch = ["--config_file", str(CONFIGS / f"{config}.yaml"), *more]
        folders = [str(folder) for folder in (ROOT, ROOT / "tests")]
        own = {"PYTHONPATH": os.pathsep.join(folders), "WAIT_WHILE": str(self.flag)}
        with open(self.log, "w") as log:
            self.launcher = subprocess.Popen(
                command or train_command(*launch, script=WAITING_STEP, **settings),
                env={**environment(), **own, **(variables or {})},
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def is_waiting(self) -> bool:
        """Whether the sixth step has begun."""
        assert self.launcher.poll() is None, self.text()
        self.processes = psutil.Process(self.launcher.pid).children(recursive=True)
        return self.flag.exists()

    def text(self) -> str:
        return self.log.read_text()

    def end(self) -> None:
        """Kill all of it; nothing happens where it has ended by itself."""
        kill_family(self.launcher.pid)
        for process in self.processes:  # those that lost their launcher are nobody's children
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.launcher.wait()

    def signal(self, number: int = signal.SIGINT) -> None:
        """As a terminal does after Ctrl-C: to the launcher, and to what it started in its own session."""
        os.killpg(self.launcher.pid, number)

    def wait(self) -> None:
        """Until all that the launcher had started when it was last looked at is gone."""
        wait_until(lambda: not any(map(is_alive, self.processes)), self.text)


@pytest.fixture
def launch() -> Iterator[Callable[..., Launched]]:
    """Starts runs below a launcher, and ends what is left of them however the test ends."""
    started: list[Launched] = []

    def start(*arguments: Any, **named: Any) -> Launched:
        started.append(Launched(*arguments, **named))
        return started[-1]

    yield start
    for launched in started:
        launched.end()


def is_alive(process: psutil.Process) -> bool:
    """Whether a process has not ended; one without a parent that takes note of its end has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.fault(
    "Ctrl-C below `accelerate launch`, one process",
    f"the step is finished and saved, a line says how to go on; {SAME}",
)
def test_ctrl_c_below_the_launcher(undisturbed, settings, launch):
    """The launcher itself dies of it at once, and the run has no parent while it saves."""
    launched = launch(settings, "cpu")
    wait_until(launched.is_waiting, launched.text)
    launched.signal()
    wait_until(lambda: "this step will be finished and saved" in launched.text(), launched.text)
    launched.flag.unlink()
    launched.wait()
    launched.launcher.wait(120)
    assert "Stopped after step 6: a signal asked for it. The same command goes on" in launched.text()
    assert "Going on from step 6" in finish(settings).text
    assert_like(undisturbed, settings)


@pytest.mark.fault(
    "Ctrl-C below `accelerate launch`, two processes",
    f"the step is finished and saved, a line says how to go on; {SAME}",
)
def test_ctrl_c_below_the_launcher_of_two_processes(settings, tmp_path, launch):
    """They are in sessions of their own, and get it from the launcher, which waits for them."""
    reference = {**settings, "run_dir": tmp_path / "reference"}
    assert run(reference, processes=2).code == 0
    launched = launch(settings, "ddp", "--num_processes", "2", "--main_process_port", str(free_port()))
    wait_until(launched.is_waiting, launched.text)
    launched.signal()
    wait_until(lambda: "this step will be finished and saved" in launched.text(), launched.text)
    launched.flag.unlink()
    launched.wait()
    launched.launcher.wait(120)
    assert launched.text().count("Stopped after step 6: a signal asked for it.") == 1, launched.text()
    assert "Going on from step 6" in finish(settings, processes=2).text
    assert_like(reference["run_dir"], settings)


@pytest.mark.fault(
    "SIGTERM or SIGUSR1 to the process group of `accelerate launch`, one and two processes",
    f"the step is finished and saved, a line says how to go on; {SAME}",
)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_to_the_launcher_and_its_group(settings, tmp_path, launch, name, processes):
    """Whether the launcher waits, passes it on or dies of it (docs/scaling.md has a table), the run saves."""
    reference = {**settings, "run_dir": tmp_path / "reference"}
    assert run(reference, processes=processes).code == 0
    options = ["--num_processes", str(processes), "--main_process_port", str(free_port())]
    launched = launch(settings, *(["cpu"] if processes == 1 else ["ddp", *options]))
    wait_until(launched.is_waiting, launched.text)
    launched.signal(getattr(signal, name))
    if (processes, name) != (2, "SIGTERM"):
        wait_until(lambda: launched.launcher.poll() is not None, launched.text)
    launched.flag.unlink()
    launched.wait()
    launched.launcher.wait(120)
    assert launched.text().count("Stopped after step 6: ") == 1, launched.text()
    assert "Going on from step 6" in finish(settings, processes=processes).text
    assert_like(reference["run_dir"], settings)


@pytest.mark.fault(
    "Slurm signals the batch script of docs/scaling.md",
    f"the step is finished and saved, a line says how to go on, and the job ends with code 0; {SAME}",
)
def test_the_batch_script_that_slurm_signals(settings, tmp_path, launch):
    """The script of the document, on one machine of two processes; only Slurm's two commands stand in."""
    reference = {**settings, "run_dir": tmp_path / "reference"}
    assert run(reference, processes=2).code == 0
    (_, script), *others = re.findall(r"(```bash\n)(#!/bin/bash\n.*?)```", SCALING.read_text(), re.DOTALL)
    assert not others
    flags = shlex.join(as_flags({**TOY_SETTINGS, **settings}))
    for theirs, ours in {
        "train_accelerate.py --config recipes/gpt2_124m.yaml": f"{WAITING_STEP} {flags}",
        "run=artifacts/runs/gpt2-124m": f"run={settings['run_dir']}",
        "accelerate launch": f"{sys.executable} -m accelerate.commands.launch",
        "SLURM_NNODES * 8": "SLURM_NNODES * 2",
        "--machine_rank": f"--main_process_port {free_port()} --machine_rank",
    }.items():
        assert script.count(theirs) == 1, theirs
        script = script.replace(theirs, ours)
    for name, text in {"srun": '"$@"', "scontrol": "echo 127.0.0.1", "job": script}.items():
        (tmp_path / name).write_text(text if text.startswith("#!") else f"#!/bin/bash\nexec {text}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "here"}
    variables |= {"SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    job = launch(settings, "multi_node", command=[str(tmp_path / "job")], variables=variables)
    wait_until(job.is_waiting, job.text)
    os.kill(job.launcher.pid, signal.SIGUSR1)  # the batch shell alone
    wait_until((settings["run_dir"] / "STOP").exists, job.text)
    time.sleep(SECONDS_BETWEEN_LOOKS_AT_STOP_FILE)
    job.flag.unlink()
    assert job.launcher.wait(120) == 0, job.text()
    assert "Stopped after step 6: the file STOP asked for it." in job.text()
    assert "Going on from step 6" in finish(settings, processes=2).text
    assert_like(reference["run_dir"], settings)


@pytest.mark.fault(
    "Ctrl-C a second time", f"the process ends at once, and the last checkpoint is as it was; {SAME}"
)
def test_a_second_ctrl_c_stops_at_once(undisturbed, settings, tmp_path):
    """Without a launcher, whose Ctrl-C leaves no exit code of ours to look at."""
    flag, log = tmp_path / "waiting", tmp_path / "log"
    fault = (faults.wait_while_file_exists, 5, str(flag))
    process = PROCESSES.Process(target=faults.train, args=(settings, fault, {}, str(log)))
    process.start()
    try:
        wait_until(lambda: flag.exists() or not process.is_alive(), log.read_text)
        os.kill(process.pid, signal.SIGINT)
        wait_until(lambda: "Again: stop at once" in log.read_text(), log.read_text)
        os.kill(process.pid, signal.SIGINT)
        process.join(120)
    finally:
        process.kill()
    assert process.exitcode == 130, log.read_text()
    assert "without a checkpoint" in log.read_text() and "Traceback" not in log.read_text()
    assert list(complete_checkpoints(settings["run_dir"])) == [3]
    finish(settings)
    assert_like(undisturbed, settings)


@pytest.mark.fault(
    "the launcher of one of two machines is killed",
    f"both machines' processes finish the step and save, a line says how to go on; {SAME}",
)
def test_a_launcher_is_killed(settings, tmp_path, launch):
    """Nobody is left to tell its process anything: it notices that its parent has changed."""
    reference = {**settings, "run_dir": tmp_path / "reference"}
    assert run(reference, processes=2).code == 0
    options = ["--num_processes", "2", "--main_process_port", str(free_port()), "--machine_rank"]
    machines = [launch(settings, "multi_node", *options, rank) for rank in ("0", "1")]
    wait_until(machines[0].is_waiting, machines[0].text)
    assert machines[1].is_waiting()
    machines[1].launcher.kill()
    machines[1].launcher.wait()
    machines[0].flag.unlink()
    for machine in machines:
        machine.wait()
    machines[0].launcher.kill()  # it would wait for the lost one for minutes
    machines[0].launcher.wait()
    assert "Stopped after step 6: its launcher has gone." in machines[0].text()
    assert "Going on from step 6" in finish(settings, processes=2).text
    assert_like(reference["run_dir"], settings)
