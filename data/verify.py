"""Whether a shard directory is, to the last byte, what its receipt says."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.files import file_sha256
from data.output import WORK_FOLDER
from data.shards import (
    MANIFEST_FILE,
    TOKENIZER_FOLDER,
    Manifest,
    ShardEntry,
    ShardError,
    check_files,
    open_shard,
    read_manifest,
)
from data.tokenizer import load_tokenizer

# What a set has beside its own files when it lies on the Hub or came from there.
OF_THE_HUB = ("README.md", ".gitattributes", ".cache")


def verify(shard_dir: Path) -> str:
    """Check files, sizes, hashes, documents, ids and the tokenizer; returns a line that says what was
    checked.

    Raises:
        ShardError: naming every file that is wrong, and what is wrong with it.
    """
    manifest = read_manifest(shard_dir)
    problems = []
    try:
        check_files(shard_dir, manifest)
    except ShardError as error:
        problems.append(str(error))
    for entry in manifest.shards:
        path = shard_dir / entry.file
        if path.exists() and path.stat().st_size == entry.bytes:
            problems += [f"{entry.file}: {problem}." for problem in _shard_problems(path, entry, manifest)]
    problems += _foreign_files(shard_dir, manifest) + _count_problems(manifest)
    problems += _tokenizer_file_problems(shard_dir, manifest)
    try:
        manifest.check_tokenizer(load_tokenizer(shard_dir / TOKENIZER_FOLDER))
    except ValueError as error:
        problems.append(f"{TOKENIZER_FOLDER}/: {error}")
    if problems:
        raise ShardError(
            f"{shard_dir} is not what its manifest says.\n" + "\n".join(f"- {p}" for p in problems)
        )
    size = sum(entry.bytes for entry in manifest.shards)
    line = (
        f"{shard_dir} is whole: {len(manifest.shards):,} shards of {size:,} bytes with the recorded SHA-256 "
        f"sums, {manifest.documents():,} documents, {manifest.tokens():,} tokens, and their tokenizer."
    )
    if manifest.format_version == 1:
        line += (
            f" (Its receipt is of format 1: {MANIFEST_FILE} has no checksum of its own and the tokenizer's "
            "files no hashes, so a changed normalizer, pre-tokenizer or receipt would not be noticed.)"
        )
    return line


def _foreign_files(shard_dir: Path, manifest: Manifest) -> list[str]:
    """What stands in the folder and belongs to no set; `check_files` has named foreign .arrow files."""
    ours = {MANIFEST_FILE, TOKENIZER_FOLDER, *OF_THE_HUB, *(entry.file for entry in manifest.shards)}
    names = {path.name for path in shard_dir.iterdir() if path.suffix != ".arrow"}
    return [
        f"{name} is not in {MANIFEST_FILE}."
        + " The command that made the set, run again, clears it away." * (name == WORK_FOLDER)
        for name in sorted(names - ours)
    ]


def _count_problems(manifest: Manifest) -> list[str]:
    read = manifest.counts.get("documents", manifest.documents())
    dropped = manifest.counts.get("duplicates", 0) + manifest.counts.get("near_duplicates", 0)
    if read - dropped == manifest.documents():
        return []
    return [
        f"{MANIFEST_FILE}: {read:,} documents were read and {dropped:,} dropped, which leaves "
        f"{read - dropped:,}; the shards hold {manifest.documents():,}."
    ]


def _tokenizer_file_problems(shard_dir: Path, manifest: Manifest) -> list[str]:
    if manifest.format_version == 1:
        return []
    problems = []
    folder = shard_dir / TOKENIZER_FOLDER
    seen = hashes_of_files(folder)
    for name in sorted(seen.keys() | manifest.tokenizer_files.keys()):
        before, now = manifest.tokenizer_files.get(name), seen.get(name)
        if before is None:
            problems.append(f"{TOKENIZER_FOLDER}/{name} is not in {MANIFEST_FILE}.")
        elif now is None:
            problems.append(f"{TOKENIZER_FOLDER}/{name} is missing.")
        elif now != before:
            problems.append(f"{TOKENIZER_FOLDER}/{name}: its bytes have changed, the SHA-256 is another.")
    return problems


def hashes_of_files(folder: Path) -> dict[str, str]:
    """SHA-256 (hex) of every file of a folder, by its name there; of none if there is no such folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def _shard_problems(path: Path, entry: ShardEntry, manifest: Manifest) -> list[str]:
    if file_sha256(path) != entry.sha256:  # nothing in it can be relied on, not even its size in memory
        return ["its bytes have changed, the SHA-256 is another"]
    try:
        column = open_shard(path)
    except ShardError as error:
        return [str(error)]
    problems = []
    ids = column.values.to_numpy(zero_copy_only=True)
    if len(column) != entry.documents or len(ids) != entry.tokens:
        problems.append(
            f"it holds {len(column):,} documents of {len(ids):,} tokens, not {entry.documents:,} of "
            f"{entry.tokens:,}"
        )
    if ids.dtype != np.dtype(manifest.dtype):
        problems.append(f"its ids are {ids.dtype}, not {manifest.dtype}")
    if len(ids) and int(ids.max()) >= manifest.vocab_size:
        problems.append(
            f"it holds the id {int(ids.max()):,}; the vocabulary has {manifest.vocab_size:,} words"
        )
    ends = np.flatnonzero(ids == manifest.eos_token_id) + 1
    if not np.array_equal(ends, column.offsets.to_numpy()[1:]):
        problems.append("its documents do not end, each once, in the end-of-text id")
    return problems
