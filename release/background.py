"""Pushes to the Hub while a program goes on: they never stop it, whatever the network does."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from release.folder import ReleaseError, outgoing_files
from release.push import ADDRESS_LINE, RETRIES, prepare_repository

ROOT = Path(__file__).resolve().parent.parent
SECONDS_BETWEEN_LOOKS = 1.0
CHECKPOINTS_SHARE = 0.5  # of the time that the end of a run has for the Hub
# In a run's directory: files of checkpoints that are on their way.
HELD_FOLDER = ".pushing"


class BackgroundPush:
    """A push under way; made by `push_in_background`.

    It is a process of its own, `python -m release.push`: one that hangs can be ended, which a thread that
    waits for a network cannot, and it takes no time from this one's interpreter.
    """

    def __init__(self, command: list[str], environment: dict[str, str], warn: Callable[[str], object]):
        self.url: str | None = None  # of the commit, once it is there
        self._command, self._environment, self._warn = command, environment, warn
        self._process: subprocess.Popen[str] | None = None
        self._is_given_up = False
        self._thread = threading.Thread(target=self._run, name="push to the Hub", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as problem:
                self._push(problem)
        except Exception as error:
            self._warn(f"Not pushed to the Hub: {error}")
        finally:
            atexit.unregister(self._kill)

    def _push(self, problem: TextIO) -> None:
        # In a session of its own, or Ctrl-C, which asks a training for its last checkpoint, would end it.
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=problem,
            text=True,
            start_new_session=True,
        )
        atexit.register(self._kill)  # its work is of no use to nobody who waits for it
        if self._is_given_up:
            self._kill()
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ADDRESS_LINE):
                self.url = line.removeprefix(ADDRESS_LINE).strip()
            elif line.strip() and not self._is_given_up:
                self._warn(line.rstrip())
        if self._process.wait() != 0 and not self._is_given_up:
            problem.seek(0)
            # Its last words; what libraries have warned of before is not the reason.
            said = f"\n{problem.read()}".rpartition("\nerror: ")[2].strip()
            self._warn(f"Not pushed to the Hub: {said or f'exit code {self._process.returncode}'}")

    def _kill(self) -> None:
        self._is_given_up = True
        if self._process is not None:
            self._process.kill()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def finish(self, timeout_seconds: float | None = None) -> str | None:
        """Wait for it, and end it if it takes longer; the commit's address, or None. Never raises."""
        self._thread.join(timeout_seconds)
        if self.is_running:
            self._kill()
            self._warn(f"The push to the Hub was not done after {timeout_seconds:g} s and is given up.")
            self._thread.join(SECONDS_BETWEEN_LOOKS)
        return self.url

    def give_up(self) -> None:
        """End it now, in silence."""
        self._kill()


def push_in_background(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    retries: int = RETRIES,
    warn: Callable[[str], object] = print,
) -> BackgroundPush:
    """`push`, without waiting and without ever raising: what goes wrong is told to `warn`, in words.

    `warn` is called from another thread. A folder that disappears meanwhile is only one more failure.
    """
    command = [sys.executable, "-u", "-m", "release.push", str(Path(folder).absolute()), repo_id]
    command += ["--retries", str(retries), *(["--private"] if private else [])]
    command += ["--revision", revision] if revision else []
    # Bars are seen by nobody here, and would stand before the words of a failure.
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if token:
        environment["HF_TOKEN"] = token  # a command line is for all to see
    return BackgroundPush(command, environment, warn)


class HubPushes:
    """The pushes of one training run: a checkpoint now and then, the export in the end.

    A checkpoint that comes while an older one is still on its way is left out; the next one is newer anyway.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        private: bool = False,
        warn: Callable[[str], object] = print,
        retries: int = RETRIES,
    ):
        self._repo_id, self._private, self._warn, self._retries = repo_id, private, warn, retries
        self._running: BackgroundPush | None = None
        self._held: Path | None = None
        self._is_ending = threading.Event()
        self._watcher: threading.Thread | None = None

    def check(self) -> None:
        """Make the repository, in the background, and warn now if that does not go: not after hours."""

        def prepare() -> None:
            try:
                prepare_repository(self._repo_id, private=self._private, retries=0)
            except ReleaseError as error:
                self._warn(f"As it is, nothing can be pushed to the Hub: {error} Everything else goes on.")

        threading.Thread(target=prepare, name="a look at the Hub", daemon=True).start()

    def watch(self, newest: Callable[[], Path | None]) -> None:
        """From now on push each checkpoint that appears, as `newest` finds them: complete ones only."""
        seen = newest()

        def look() -> None:
            nonlocal seen
            while not self._is_ending.wait(SECONDS_BETWEEN_LOOKS):
                with suppress(OSError):  # a file system that is away for a moment
                    found = newest()
                    if found is not None and found != seen and self.checkpoint(found):
                        seen = found

        self._watcher = threading.Thread(target=look, name="checkpoints for the Hub", daemon=True)
        self._watcher.start()

    def checkpoint(self, folder: Path | str) -> bool:
        """Begin to push a checkpoint, unless one is on its way or this one has gone; whether it was begun."""
        if self._running is not None and self._running.is_running:
            return False
        self._let_go()
        try:
            self._held = held = hold(Path(folder))
        except OSError as error:
            if not Path(folder).exists():
                return False  # a newer one has taken its place
            self._warn(f"Not pushed to the Hub: {error}")
            return True
        self._running = self._push(held)
        return True

    def finish(self, folder: Path | str, timeout_seconds: float | None = None) -> str | None:
        """Push the export, after whatever is on its way, and wait; the commit's address, or None.

        What is on its way gets at most CHECKPOINTS_SHARE of the time: the export is what was asked for.
        """
        began = time.monotonic()
        try:
            if timeout_seconds is None:
                self.stop()
            else:
                self.stop(CHECKPOINTS_SHARE * timeout_seconds)
                left = timeout_seconds - (time.monotonic() - began)
                timeout_seconds = max(left, (1 - CHECKPOINTS_SHARE) * timeout_seconds)
            self._running = self._push(Path(folder))
            return self._running.finish(timeout_seconds)
        except BaseException:  # Ctrl-C: whoever waits has had enough
            if self._running is not None:
                self._running.give_up()
            raise

    def stop(self, timeout_seconds: float | None = None) -> None:
        """Begin no further checkpoint, and wait for the one that is on its way."""
        self._is_ending.set()
        if self._watcher is not None:
            self._watcher.join()
        if self._running is not None:
            self._running.finish(timeout_seconds)
        self._let_go()

    def _push(self, folder: Path) -> BackgroundPush:
        return push_in_background(
            folder, self._repo_id, private=self._private, warn=self._warn, retries=self._retries
        )

    def _let_go(self) -> None:
        if self._held is not None:
            shutil.rmtree(self._held.parent, ignore_errors=True)
            self._held = None


def hold(checkpoint: Path) -> Path:
    """The files of a checkpoint that go out, under other names: it may be deleted before they have arrived.

    `checkpoint` is RUN/checkpoints/NAME; what stands here is RUN/.pushing/NAME. Copies, where a file system
    knows no hard links.

    Raises:
        OSError: if the checkpoint goes while it is looked at, or copies find no room; nothing stays then.
    """
    held = checkpoint.parent.parent / HELD_FOLDER / checkpoint.name
    shutil.rmtree(held.parent, ignore_errors=True)  # of a run that was killed
    held.mkdir(parents=True)
    try:
        for path in outgoing_files(checkpoint)[0]:
            try:
                os.link(path, held / path.name)
            except OSError:
                shutil.copy2(path, held / path.name)
        checkpoint.stat()  # one that went while it was listed has left a part of its files, or none
    except OSError:
        shutil.rmtree(held.parent, ignore_errors=True)
        raise
    return held
