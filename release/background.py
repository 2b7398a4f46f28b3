"""Pushes to the Hub while a program goes on: they never stop it, whatever the network does."""

import threading
from collections.abc import Callable
from pathlib import Path

from release.push import RETRIES, push


class BackgroundPush:
    """A push under way in a thread; made by `push_in_background`."""

    def __init__(self, work: Callable[[], str], warn: Callable[[str], object]):
        self.url: str | None = None  # of the commit, once it is there
        self._work, self._warn = work, warn
        # A daemon: a Hub that does not answer must not keep the program from ending.
        self._thread = threading.Thread(target=self._run, name="push to the Hub", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.url = self._work()
        except Exception as error:
            self._warn(f"Not pushed to the Hub: {error}")

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def finish(self, timeout_seconds: float | None = None) -> str | None:
        """Wait for it; the commit's address, or None if it failed or is still not there. Never raises."""
        self._thread.join(timeout_seconds)
        if self.is_running:
            self._warn(f"The push to the Hub was not done after {timeout_seconds:g} s and is left alone.")
        return self.url


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

    def work() -> str:
        return push(
            folder, repo_id, private=private, revision=revision, token=token, retries=retries, say=warn
        )

    return BackgroundPush(work, warn)


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
        self._start = lambda folder: push_in_background(
            folder, repo_id, private=private, warn=warn, retries=retries
        )
        self._running: BackgroundPush | None = None

    def checkpoint(self, folder: Path | str) -> bool:
        """Begin to push a checkpoint, unless one is on its way; whether it was begun."""
        if self._running is not None and self._running.is_running:
            return False
        self._running = self._start(folder)
        return True

    def finish(self, folder: Path | str, timeout_seconds: float | None = None) -> str | None:
        """Push the export, after whatever is on its way, and wait; the commit's address, or None."""
        if self._running is not None:
            self._running.finish(timeout_seconds)
            if self._running.is_running:
                return None  # a Hub that hangs; two pushes at once would not arrive sooner
        self._running = self._start(folder)
        return self._running.finish(timeout_seconds)
