"""Which documents are kept, and on which side of the split they stand: decided from hashes alone.

The rows of all parts (a key and a token count a document) are sorted by key on the disk, in buckets of keys
that fit into memory one at a time; so that memory hardly grows with the corpus.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.parts import ROW

# Unless asked otherwise: the hundredth of documents with the smallest keys, the first of them always, and
# no more than give an exact validation loss anyway. As documents are added, none of these bounds rises.
VALIDATION_SHARE, VALIDATION_TOKENS_AT_MOST = 0.01, 10_000_000
VALIDATION_KEYS = int(2**64 * VALIDATION_SHARE)
ROWS_AT_ONCE = 2**20  # sorted together; a few tens of bytes of memory each
DROPPED_AT_ONCE = 2**20
# What is sorted: `row` counts from the beginning of the source; copies with one key may share one entry.
ENTRY = np.dtype([("key", np.uint64), ("row", np.uint64), ("tokens", np.uint64)])
TRAIN, VALIDATION, DROPPED = 0, 1, 2
SPLITS = {"train": TRAIN, "validation": VALIDATION}


@dataclass(frozen=True)
class Selection:
    """Which documents go where. `folder` holds, for each part with copies, the numbers of the rows that are
    dropped.
    """

    parts: tuple[Path, ...]
    starts: tuple[int, ...]  # of each part, in rows of the source
    folder: Path
    documents: int  # up to the token limit; duplicates are among them
    tokens: int
    duplicates: int
    threshold: int  # documents whose key is at most this are for validation; -1: none

    def firsts(self, part: int) -> range:
        """The numbers of the rows that `rows` can begin with."""
        return range(0, self.starts[part + 1] - self.starts[part], ROWS_AT_ONCE)

    def rows(self, part: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        """tokens (n,) int64 and places (n,) int8 of ROWS_AT_ONCE rows of a part, or of what is left of it.

        Places are TRAIN, VALIDATION or DROPPED; what lies behind the token limit is dropped too.
        """
        rows = np.fromfile(self.parts[part] / "rows.bin", ROW, ROWS_AT_ONCE, offset=first * ROW.itemsize)
        places = np.full(len(rows), TRAIN, dtype=np.int8)
        if self.threshold >= 0:
            places[rows["key"] <= np.uint64(self.threshold)] = VALIDATION
        copies = self.folder / f"{part:05d}.dropped"
        if copies.exists():
            dropped = np.memmap(copies, np.uint32, mode="r")
            low, high = np.searchsorted(dropped, [first, first + len(rows)])
            places[dropped[low:high] - np.uint32(first)] = DROPPED
        places[max(0, self.documents - self.starts[part] - first) :] = DROPPED
        return rows["tokens"].astype(np.int64), places


def count_rows(part: Path) -> int:
    return (part / "rows.bin").stat().st_size // ROW.itemsize


def select_documents(
    parts: list[Path],
    folder: Path,
    *,
    deduplicate: bool,
    validation_tokens: int | None,
    limit_tokens: int | None,
) -> Selection:
    """Drop later copies of a document, and put those with the smallest keys aside for validation: until they
    have `validation_tokens`, or as VALIDATION_KEYS says where that is None.

    A key depends on the content alone: reordering or adding text never moves a training document to
    validation, and copies of one document never stand on both sides. `folder` is made anew.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sizes = [count_rows(part) for part in parts]
    buckets = 1 << max(0, (sum(sizes) // ROWS_AT_ONCE).bit_length())
    dropped = _DroppedRows(folder, sizes)
    documents, total = _scatter(parts, folder, buckets, deduplicate, limit_tokens, dropped)
    wanted = VALIDATION_TOKENS_AT_MOST if validation_tokens is None else validation_tokens
    threshold, smallest = -1, None
    reached = 0 if wanted > 0 else None  # tokens with the smallest keys so far, until enough
    for bucket in range(buckets):  # in the order of their keys
        path = folder / f"{bucket:05d}.bucket"
        if not path.exists():
            continue
        entries = np.fromfile(path, ENTRY)
        path.unlink()
        order = np.argsort(entries["key"], kind="stable")  # of equal keys, the first document comes first
        keys = entries["key"][order]
        tokens = entries["tokens"][order]
        if deduplicate:
            copies = np.concatenate([[False], keys[1:] == keys[:-1]])
            dropped.add(entries["row"][order[copies]])
            tokens, keys = np.maximum.reduceat(tokens, np.flatnonzero(~copies)), keys[~copies]
        smallest = int(keys[0]) if smallest is None else smallest
        if reached is not None:
            sums = reached + np.cumsum(tokens.astype(np.int64))
            enough = int(np.searchsorted(sums, wanted))
            threshold = int(keys[min(enough, len(keys) - 1)])
            reached = None if enough < len(keys) else int(sums[-1])
    dropped.write()
    if validation_tokens is None and smallest is not None:
        threshold = min(threshold, max(smallest, VALIDATION_KEYS))
    return Selection(
        tuple(parts),
        tuple(np.cumsum([0, *sizes]).tolist()),
        folder,
        documents,
        total,
        dropped.count,
        threshold,
    )


def _scatter(
    parts: list[Path],
    folder: Path,
    buckets: int,
    deduplicate: bool,
    limit_tokens: int | None,
    dropped: _DroppedRows,
) -> tuple[int, int]:
    """Append the rows of all parts to the bucket of their keys; returns documents and tokens up to the limit.

    Copies within ROWS_AT_ONCE are found at once, so that not even a page that the web is full of makes a
    bucket large.
    """
    shift = np.uint64(64 - (buckets.bit_length() - 1))
    documents = total = 0
    for part in parts:
        for first in range(0, count_rows(part), ROWS_AT_ONCE):
            rows = np.fromfile(part / "rows.bin", ROW, ROWS_AT_ONCE, offset=first * ROW.itemsize)
            tokens = rows["tokens"].astype(np.uint64)
            sums = total + np.cumsum(tokens)
            if limit_tokens is not None:
                used = int(np.searchsorted(sums, limit_tokens)) + 1
                rows, tokens, sums = rows[:used], tokens[:used], sums[:used]
            order = np.argsort(rows["key"], kind="stable")
            keys, numbers = rows["key"][order], documents + order.astype(np.uint64)
            starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
            entries = np.empty(len(starts), ENTRY)
            entries["key"], entries["row"] = keys[starts], numbers[starts]
            if deduplicate:
                copies = np.ones(len(keys), dtype=bool)
                copies[starts] = False
                dropped.add(numbers[copies])
            # Of copies, which differ in blanks, the longest counts: another one in front changes no bound.
            together = np.maximum if deduplicate else np.add
            entries["tokens"] = together.reduceat(tokens[order], starts)
            # A shift by 64 bits is undefined: a single bucket takes everything.
            of_bucket = entries["key"] >> shift if buckets > 1 else np.zeros(len(entries), np.uint64)
            edges = np.searchsorted(of_bucket, np.arange(buckets + 1, dtype=np.uint64))
            for bucket in np.flatnonzero(np.diff(edges)):
                with open(folder / f"{bucket:05d}.bucket", "ab") as file:
                    file.write(entries[edges[bucket] : edges[bucket + 1]].data)
            documents, total = documents + len(rows), int(sums[-1])
            if limit_tokens is not None and total >= limit_tokens:
                return documents, total
    return documents, total


class _DroppedRows:
    """Numbers of dropped rows, gathered in any order; `write` leaves a sorted file for each part that has
    some.
    """

    def __init__(self, folder: Path, sizes: list[int]):
        self.folder = folder
        self.starts = np.cumsum([0, *sizes]).astype(np.uint64)  # of each part, in rows of the source
        self.waiting: list[np.ndarray] = []
        self.count = self.held = 0

    def add(self, rows: np.ndarray) -> None:
        self.waiting.append(rows)
        self.count += len(rows)
        self.held += len(rows)
        if self.held >= DROPPED_AT_ONCE:
            self._spill()

    def write(self) -> None:
        self._spill()
        for path in self.folder.glob("*.dropped"):  # of one part each: 4 bytes for each of its copies
            np.sort(np.fromfile(path, np.uint32)).tofile(path)

    def _spill(self) -> None:
        rows = np.sort(np.concatenate([np.empty(0, np.uint64), *self.waiting]))
        edges = np.searchsorted(rows, self.starts)
        for part in np.flatnonzero(np.diff(edges)):
            with open(self.folder / f"{part:05d}.dropped", "ab") as file:
                inside = rows[edges[part] : edges[part + 1]] - self.starts[part]
                file.write(inside.astype(np.uint32).data)
        self.waiting, self.held = [], 0
