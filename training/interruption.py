"""When to stop or to save early, agreed between all processes at the end of every step."""

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator

STARTED = time.monotonic()  # not the wall clock, which jumps
STOP_FILE = "STOP"
SECONDS_BETWEEN_LOOKS_AT_STOP_FILE = 1.0

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
CODE_AFTER_CTRL_C = 128 + signal.SIGINT  # as shells say it
# What one process may have seen, in order of importance: the largest number any of them saw counts.
REASONS = (
    "",
    "max_minutes is over",
    f"the file {STOP_FILE} asked for it",
    "its launcher has gone",
    "a signal asked for it",
    "checkpoints cannot be saved",
)


@dataclass(frozen=True)
class Agreement:
    """What all processes do after this step: stop for a reason (or not: empty), save before it is due, fit
    the run's length.
    """

    stop: str
    save: bool
    fit: bool


class Interruptions:
    """Catches signals while it is entered; `agree` tells every process the same at the same step.

    A first SIGINT, SIGTERM or SIGUSR1 lets the step finish, also the validation or sampling after it. A
    second Ctrl-C ends the process at once, by SystemExit.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run_dir: Path,
        *,
        max_minutes: float = 0.0,
        save_every_minutes: float = 0.0,
    ):
        self._accelerator = accelerator
        self._stop_file = run_dir / STOP_FILE
        self._max_seconds = max_minutes * 60 or float("inf")
        self._save_every_seconds = save_every_minutes * 60 or float("inf")
        self._last_save = self._last_look = time.monotonic()
        self._signal: int | None = None
        self._is_interrupted = False
        # Only a launcher stays to wait for us: a shell that is closed is no reason to stop.
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None
        self._previous: dict[int, object] = {}
        self._group = None
        if accelerator.num_processes > 1 and torch.distributed.get_backend() != "gloo":
            # Plain numbers travel over the hosts' own network: through the GPU they would wait for the step.
            self._group = torch.distributed.new_group(backend="gloo")

    def __enter__(self) -> "Interruptions":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        if self._signal is not None:
            return  # the process is ending, and a launcher may pass on the signal that it has got already
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._is_interrupted:
                _write_now(b"\nCtrl-C again: stopping at once, without a checkpoint.\n")
                raise SystemExit(CODE_AFTER_CTRL_C)
            self._is_interrupted = True
            if self._signal is None and self._accelerator.is_main_process:
                _write_now(b"\nCtrl-C: this step will be finished and saved. Again: stop at once.\n")
        self._signal = self._signal or number

    def saved(self) -> None:
        """A checkpoint was just taken: the clock of `save_every_minutes` starts again."""
        self._last_save = time.monotonic()

    def agree(self, *, alarm: bool = False, fit: bool = False) -> Agreement:
        """What to do, by the most important thing that any process has seen.

        `alarm`: its checkpoints fail. `fit`: it finds that the run's length is to be fitted.
        """
        now = time.monotonic()
        seen = 0
        if now - STARTED > self._max_seconds:
            seen = 1
        if self._accelerator.is_main_process and now - self._last_look > SECONDS_BETWEEN_LOOKS_AT_STOP_FILE:
            self._last_look = now
            if self._stop_file.exists():
                seen = 2
        if self._launcher is not None and os.getppid() != self._launcher:
            seen = 3
        if self._signal is not None:
            seen = 4
        if alarm:
            seen = 5
        mine = [seen, int(now - self._last_save > self._save_every_seconds), int(fit)]
        if self._accelerator.num_processes > 1:
            together = torch.tensor(mine)
            torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX, group=self._group)
            mine = together.tolist()
        return Agreement(stop=REASONS[mine[0]], save=bool(mine[1]), fit=bool(mine[2]))

    def forget_stop_file(self) -> None:
        """Remove the stop file that was obeyed, so that the next start does not stop again."""
        if self._accelerator.is_main_process:
            self._stop_file.unlink(missing_ok=True)


def _write_now(text: bytes) -> None:
    """Not `print`: the signal may have come in the middle of one."""
    with suppress(OSError):
        os.write(2, text)
