"""What can happen to a run, made to happen: each function is called in the run's process before it starts.

Runs are forked from one process that has imported everything, so that one of a toy model takes a second.
"""

import errno
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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from training_toys import TOY_SETTINGS, as_flags, free_port

import train_accelerate
import training.checkpoint
import training.files
import training.run_directory
from training.checkpoint import BackgroundWriter
from training.interruption import SECONDS_BETWEEN_LOOKS_AT_STOP_FILE
from training.journal import Journal

# What the loop calls in each phase of a run.
PHASES = {
    "start": "start_accelerator",
    "accumulation": "count_targets",
    "update": "whole",
    "validation": "evaluate_loss",
    "sampling": "generate_samples",
    "checkpoint": "save_checkpoint",
    "export": "export_model",
}
WRITERS: list[BackgroundWriter] = []  # of this process's run
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
    try:
        for child in children:
            child.join(120)
            assert child.exitcode is not None, "the run hangs: " + "".join(log.read_text() for log in logs)
    finally:
        for child in children:
            child.kill()
    codes = [child.exitcode for child in children]
    text = "".join(log.read_text() for log in logs)
    shutil.rmtree(folder)
    return Outcome(max(codes, key=abs), text)


def run_killed_after(settings: dict, seconds: float) -> int:
    """SIGKILL from outside, wherever the run then is; its exit code, 0 if it came to its end before."""
    child = PROCESSES.Process(target=train, args=(settings, (), {}, os.devnull))
    child.start()
    child.join(seconds)
    child.kill()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


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
        # Other files of the run directory are written by the same function.
        if "step-" not in path.parent.name or next(count) != number:
            return write(path, pieces)
        content = b"".join(bytes(piece) for piece in pieces)
        with open(path, "xb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    training.checkpoint.write_file = training.files.write_file = write_half


def kill_in_write_of(name: str) -> None:
    """SIGKILL when half of a file of the run directory is written."""
    write = training.files.write_file

    def write_half(path, pieces):
        if path.name != training.files.temporary_name(name):
            return write(path, pieces)
        content = b"".join(bytes(piece) for piece in pieces)
        path.write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    training.files.write_file = write_half


def no_room_for(name: str) -> None:
    """The disk is full in the middle of a file of the run directory."""
    write = training.files.write_file

    def write_and_fail(path, pieces):
        if path.name != training.files.temporary_name(name):
            return write(path, pieces)
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    training.files.write_file = write_and_fail


def kill_before_rename(number: int) -> None:
    """SIGKILL when the `number`th finished folder is about to get its name."""
    rename, count = Path.rename, iter(range(1_000_000))

    def kill(self, target):
        if self.name.startswith(".tmp-step") and next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    Path.rename = kill  # type: ignore[method-assign]


def at_step(step: int, work: Callable) -> None:
    """`work(state)` once, before the step that leads from `step` to `step + 1`."""
    states: list = []
    begin, take, begin_writer = Journal.__init__, train_accelerate.islice, BackgroundWriter.__init__

    def remember(self, accelerator, run, guard, state, *more):
        states.append(state)
        begin(self, accelerator, run, guard, state, *more)

    def remember_writer(self, *arguments, **named):
        WRITERS.append(self)
        begin_writer(self, *arguments, **named)

    def work_and_take(batches, count):
        """Where the loop takes a step's micro-batches, it begins the step."""
        if states[-1].step == step:
            work(states[-1])
        return take(batches, count)

    Journal.__init__ = remember  # type: ignore[method-assign]
    BackgroundWriter.__init__ = remember_writer  # type: ignore[method-assign]
    train_accelerate.islice = work_and_take


def signal_in(phase: str, number: int = signal.SIGTERM) -> None:
    """A signal in the first of a phase."""
    once_in(phase, lambda: os.kill(os.getpid(), number))


def raise_in(phase: str) -> None:
    """An error that nobody foresaw in the first of a phase, while a checkpoint takes its time."""
    write = training.files.write_file

    def write_slowly(path, pieces):
        time.sleep(0.05)
        return write(path, pieces)

    def fail() -> None:
        raise RuntimeError("nobody foresaw this")

    training.checkpoint.write_file = training.files.write_file = write_slowly
    once_in(phase, fail)


def once_in(phase: str, work: Callable[[], None]) -> None:
    """`work()` when the run comes to a phase for the first time."""
    name = PHASES[phase]
    original, is_done = getattr(train_accelerate, name), []

    def interrupted(*arguments, **named):
        if not is_done:
            is_done.append(True)
            work()
        return original(*arguments, **named)

    setattr(train_accelerate, name, interrupted)


def wait_while_file_exists(step: int, flag: str) -> None:
    """The first process makes a file before a step, and waits until somebody removes it."""

    def wait(state) -> None:
        if os.environ.get("RANK", "0") != "0":
            return
        Path(flag).touch()
        while Path(flag).exists():
            time.sleep(0.01)

    at_step(step, wait)


def make_stop_file(step: int, run_dir: str) -> None:
    """The file STOP appears before a step, and long enough after the last look at it."""

    def make(state) -> None:
        Path(run_dir, "STOP").touch()
        time.sleep(SECONDS_BETWEEN_LOOKS_AT_STOP_FILE + 0.1)

    at_step(step, make)


def become_nobody() -> None:
    """Give up being root, as a person without rights in a folder is not."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def fill_disk(first_step: int, last_step: int, folder: str) -> None:
    """Between these steps the disk that `folder` is on has not a byte to spare."""
    ballast = Path(folder, "ballast")

    def fill(state) -> None:
        wait_for_writer()
        with suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    at_step(first_step, fill)
    at_step(last_step, lambda state: ballast.unlink())


def kill_one_of_two() -> None:
    """SIGKILL for the second process before step 6."""
    if os.environ["RANK"] == "1":
        at_step(5, lambda state: os.kill(os.getpid(), signal.SIGKILL))


def disk_full(first_step: int, last_step: int) -> None:
    """No file of this process can grow beyond 60 kB while the run is between these steps."""
    at_step(first_step, lambda state: limit_files(60_000))
    at_step(last_step, lambda state: limit_files(None))


def no_room_for_metrics(first_step: int, last_step: int) -> None:
    """Between these steps, the file of metrics has room for ten bytes more."""

    def open_full_disk(path, mode, **more):
        if Path(path).name != "metrics.jsonl":
            return open(path, mode, **more)
        with open(path, "ab") as file:
            file.write(b'{"step": 4')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def fill(state) -> None:
        training.run_directory.open = open_full_disk  # type: ignore[attr-defined]

    def make_room(state) -> None:
        del training.run_directory.open  # type: ignore[attr-defined]

    at_step(first_step, fill)
    at_step(last_step, make_room)


def limit_files(size: int | None) -> None:
    """No file of this process can grow beyond `size` bytes; the kernel refuses as if the disk were full."""
    wait_for_writer()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


def wait_for_writer() -> None:
    """Until no checkpoint is being written in the background."""
    while WRITERS[-1]._pending is not None and not WRITERS[-1]._pending.done():
        time.sleep(0.01)


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
