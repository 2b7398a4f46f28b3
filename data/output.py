"""The output folder while a preparation is at work: whose it is, what it was begun with, what room it has."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import filelock

from data.assembly import DiskFullError
from data.files import write_atomically
from data.settings import PrepareSettings
from data.shards import MANIFEST_FILE, read_manifest
from data.sources import Part

WORK_FOLDER = ".work"


@contextlib.contextmanager
def locked(output: Path) -> Iterator[Path]:
    """The work folder of an output, which is this process's alone meanwhile."""
    work = output / WORK_FOLDER
    work.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(work / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(
            f"Another process is preparing {output}; wait for it or choose another output."
        ) from None
    try:
        yield work
    finally:
        lock.release()


def is_finished(output: Path, settings: PrepareSettings) -> bool:
    if not output.exists():
        return False
    if not output.is_dir():
        raise ValueError(f"The output {output} is a file; name a folder.")
    if (output / MANIFEST_FILE).exists():
        _refuse_other_settings(output, read_manifest(output).settings, settings, "holds shards")
        return True
    foreign = sorted(path.name for path in output.iterdir() if path.name != WORK_FOLDER)
    if foreign and not (output / WORK_FOLDER).exists():
        raise ValueError(
            f"The output {output} holds something else "
            f"({', '.join(foreign[:5])}{', …' if len(foreign) > 5 else ''}). "
            "Nothing was changed; choose an empty or new folder."
        )
    return False


def _refuse_other_settings(output: Path, before: dict, settings: PrepareSettings, what: str) -> None:
    now = settings.content()
    unlike = [
        f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in now if before.get(name) != now[name]
    ]
    if unlike:
        raise ValueError(
            f"The output {output} {what} made with other settings: {'; '.join(unlike)}. Nothing was "
            "changed; choose "
            "another output, or delete that folder first."
        )


def claim(work: Path, settings: PrepareSettings) -> None:
    """Note the settings on the first run; refuse to go on with others later."""
    path = work / "settings.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        _refuse_other_settings(work.parent, before, settings, "holds an unfinished preparation")
        print(f"Going on with the unfinished preparation in {work.parent}.")
    else:
        write_atomically(path, json.dumps(settings.content()).encode())


def disk_full(output: Path) -> DiskFullError:
    """The arithmetic of a full disk: what is there, what is still to come, by the rate of the parts that are
    done.
    """
    work = output / WORK_FOLDER
    free = shutil.disk_usage(output if output.exists() else output.absolute().anchor).free
    try:
        parts = [Part(**part) for part in json.loads((work / "parts.json").read_bytes())]
    except (OSError, ValueError):
        return DiskFullError(
            f"The disk is full: {free / 1e6:,.1f} MB are free at {output}, and nothing is encoded yet. "
            "Make room and run the same command again."
        )
    folders = [work / "parts" / f"{number:05d}" for number in range(len(parts))]
    done = [
        (part.bytes, (folder / "ids.bin").stat().st_size)
        for part, folder in zip(parts, folders, strict=True)
        if folder.exists()
    ]
    read, written = sum(size for size, _ in done), sum(size for _, size in done)
    total = sum(part.bytes for part in parts)
    # Before the first part is done: a token, two bytes, stands for about four bytes of English.
    encoded = written * total / read if read else total / 2
    return DiskFullError(
        f"The disk is full: {free / 1e6:,.1f} MB are free at {output}. {len(done)} of {len(parts)} parts "
        "are encoded, in "
        f"{written / 1e6:,.1f} MB; all will need about {encoded / 1e6:,.1f} MB, and the shards as much "
        "again before "
        "the parts are deleted. Make room and run the same command again: finished parts are kept."
    )
