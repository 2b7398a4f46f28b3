"""What Ctrl-C and a lost launcher do to a run below `accelerate launch`, which has signals of its own."""

import os
import signal
import subprocess
from pathlib import Path

import faults
import psutil
import pytest
from faults import PROCESSES, run
from promises import SAME, assert_like, finish, wait_until
from training_toys import ROOT, environment, free_port, train_command

from training.checkpoint import complete_checkpoints

pytestmark = pytest.mark.slow

CONFIGS = ROOT / "accelerate_configs"


class Launched:
    """A run below `accelerate launch`, in a process group of its own as a terminal makes it.

    Its sixth step waits until `flag` is removed.
    """

    def __init__(self, settings: dict, config: str, *more: str):
        self.flag = Path(settings["run_dir"]).with_name("waiting")
        self.log = Path(settings["run_dir"]).with_name(f"log-{'-'.join(more[-2:])}")
        launch = ["--config_file", str(CONFIGS / f"{config}.yaml"), *more]
        script = ROOT / "tests" / "torture" / "waiting_step.py"
        folders = [str(folder) for folder in (ROOT, ROOT / "tests")]
        variables = {"PYTHONPATH": os.pathsep.join(folders), "WAIT_WHILE": str(self.flag)}
        with open(self.log, "w") as log:
            self.launcher = subprocess.Popen(
                train_command(*launch, script=script, **settings),
                env={**environment(), **variables},
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

    def press_ctrl_c(self) -> None:
        """As a terminal does: to the launcher, and to what it started in its own session."""
        os.killpg(self.launcher.pid, signal.SIGINT)

    def wait(self) -> None:
        """Until all that the launcher had started when it was last looked at is gone."""
        wait_until(lambda: not any(map(is_alive, self.processes)), self.text)


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
def test_ctrl_c_below_the_launcher(undisturbed, settings):
    """The launcher itself dies of it at once, and the run has no parent while it saves."""
    launched = Launched(settings, "cpu")
    wait_until(launched.is_waiting, launched.text)
    launched.press_ctrl_c()
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
def test_ctrl_c_below_the_launcher_of_two_processes(settings, tmp_path):
    """They are in sessions of their own, and get it from the launcher, which waits for them."""
    reference = {**settings, "run_dir": tmp_path / "reference"}
    assert run(reference, processes=2).code == 0
    launched = Launched(settings, "ddp", "--num_processes", "2", "--main_process_port", str(free_port()))
    wait_until(launched.is_waiting, launched.text)
    launched.press_ctrl_c()
    wait_until(lambda: "this step will be finished and saved" in launched.text(), launched.text)
    launched.flag.unlink()
    launched.wait()
    launched.launcher.wait(120)
    assert launched.text().count("Stopped after step 6: a signal asked for it.") == 1, launched.text()
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
    wait_until(lambda: flag.exists() or not process.is_alive(), log.read_text)
    os.kill(process.pid, signal.SIGINT)
    wait_until(lambda: "Again: stop at once" in log.read_text(), log.read_text)
    os.kill(process.pid, signal.SIGINT)
    process.join(120)
    assert process.exitcode == 130, log.read_text()
    assert "without a checkpoint" in log.read_text() and "Traceback" not in log.read_text()
    assert list(complete_checkpoints(settings["run_dir"])) == [3]
    finish(settings)
    assert_like(undisturbed, settings)


@pytest.mark.fault(
    "the launcher of one of two machines is killed",
    f"both machines' processes finish the step and save, a line says how to go on; {SAME}",
)
def test_a_launcher_is_killed(settings, tmp_path):
    """Nobody is left to tell its process anything: it notices that its parent has changed."""
    reference = {**settings, "run_dir": tmp_path / "reference"}
    assert run(reference, processes=2).code == 0
    port = str(free_port())
    machines = [
        Launched(
            settings,
            "multi_node",
            "--num_processes",
            "2",
            "--main_process_port",
            port,
            "--machine_rank",
            rank,
        )
        for rank in ("0", "1")
    ]
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
