"""Whether a shard directory is, to the last byte, what its receipt says."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.files import file_sha256
from data.shards import (
    TOKENIZER_FOLDER,
    Manifest,
    ShardEntry,
    ShardError,
    check_files,
    open_shard,
    read_manifest,
)
from data.tokenizer import load_tokenizer


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
    try:
        manifest.check_tokenizer(load_tokenizer(shard_dir / TOKENIZER_FOLDER))
    except ValueError as error:
        problems.append(f"{TOKENIZER_FOLDER}/: {error}")
    if problems:
        raise ShardError(
            f"{shard_dir} is not what its manifest says.\n" + "\n".join(f"- {p}" for p in problems)
        )
    size = sum(entry.bytes for entry in manifest.shards)
    return (
        f"{shard_dir} is whole: {len(manifest.shards):,} shards of {size:,} bytes with the recorded "
        "SHA-256 sums, "
        f"{manifest.documents():,} documents, {manifest.tokens():,} tokens, and their tokenizer."
    )


def _shard_problems(path: Path, entry: ShardEntry, manifest: Manifest) -> list[str]:
    problems = []
    if file_sha256(path) != entry.sha256:
        problems.append("its bytes have changed, the SHA-256 is another")
    try:
        column = open_shard(path)
    except ShardError as error:
        return [*problems, str(error)]
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
