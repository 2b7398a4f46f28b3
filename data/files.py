"""Files that are whole or not there at all, and their hashes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import IO

HASH_READ_BYTES = 1 << 20


def write_atomically(path: Path, content: bytes) -> None:
    """The file appears under its name only once all of it is on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        flush(file)
    commit(temporary, path)


def flush(file: IO) -> None:
    """All that was written to the file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def commit(temporary: Path, path: Path) -> None:
    """Rename a file or folder whose files are flushed into place, and flush what it stands in, so that the
    name survives a power cut too.
    """
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(HASH_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
