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
from data.shards import FORMAT_VERSION, MANIFEST_FILE, read_manifest
from data.sources import Part

WORK_FOLDER = ".work"
PARTS_FILE = "parts.json"
INCOMING = "incoming"  # where a finished set from elsewhere arrives


class BusyError(ValueError):
    """Another process is at work in the output."""


@contextlib.contextmanager
def locked(output: Path) -> Iterator[Path]:
    """The work folder of an output, which is this process's alone meanwhile."""
    work = output / WORK_FOLDER
    work.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(work / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise BusyError(
            f"Another process is preparing {output}; wait for it or choose another output."
        ) from None
    try:
        yield work
    finally:
        lock.release()


def holds_what_is_asked_for(output: Path, settings: PrepareSettings) -> bool:
    """Whether these very settings have been carried out there: nothing needs to be looked at then."""
    return (output / MANIFEST_FILE).exists() and not _unlike(read_manifest(output).settings, settings)


def is_finished(output: Path, settings: PrepareSettings) -> bool:
    if not output.exists():
        return False
    if not output.is_dir():
        raise ValueError(f"The output {output} is a file; name a folder.")
    if (output / MANIFEST_FILE).exists():
        _refuse_other_settings(output, read_manifest(output).settings, settings, "holds shards")
        return True
    refuse_foreign(output)
    return False


def refuse_foreign(output: Path) -> None:
    """Raises ValueError if the folder holds what no preparation has put there."""
    foreign = sorted(path.name for path in output.iterdir()) if output.exists() else []
    if foreign and WORK_FOLDER not in foreign:
        raise ValueError(
            f"The output {output} holds something else "
            f"({', '.join(foreign[:5])}{', …' if len(foreign) > 5 else ''}). "
            "Nothing was changed; choose an empty or new folder."
        )


def clear_away(output: Path) -> None:
    """Delete what a run left behind that was killed right after its last step."""
    if (output / WORK_FOLDER).exists():
        with contextlib.suppress(BusyError), locked(output) as work:  # else it is being deleted just now
            shutil.rmtree(work)


def _unlike(before: dict, settings: PrepareSettings) -> list[str]:
    now = settings.content()
    return [
        f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in now if before.get(name) != now[name]
    ]


def _refuse_other_settings(output: Path, before: dict, settings: PrepareSettings, what: str) -> None:
    if unlike := _unlike(before, settings):
        raise ValueError(
            f"The output {output} {what} made with other settings: {'; '.join(unlike)}. Nothing was "
            "changed; choose another output, or delete that folder first."
        )


def claim(work: Path, settings: PrepareSettings) -> None:
    """Note the settings on the first run; refuse to go on with others later."""
    path = work / "settings.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before.pop("format_version", 1) != FORMAT_VERSION:  # by whose rules shards may be written already
            raise ValueError(
                f"The output {work.parent} holds an unfinished preparation by an older version of this "
                "program, which chose documents in another way. Delete that folder and begin again."
            )
        _refuse_other_settings(work.parent, before, settings, "holds an unfinished preparation")
        print(f"Going on with the unfinished preparation in {work.parent}.")
    else:
        content = {**settings.content(), "format_version": FORMAT_VERSION}
        write_atomically(path, json.dumps(content).encode())


def kept_so_far(output: Path) -> str:
    """How far an unfinished preparation is, in words."""
    work = output / WORK_FOLDER
    if (work / INCOMING).exists():
        return "what has arrived is kept"
    try:
        parts, folders = _parts_of(work)
    except (OSError, ValueError, TypeError, KeyError):  # the last two: an older version's
        return "nothing is encoded yet"
    return f"{sum(folder.exists() for folder in folders):,} of {len(parts):,} parts are encoded"


def disk_full(output: Path) -> DiskFullError:
    """The arithmetic of a full disk: what is there, what is still to come, by the rate of the parts that are
    done.
    """
    work = output / WORK_FOLDER
    free = shutil.disk_usage(output if output.exists() else output.absolute().anchor).free
    try:
        parts, folders = _parts_of(work)
    except (OSError, ValueError, TypeError, KeyError):
        return DiskFullError(
            f"The disk is full: {free / 1e6:,.1f} MB are free at {output}, and nothing is encoded yet. "
            "Make room and run the same command again."
        )
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
        f"are encoded, in {written / 1e6:,.1f} MB; all will need about {encoded / 1e6:,.1f} MB, and the "
        "shards as much again before the parts are deleted. Make room and run the same command again: "
        "finished parts are kept."
    )


def _parts_of(work: Path) -> tuple[list[Part], list[Path]]:
    """The source's parts, and the folder of each when it is encoded."""
    parts = [Part(**part) for part in json.loads((work / PARTS_FILE).read_bytes())["parts"]]
    return parts, [work / "parts" / f"{number:05d}" for number in range(len(parts))]
