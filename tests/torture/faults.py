"""What can happen to a run, made to happen: each function is called in the run's process before it starts.

Runs are forked from one process that has imported everything, so that one of a toy model takes a second.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from training_toys import TOY_SETTINGS, as_flags, free_port

import train_accelerate
import training.checkpoint
import training.files
from training.journal import Journal

PROCESSES = multiprocessing.get_context("forkserver")


def start_fork_server() -> None:
    """Start the process that has imported everything. Python 3.11 tells it no search path."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    PROCESSES.set_forkserver_preload(["faults"])
    multiprocessing.forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code (-9 when killed) and everything that it printed."""

    code: int
    text: str


def run(settings: dict, *fault: object, processes: int = 1) -> Outcome:
    """Train to the end, or to what the `fault` (a function of this module and its arguments) leads to."""
    port = free_port()
    folder = Path(tempfile.mkdtemp())
    logs = [folder / f"{rank}.log" for rank in range(processes)]
    children = []
    for rank, log in enumerate(logs):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = {name: str(value) for name, value in world.items()} if processes > 1 else {}
        children.append(PROCESSES.Process(target=train, args=(settings, fault, variables, str(log))))
        children[-1].start()
    for child in children:
        child.join(120)
        assert child.exitcode is not None, "the run hangs: " + "".join(log.read_text() for log in logs)
    codes = [child.exitcode for child in children]
    text = "".join(log.read_text() for log in logs)
    shutil.rmtree(folder)
    return Outcome(max(codes, key=abs), text)


def train(settings: dict, fault: tuple, variables: dict[str, str], log: str) -> None:
    os.environ.update(variables)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if fault:
        fault[0](*fault[1:])
    train_accelerate.main(as_flags({**TOY_SETTINGS, **settings}))


def kill_in_file_write(number: int) -> None:
    """SIGKILL when half of the `number`th file of a run's checkpoints is on its way to the disk."""
    write, count = training.files.write_file, iter(range(1_000_000))

    def write_half(path, pieces):
        if next(count) != number:
            return write(path, pieces)
        content = b"".join(bytes(piece) for piece in pieces)
        with open(path, "xb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    # Settings of the run directory are written by the same function, but through the module's own name.
    training.checkpoint.write_file = training.files.write_file = write_half


def kill_before_rename(number: int) -> None:
    """SIGKILL when the `number`th finished folder is about to get its name."""
    rename, count = Path.rename, iter(range(1_000_000))

    def kill(self, target):
        if self.name.startswith(".tmp-step") and next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    Path.rename = kill  # type: ignore[method-assign]


def kill_at_random_moment(seed: int) -> None:
    """Killed from outside the training thread, within 30 ms of one of the first steps."""
    randomness = random.Random(seed)
    rate, steps_to_go = train_accelerate.learning_rate_at, randomness.randrange(6)
    # SIGALRM kills as surely as SIGKILL where nothing catches it.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def rate_and_timer(now, settings):
        nonlocal steps_to_go
        if steps_to_go == 0:
            signal.setitimer(signal.ITIMER_REAL, randomness.uniform(1e-4, 0.03))
        steps_to_go -= 1
        return rate(now, settings)

    train_accelerate.learning_rate_at = rate_and_timer


def at_step(step: int, work: Callable) -> None:
    """`work(state)` once, before the step that leads from `step` to `step + 1`."""
    states: list = []
    begin, rate = Journal.__init__, train_accelerate.learning_rate_at

    def remember(self, accelerator, run, guard, state, *more):
        states.append(state)
        begin(self, accelerator, run, guard, state, *more)

    def rate_and_work(now, settings):
        if now == step:
            work(states[-1])
        return rate(now, settings)

    Journal.__init__ = remember  # type: ignore[method-assign]
    train_accelerate.learning_rate_at = rate_and_work


def signal_in(phase: str, number: int = signal.SIGTERM) -> None:
    """A signal in the first "accumulation", "update", "validation", "sampling" or "checkpoint"."""
    name = {
        "accumulation": "count_targets",
        "update": "learning_rate_at",
        "validation": "evaluate_loss",
        "sampling": "generate_samples",
        "checkpoint": "save_checkpoint",
    }[phase]
    original, is_sent = getattr(train_accelerate, name), []

    def interrupted(*arguments, **named):
        if not is_sent:
            is_sent.append(True)
            os.kill(os.getpid(), number)
        return original(*arguments, **named)

    setattr(train_accelerate, name, interrupted)


def wait_while_file_exists(step: int, flag: str) -> None:
    """Make a file before a step, and wait until somebody removes it."""

    def wait(state) -> None:
        Path(flag).touch()
        while Path(flag).exists():
            time.sleep(0.01)

    at_step(step, wait)


def kill_one_of_two() -> None:
    """SIGKILL for the second process before step 6."""
    if os.environ["RANK"] == "1":
        at_step(5, lambda state: os.kill(os.getpid(), signal.SIGKILL))


def disk_full(first_step: int, last_step: int) -> None:
    """No file of this process can grow beyond 60 kB while the run is between these steps."""

    def limit(size: int) -> Callable:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

        def set_limit(state) -> None:
            time.sleep(0.5)  # what is being written in the background is to be done by then
            resource.setrlimit(resource.RLIMIT_FSIZE, (size if size > 0 else hard, hard))

        return set_limit

    at_step(first_step, limit(60_000))
    at_step(last_step, limit(-1))


def spoil_weights(step: int) -> None:
    """NaN in one weight."""

    def spoil(state) -> None:
        with torch.no_grad():
            next(state.model.parameters())[0, 0] = float("nan")

    at_step(step, spoil)


def spoil_gradient(step: int) -> None:
    """NaN in one gradient, once."""

    def spoil(state) -> None:
        def hook(parameter) -> None:
            parameter.grad[0, 0] = float("nan")
            handle.remove()

        handle = next(state.model.parameters()).register_post_accumulate_grad_hook(hook)

    at_step(step, spoil)


def spoil_optimizer_state(step: int) -> None:
    """NaN in one second moment."""

    def spoil(state) -> None:
        first = next(iter(state.optimizer.optimizer.state.values()))
        first["exp_avg_sq"][0, 0] = float("nan")

    at_step(step, spoil)


def jumping_clock() -> None:
    """The wall clock goes a day forward or back at every look."""
    clock, jumps = time.time, random.Random(0)
    time.time = lambda: clock() + jumps.choice((-86_400, 86_400))


def raising_tracker() -> None:
    """A tracker whose service is gone from its second message on."""
    from accelerate.tracking import GeneralTracker

    class Gone(GeneralTracker):
        name, requires_logging_directory, messages = "gone", False, 0

        @property
        def tracker(self):
            return None

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **more):
            self.messages += 1
            if self.messages > 1:
                raise ConnectionError("the service is gone")

    begin = train_accelerate.start_accelerator

    def with_tracker(settings):
        accelerator, line = begin(settings)
        accelerator.log_with = [Gone(_blank=True)]
        return accelerator, line

    train_accelerate.start_accelerator = with_tracker
