"""What Ctrl-C and a lost launcher do to a run below `accelerate launch`, which has signals of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from faults import run
from promises import SAME, assert_like, finish, wait_until
from training_toys import ROOT, environment, free_port, train_command

from training.checkpoint import complete_checkpoints

pytestmark = pytest.mark.slow

CONFIGS = ROOT / "accelerate_configs"


class Launched:
    """A run below `accelerate launch`, in a process group of its own as a terminal makes it.

    It is in the middle of its sixth step until `go_on`.
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
        return self.flag.exists()

    def text(self) -> str:
        return self.log.read_text()

    def press_ctrl_c(self) -> None:
        """As a terminal does: to the launcher and all that it started."""
        os.killpg(self.launcher.pid, signal.SIGINT)

    def wait(self) -> None:
        """Until the launcher and all that it started are gone."""
        self.launcher.wait(120)
        wait_until(lambda: not members_of(self.launcher.pid), self.text)


def members_of(group: int) -> list[int]:
    """Process ids of a process group; those that only wait to be counted as ended left out."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue  # ended while we looked
    return found


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
    assert "Stopped after step 6: a signal asked for it. The same command goes on" in launched.text()
    assert "Going on from step 6" in finish(settings).text
    assert_like(undisturbed, settings)


@pytest.mark.fault(
    "Ctrl-C below `accelerate launch`, two processes, which get it from the terminal and from the launcher",
    f"the step is finished and saved, a line says how to go on; {SAME}",
)
def test_ctrl_c_that_arrives_twice(settings, tmp_path):
    """torchrun passes on what the terminal has already sent: that once counted as a second Ctrl-C."""
    reference = {**settings, "run_dir": tmp_path / "reference"}
    assert run(reference, processes=2).code == 0
    launched = Launched(settings, "ddp", "--num_processes", "2", "--main_process_port", str(free_port()))
    wait_until(launched.is_waiting, launched.text)
    launched.press_ctrl_c()
    # The launcher says when it passes the signal on; it sends it within the same breath.
    wait_until(lambda: launched.text().count("closing signal SIGINT") == 2, launched.text)
    launched.flag.unlink()
    launched.wait()
    assert launched.text().count("Stopped after step 6: a signal asked for it.") == 1, launched.text()
    assert "Going on from step 6" in finish(settings, processes=2).text
    assert_like(reference["run_dir"], settings)


@pytest.mark.fault(
    "Ctrl-C a second time", f"the process ends at once, and the last checkpoint is as it was; {SAME}"
)
def test_a_second_ctrl_c_stops_at_once(undisturbed, settings, tmp_path):
    """Without a launcher, whose Ctrl-C leaves no exit code of ours to look at."""
    flag, log = tmp_path / "waiting", tmp_path / "log"
    script = str(ROOT / "tests" / "torture" / "waiting_step.py")
    command = [sys.executable, script, *train_command(**settings)[2:]]
    variables = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "WAIT_WHILE": str(flag)}
    with open(log, "w") as file:
        process = subprocess.Popen(command, env={**environment(), **variables}, stdout=file, stderr=file)
    wait_until(lambda: flag.exists() or process.poll() is not None, log.read_text)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: "Again: stop at once" in log.read_text(), log.read_text)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, log.read_text()
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
    machines[1].launcher.kill()
    machines[1].launcher.wait()
    machines[0].flag.unlink()
    # The other launcher waits for the lost one for minutes; the processes that trained do not.
    own = machines[0].launcher.pid
    wait_until(
        lambda: members_of(own) == [own] and not members_of(machines[1].launcher.pid), machines[0].text
    )
    machines[0].launcher.kill()
    machines[0].wait()
    assert "Stopped after step 6: its launcher has gone." in machines[0].text()
    assert "Going on from step 6" in finish(settings, processes=2).text
    assert_like(reference["run_dir"], settings)
