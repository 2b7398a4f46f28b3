"""Files far away, and the network's moods: what may pass is tried again, and said; what may not is named."""

from __future__ import annotations

import errno
import io
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO

import fsspec

READ_BYTES = 1 << 20
# Whose exceptions stand for the network's moods, besides OSError.
NETWORK_MODULES = (
    "aiohttp",
    "botocore",
    "fsspec",
    "gcsfs",
    "httpcore",
    "httpx",
    "httpx2",
    "requests",
    "urllib3",
)
# What no waiting mends: a disk that is full or not to be written, a folder in a file's place.
OF_THIS_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EISDIR, errno.ENOTDIR)
# Waits before a failed read of a remote file is tried again; together they outlast a server's restart.
RETRY_SECONDS = (1, 2, 4, 8, 16, 32, 64, 128)


class SourceError(ValueError):
    """A source that cannot be read; the message names the file and what to do."""


def open_file(path: str) -> BinaryIO:
    """The file's stored bytes; a remote one outlives failures on the way.

    Raises:
        SourceError: on opening or reading, if a remote file stays out of reach.
    """
    filesystem, _ = fsspec.core.url_to_fs(path)
    if "file" in filesystem.protocol or "memory" in filesystem.protocol:
        return fsspec.open(path, "rb").open()
    return io.BufferedReader(PatientFile(path), READ_BYTES)


class PatientFile(io.RawIOBase):
    """A remote file that is read on from where it was after timeouts, refusals (429) and server errors
    (5xx).
    """

    def __init__(self, path: str):
        self._path = path
        self._position = 0
        self._file: Any = None
        self._size = int(self._patiently(lambda file: file.size))

    def _patiently(self, action: Callable[[Any], Any]) -> Any:
        def attempt() -> Any:
            if self._file is None:
                self._file = fsspec.open(self._path, "rb").open()
            try:
                return action(self._file)
            except BaseException:
                self._file = None  # its connection may be what is broken
                raise

        try:
            return patiently(attempt)
        except Exception as error:
            # Not as an OSError: to whoever parses the content that would be a damaged file.
            raise SourceError(out_of_reach(self._path, error)) from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        )
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0

        def read(file: Any) -> bytes:
            file.seek(self._position)
            content: bytes = file.read(wanted)
            if len(content) != wanted:
                raise OSError(f"{len(content):,} bytes came instead of {wanted:,}")
            return content

        buffer[:wanted] = self._patiently(read)
        self._position += wanted
        return wanted


def patiently(action: Callable[[], Any]) -> Any:
    """The action's result, trying again with growing pauses, each announced, while its failures are such as
    may pass. What is none of Python's own, of the network's, comes out as a ConnectionError.
    """
    for wait in (*RETRY_SECONDS, None):
        try:
            return action()
        except Exception as error:
            if wait is None or not _may_pass(error):
                if _is_of_the_network(error) and not isinstance(error, OSError):
                    raise ConnectionError(in_one_line(error)) from error
                raise
            print(f"{in_one_line(error)}. Trying again in {wait} s.", file=sys.stderr, flush=True)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _may_pass(error: BaseException) -> bool:
    """Whether trying again can help: not for files that are missing, forbidden or asked for wrongly, nor
    where the Hub is switched off.
    """
    # How the Hub's client wraps what befell an upload, or the question for a file.
    is_wrapped = type(error) is RuntimeError or type(error).__name__ == "LocalEntryNotFoundError"
    if is_wrapped and error.__cause__:
        return _may_pass(error.__cause__)
    if isinstance(error, (FileNotFoundError, PermissionError, NotImplementedError, ImportError)):
        return False
    if isinstance(error, OSError) and error.errno in OF_THIS_MACHINE:
        return False
    if not isinstance(error, OSError) and not _is_of_the_network(error):
        return False
    if "OfflineModeIsEnabled" in f"{type(error).__name__} {error}":  # `datasets` has it in the text only
        return False
    status = status_of(error)
    return status is None or not 400 <= status < 500 or status in (408, 429)


def _is_of_the_network(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in NETWORK_MODULES


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an exception, or what it was raised from, stands for, if any."""
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    if isinstance(status, int):
        return status
    return status_of(error.__cause__) if error.__cause__ else None


def out_of_reach(what: str, error: BaseException) -> str:
    """Why a remote thing cannot be had, and what to do."""
    if isinstance(error, PermissionError) or status_of(error) in (401, 403):
        return (
            f"{what} may not be read with the credentials at hand ({in_one_line(error)}). Log in (the Hub: "
            "`hf auth login`), and accept its terms where it has some."
        )
    if isinstance(error, FileNotFoundError) or status_of(error) == 404:
        return f"{what} is not there ({in_one_line(error)})."
    return f"{what} cannot be read ({in_one_line(error)}). The same command tries again."


def in_one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
