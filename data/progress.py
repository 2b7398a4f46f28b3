"""How far the tasks of a preparation are: each writes a small file, the run's own process shows their sum."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

REPORT_SECONDS = 1.0  # how often tasks say how far they are


@dataclass(frozen=True)
class Task:
    """What there is to see of a task: its report while it runs, what is there when it is done."""

    report: Path
    done: Path
    label: str
    bytes: int
    files: tuple[str, ...] = ()  # that it goes through


class Report:
    """A task's word to the process that shows the progress: a small file, rewritten now and then.

    `owner` is the host and the process of the run that the task belongs to, None on a cluster.
    """

    def __init__(self, path: Path, owner: tuple[str, int] | None):
        self.path, self.owner = path, owner
        self.host = socket.gethostname()
        self.state: dict = {"pid": os.getpid(), "host": self.host, "owner": owner and owner[1]}
        self.state |= {"documents": 0, "tokens": 0, "bytes": 0, "file": 0}
        self.last = 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def advance(self, documents: int, tokens: int, counts: Counter[str]) -> None:
        self.state["documents"] += documents
        self.state["tokens"] += tokens
        self.state["bytes"], self.state["file"] = counts["bytes"], counts["file"]
        if time.monotonic() - self.last > REPORT_SECONDS:
            self.write()
            if self.owner and self.owner[0] == self.host and not _is_alive(self.owner[1]):
                # Whoever started this task was killed: a new run may be encoding the same part by now.
                raise SystemExit("The preparation that this task belonged to is gone.")

    def write(self) -> None:
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.state))
        os.replace(temporary, self.path)
        self.last = time.monotonic()


def read_statistics(folder: Path) -> dict:
    """What a finished part counted: "counts", "documents", "tokens", "seconds"."""
    statistics: dict = json.loads((folder / "counts.json").read_text())
    return statistics


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Clock:
    """Seconds of work on a preparation, those of earlier, interrupted runs included (to REPORT_SECONDS)."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.before = float(path.read_text())
        except (OSError, ValueError):
            self.before = 0.0
        self.started = time.monotonic()
        self.stop = threading.Event()

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def __enter__(self) -> Clock:
        self.thread = threading.Thread(target=self._tick, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _tick(self) -> None:
        """A killed run writes no last word: its time is noted while it works."""
        while True:
            stopped = self.stop.wait(REPORT_SECONDS)
            try:
                temporary = self.path.with_name(f"{self.path.name}.tmp")
                temporary.write_text(f"{self.seconds:.1f}")
                os.replace(temporary, self.path)
            except OSError:  # a full disk, which the run itself will meet and explain
                pass
            if stopped:
                return


class Watch:
    """Shows the tasks' progress, and ends the run when one of them was killed: its pool would wait for
    ever.
    """

    def __init__(self, title: str, tasks: list[Task], show: bool):
        self.tasks = tasks
        self.finished: dict[Path, dict] = {}
        self.stop = threading.Event()
        self.lost: str | None = None
        size = sum(task.bytes for task in tasks) or None
        self.bar = tqdm(total=size, unit="B", unit_scale=True, desc=title, disable=not show, smoothing=0.1)
        self.started = time.monotonic()
        self.tokens_at_start: int | None = None

    def __enter__(self) -> Watch:
        self.main_thread = threading.main_thread().ident or 0
        self.on_interrupt = None
        if threading.current_thread() is threading.main_thread():  # the only one that signals can end
            self.on_interrupt = signal.signal(signal.SIGINT, self._interrupted)
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.stop.set()
        self.thread.join()
        if self.on_interrupt is not None:
            signal.signal(signal.SIGINT, self.on_interrupt)
        self._look()
        self.bar.close()
        if kind is KeyboardInterrupt and self.lost:
            raise RuntimeError(
                f"{self.lost} Other parts are kept: run the same command again to go on, with fewer "
                "--workers if "
                "memory ran out."
            ) from None

    def _watch(self) -> None:
        while not self.stop.wait(REPORT_SECONDS):
            self._look()
            if self.lost:
                # A real signal: `_thread.interrupt_main` wakes nobody who waits for a lock, as the pool does.
                signal.pthread_kill(self.main_thread, signal.SIGINT)
                return

    def _interrupted(self, number, frame) -> None:
        """In place of the handler for Ctrl-C, which runs under nohup or a shell's `&` do not have."""
        if self.lost or self.on_interrupt is signal.SIG_DFL:
            raise KeyboardInterrupt
        if callable(self.on_interrupt):
            self.on_interrupt(number, frame)

    def _look(self) -> None:
        documents = tokens = size = 0
        current = ""
        for task in self.tasks:
            state = self.finished.get(task.done)
            if state is None and task.done.exists():
                counted = read_statistics(task.done) if task.done.is_dir() else {"documents": 0, "tokens": 0}
                state = self.finished[task.done] = {**counted, "bytes": task.bytes}
            if state is None:
                try:
                    state = json.loads(task.report.read_text())
                except (OSError, ValueError):
                    continue
                current = task.label
                if task.files:
                    current += f" ({task.files[state['file']]})"
                if state["owner"] != os.getpid():  # left by an earlier run
                    continue
                # `done` is looked for once more: the task may have finished since the first look.
                if not _is_alive(state["pid"]) and not task.done.exists() and not self.stop.is_set():
                    self.lost = f"The process at work on {current} was killed."
            documents, tokens = documents + state["documents"], tokens + state["tokens"]
            size += state["bytes"]
        if self.tokens_at_start is None:
            self.tokens_at_start = sum(state["tokens"] for state in self.finished.values())
        rate = (tokens - self.tokens_at_start) / max(time.monotonic() - self.started, 1e-9)
        self.bar.set_postfix_str(
            f"{documents:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s, {current}", refresh=False
        )
        self.bar.update(size - self.bar.n)
