"""The format on disk: a manifest, and Arrow files that `datasets` reads; and `TokenBlocks`, which cuts blocks
from them.

A shard is an Arrow IPC *stream* with the one column `input_ids: list<uint16>` (uint32 for vocabularies over
65,536 words), one row per document, each ending in the tokenizer's end-of-text id, all rows in ONE record
batch: the ids of a shard are then one contiguous buffer that is mapped, not read. `docs/formats.md` describes
every field.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from data.files import commit, file_sha256, flush, write_atomically
from data.tokenizer import fingerprint_of_format_1, load_tokenizer, tokenizer_fingerprint

MANIFEST_FILE = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
# 2 added the receipt's own checksum, hashes of the tokenizer's files, where the text came from, and what a
# tokenizer does to a text before its merges to the fingerprint. Sets of format 1 are read as they were.
FORMAT_VERSION = 2
COLUMN = "input_ids"
MAX_TOKENS_PER_SHARD = 2**31 - 1  # Arrow's list offsets are int32


class ShardError(ValueError):
    """A shard directory that is not what its manifest says; the message names the file."""


@dataclass(frozen=True)
class ShardEntry:
    """One shard file. `sha256` is hex, over the file's bytes."""

    split: str
    file: str
    bytes: int
    sha256: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class Manifest:
    """What a shard directory holds: the receipt that preparation writes last.

    `dtype` is "uint16" or "uint32"; `vocab_size` counts special tokens; `settings` are those of the
    preparation, `origin` what they led to: dataset, configuration, commit, files; `counts` holds documents
    read, dropped and repaired; `tokenizer_files` maps the names in tokenizer/ to their SHA-256; `sha256` is
    that of the file this object was read from ("" before it is written).
    """

    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    eos_token_id: int
    dtype: str
    shards: tuple[ShardEntry, ...]
    settings: dict[str, Any]
    origin: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    tokenizer_files: dict[str, str] = field(default_factory=dict)
    contamination: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    elapsed_seconds: float = 0.0
    format_version: int = FORMAT_VERSION
    sha256: str = field(default="", compare=False)

    def of_split(self, split: str) -> tuple[ShardEntry, ...]:
        return tuple(shard for shard in self.shards if shard.split == split)

    def tokens(self, split: str | None = None) -> int:
        return sum(shard.tokens for shard in self.shards if split in (None, shard.split))

    def documents(self, split: str | None = None) -> int:
        return sum(shard.documents for shard in self.shards if split in (None, shard.split))

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(shard.split for shard in self.shards))

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Raises ShardError unless the shards hold this very tokenizer's ids."""
        fingerprint = fingerprint_of_format_1 if self.format_version == 1 else tokenizer_fingerprint
        seen = fingerprint(tokenizer)
        if seen != self.tokenizer_fingerprint:
            raise ShardError(
                f"The shards were made with the tokenizer {self.tokenizer!r} ({self.vocab_size:,} words, "
                "fingerprint "
                f"{self.tokenizer_fingerprint[:12]}), but this one has {len(tokenizer):,} words and "
                "fingerprint "
                f"{seen[:12]}. Load the tokenizer from the shard directory's {TOKENIZER_FOLDER}/ folder, "
                "or prepare "
                "the text again."
            )


def read_manifest(shard_dir: str | os.PathLike[str]) -> Manifest:
    """The manifest of a finished shard directory.

    Raises:
        ShardError: if there is none, or it is damaged or of another format version.
    """
    path = Path(shard_dir) / MANIFEST_FILE
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(
            f"No token shards in {os.fspath(shard_dir)!r}: {MANIFEST_FILE} is missing. "
            "Preparation writes it last; run `python -m data.prepare` (again) to finish."
        ) from None
    try:
        fields = json.loads(content)
        version = fields["format_version"]
        if version not in range(1, FORMAT_VERSION + 1):
            raise ShardError(
                f"{path} is of format version {version}; this code reads versions 1 to {FORMAT_VERSION}."
            )
        if version > 1 and fields.pop("checksum") != _checksum(fields):
            raise ShardError(
                f"{path} was changed after it was written: its checksum is another. Put the original back, "
                "or prepare the text again."
            )
        shards = tuple(ShardEntry(**entry) for entry in fields.pop("shards"))
        return Manifest(**fields, shards=shards, sha256=hashlib.sha256(content).hexdigest())
    except ShardError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ShardError(
            f"{path} is damaged ({type(error).__name__}: {error}); prepare the text again."
        ) from error


def write_manifest(shard_dir: Path, manifest: Manifest) -> Manifest:
    """Write `manifest.json` so that it is either whole or absent; returns the manifest with its `sha256`."""
    fields = asdict(manifest)
    del fields["sha256"]
    fields["checksum"] = _checksum(fields)
    content = (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
    write_atomically(Path(shard_dir) / MANIFEST_FILE, content)
    return read_manifest(shard_dir)


def _checksum(fields: dict[str, Any]) -> str:
    """SHA-256 (hex) of a manifest's fields, however the file is laid out."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def write_shard(path: Path, split: str, ids: np.ndarray, offsets: np.ndarray) -> ShardEntry:
    """Write one shard: document d is ids[offsets[d]:offsets[d + 1]], its last id being end-of-text.

    ids: (tokens,) uint16 or uint32; offsets: (documents + 1,) int32 from 0 to tokens.
    """
    values = pa.array(ids, from_pandas=False)
    column = pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), values)
    batch = pa.record_batch([column], names=[COLUMN])
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        hashing = _HashingFile(file)
        with pa.ipc.new_stream(pa.PythonFile(hashing, mode="w"), batch.schema) as writer:
            writer.write_batch(batch)
        flush(file)
        size = file.tell()
    commit(temporary, path)
    return ShardEntry(split, path.name, size, hashing.digest.hexdigest(), len(offsets) - 1, len(ids))


class _HashingFile:
    """A file to write to that hashes what passes: the bytes are in the cache then, and need no second
    reading.
    """

    def __init__(self, file: Any):
        self._file = file
        self.digest = hashlib.sha256()
        self.closed = False

    def write(self, content: Any) -> int:
        view = memoryview(content)
        self.digest.update(view)
        self._file.write(view)
        return view.nbytes

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:  # the caller closes the file itself, after fsync
        self.closed = True


def open_shard(path: Path) -> pa.ListArray:
    """The `input_ids` column of a shard, mapped: nothing is read until it is used.

    Raises:
        ShardError: if the file is not a whole shard of this format.
    """
    try:
        stream = pa.ipc.open_stream(pa.memory_map(os.fspath(path)))
        column = stream.read_next_batch().column(COLUMN)
        column.validate()  # a length that the file gives, past its end, would be a SIGBUS on reading
    except (OSError, StopIteration, KeyError, pa.ArrowException) as error:
        raise ShardError(
            f"{path} is not a readable token shard ({error}). Prepare the text again."
        ) from error
    if not isinstance(column, pa.ListArray) or column.type.value_type not in (pa.uint16(), pa.uint32()):
        raise ShardError(f"{path}: the column {COLUMN} is {column.type}, not a list of uint16 or uint32.")
    return column


def read_shard_documents(path: Path) -> Iterator[np.ndarray]:
    """Each document's ids, end-of-text included, in order."""
    column = open_shard(path)
    values, offsets = column.values.to_numpy(zero_copy_only=True), column.offsets.to_numpy()
    for start, end in itertools.pairwise(offsets):
        yield values[start:end]


def check_files(shard_dir: Path, manifest: Manifest) -> None:
    """Every shard is there with its size and none is too many; reads no contents, so it is quick on any set.

    Raises:
        ShardError: naming everything that is wrong.
    """
    problems = []
    sizes = {
        entry.name: entry.stat().st_size for entry in os.scandir(shard_dir) if entry.name.endswith(".arrow")
    }
    for shard in manifest.shards:
        size = sizes.pop(shard.file, None)
        if size is None:
            problems.append(f"{shard.file} is missing")
        elif size != shard.bytes:
            problems.append(f"{shard.file} has {size:,} bytes instead of {shard.bytes:,}")
    problems += [f"{name} is not in {MANIFEST_FILE}" for name in sorted(sizes)]
    if problems:
        raise ShardError(
            f"The shards in {shard_dir} are not those of their manifest: " + "; ".join(problems) + "."
        )


class BlockRows(Sequence):
    """Rows of one batch, cut together: `input_ids` is int64 (B, T). As a sequence: dicts, as from single
    indexing.
    """

    def __init__(self, input_ids: torch.Tensor):
        self.input_ids = input_ids

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, row):
        ids = self.input_ids[row]
        return {"input_ids": ids, "labels": ids}


class TokenBlocks(Dataset):
    """Blocks of `block_size` consecutive tokens of a split, as if its shards were one long stream.

    blocks[i] is {"input_ids": int64 (T,), "labels": the same}, tokens i·T to (i + 1)·T; the model shifts the
    labels, so a block has T - 1 targets. What is left over at the end of the stream, less than a block, is
    not used. Opening costs the same however large the shards are: files are mapped when first touched. File
    sizes are checked always; `check_hashes=True` reads and hashes every file of the split first.

    Raises:
        ShardError: if the directory is not what its manifest says.
        ValueError: if the split does not exist or holds less than one block.
    """

    def __init__(
        self,
        shard_dir: str | os.PathLike[str],
        block_size: int,
        split: str = "train",
        *,
        check_hashes: bool = False,
    ):
        self.shard_dir = Path(shard_dir)
        self.block_size = block_size
        self.split = split
        self.manifest = read_manifest(self.shard_dir)
        check_files(self.shard_dir, self.manifest)
        if block_size < 2:
            raise ValueError(f"block_size={block_size}: a block needs at least two tokens to have a target.")
        self._entries = self.manifest.of_split(split)
        if not self._entries:
            raise ValueError(
                f"{self.shard_dir} has no split {split!r}; it has {', '.join(self.manifest.splits)}."
            )
        if check_hashes:
            for entry in self._entries:
                if file_sha256(self.shard_dir / entry.file) != entry.sha256:
                    raise ShardError(
                        f"{self.shard_dir / entry.file} is damaged: its SHA-256 is not the manifest's."
                    )
        tokens = [entry.tokens for entry in self._entries]
        self.total_tokens = sum(tokens)
        if self.total_tokens < block_size:
            raise ValueError(
                f"The {split} split of {self.shard_dir} has {self.total_tokens:,} tokens, less than one "
                "block of "
                f"{block_size:,}. Give it more text or use a smaller block_size."
            )
        self._starts = [0, *np.cumsum(tokens).tolist()]  # of each shard, in tokens of the stream
        self._values: list[np.ndarray | None] = [None] * len(self._entries)
        self._dtype = np.dtype(self.manifest.dtype)

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer beside the shards. Raises ValueError if there is none, or the ids are another's."""
        tokenizer = load_tokenizer(self.shard_dir / TOKENIZER_FOLDER)
        self.manifest.check_tokenizer(tokenizer)
        return tokenizer

    def __len__(self) -> int:
        return self.total_tokens // self.block_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> BlockRows:
        """Several blocks at once; this is what DataLoader calls. Indices lie in [0, len(self))."""
        size = self.block_size
        rows = np.empty((len(indices), size), dtype=self._dtype)
        starts, opened = self._starts, self._values
        for row, index in enumerate(indices):
            start = index * size
            shard = bisect_right(starts, start) - 1
            offset = start - starts[shard]
            values = opened[shard]
            if values is None:
                values = self._open(shard)
            ids = values[offset : offset + size]
            if len(ids) == size:
                rows[row] = ids
            else:
                self._copy_across_shards(rows[row], start)
        return BlockRows(torch.from_numpy(rows.astype(np.int64)))

    def _copy_across_shards(self, row: np.ndarray, start: int) -> None:
        filled = 0
        while filled < len(row):
            shard = bisect_right(self._starts, start + filled) - 1
            offset = start + filled - self._starts[shard]
            ids = self._open(shard)[offset : offset + len(row) - filled]
            row[filled : filled + len(ids)] = ids
            filled += len(ids)

    def _open(self, shard: int) -> np.ndarray:
        values = self._values[shard]
        if values is None:
            entry = self._entries[shard]
            values = open_shard(self.shard_dir / entry.file).values.to_numpy(zero_copy_only=True)
            if values.dtype != self._dtype or len(values) != entry.tokens:
                raise ShardError(
                    f"{self.shard_dir / entry.file} holds {len(values):,} {values.dtype} ids; its manifest "
                    "says "
                    f"{entry.tokens:,} {self._dtype}."
                )
            self._values[shard] = values
        return values

    def __getstate__(self) -> dict[str, Any]:
        """Mapped buffers do not travel to other processes; they are mapped again there."""
        return {**self.__dict__, "_values": [None] * len(self._entries)}
