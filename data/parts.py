"""Between text and shards: encoded parts, the choice of what is kept, and the assembly of the final files.

Every part of a source is encoded on its own, in any order and by any number of processes, into a folder of
three files. Only then is it decided, from hashes alone, which documents are duplicates and which are for
validation; and the shards are cut from the kept documents in source order. So the shards are the same bytes
however the work was shared.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.shards import ShardEntry, write_atomically, write_shard
from data.sources import Document
from data.tokenizer import FastEncoder

BATCH_CHARACTERS = 4_000_000  # encoded together: enough to keep every thread busy
WHITE_SPACE = b" \t\r\n\v\f"
ROW = np.dtype([("key", np.uint64), ("tokens", np.uint32)])  # what is kept of a document to choose by


def content_key(text: str) -> int:
    """64 bits that two documents share when they differ in white space at most.

    Among a thousand million documents, two different ones share a key with a probability of 3%.
    """
    content = text.encode("utf-8").translate(None, WHITE_SPACE)
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def encode_part(
    documents: Iterable[Document],
    counts: Counter[str],
    folder: Path,
    encoder: FastEncoder,
    end_of_text: int,
    *,
    limit_tokens: int | None = None,
    advance: Callable[[int, int], object] = lambda documents, tokens: None,
) -> None:
    """Encode documents into `folder`, which appears under its name only when it is complete.

    ids.bin holds the ids of all documents, each followed by `end_of_text`; rows.npy one ROW a document (its
    tokens count the end); counts.json what the reader counted. Stops after the document that reaches
    `limit_tokens`.
    """
    started = time.monotonic()
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    rows: list[np.ndarray] = []
    total = 0
    end = np.array([end_of_text], dtype=encoder.dtype)
    with open(temporary / "ids.bin", "wb") as file:
        for batch in _batches(documents):
            encoded = encoder.encode_batch(batch)
            lengths = [len(ids) + 1 for ids in encoded]
            if limit_tokens is not None and total + sum(lengths) >= limit_tokens:
                keep = int(np.searchsorted(np.cumsum(lengths), limit_tokens - total)) + 1
                batch, encoded, lengths = batch[:keep], encoded[:keep], lengths[:keep]
            with_ends = [piece for ids in encoded for piece in (ids, end)]
            file.write(np.concatenate(with_ends).data)
            rows.append(
                np.array([(content_key(t), n) for t, n in zip(batch, lengths, strict=True)], dtype=ROW)
            )
            total += sum(lengths)
            advance(len(batch), sum(lengths))
            if limit_tokens is not None and total >= limit_tokens:
                break
        file.flush()
        os.fsync(file.fileno())
    np.save(temporary / "rows.npy", np.concatenate(rows) if rows else np.empty(0, dtype=ROW))
    statistics = {"counts": dict(counts), "seconds": time.monotonic() - started}
    write_atomically(temporary / "counts.json", json.dumps(statistics).encode())
    os.replace(temporary, folder)


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document.text)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class Selection:
    """Which documents go where: one int8 array per part, of TRAIN, VALIDATION or DROPPED a document."""

    places: list[np.ndarray]
    duplicates: int
    threshold: int  # documents whose key is at most this are for validation; -1: none


TRAIN, VALIDATION, DROPPED = 0, 1, 2
SPLITS = {"train": TRAIN, "validation": VALIDATION}


def select_documents(
    rows: list[np.ndarray], *, deduplicate: bool, validation_tokens: int, limit_tokens: int | None
) -> Selection:
    """Drop later copies of a document, and put those with the smallest keys aside until they have enough
    tokens.

    A key depends on the content alone: reordering or adding text never moves a training document to
    validation, and copies of one document never stand on both sides.
    """
    sizes = [len(part) for part in rows]
    keys = np.concatenate([part["key"] for part in rows])
    tokens = np.concatenate([part["tokens"] for part in rows]).astype(np.int64)
    places = np.full(len(keys), TRAIN, dtype=np.int8)
    if limit_tokens is not None:
        used = int(np.searchsorted(np.cumsum(tokens), limit_tokens)) + 1
        places[used:] = DROPPED
        keys, tokens = keys[:used], tokens[:used]
    order = np.argsort(keys, kind="stable")  # stable: of equal keys, the first document comes first
    copies = order[1:][keys[order[1:]] == keys[order[:-1]]] if deduplicate else order[:0]
    places[copies] = DROPPED
    threshold = -1
    if validation_tokens > 0:
        kept = order[places[order] == TRAIN]
        reached = np.searchsorted(np.cumsum(tokens[kept]), validation_tokens)
        if reached < len(kept):
            threshold = int(keys[kept[reached]])
            chosen = np.flatnonzero(keys <= np.uint64(threshold))
            places[chosen[places[chosen] == TRAIN]] = VALIDATION
        else:
            places[kept] = VALIDATION
    return Selection(np.split(places, np.cumsum(sizes)[:-1]), len(copies), threshold)


@dataclass(frozen=True)
class Cut:
    """One shard to write: documents of the stream of its split, as (part, first row, last row + 1)
    stretches.
    """

    split: str
    file: str
    stretches: list[tuple[int, int, int]]


def plan_cuts(rows: list[np.ndarray], selection: Selection, tokens_per_shard: int) -> list[Cut]:
    """Where each split's stream of documents is cut: after the last document that still fits the shard."""
    cuts = []
    for split, place in SPLITS.items():
        shards: list[list[tuple[int, int, int]]] = []
        filled = tokens_per_shard  # the first document opens a shard
        for part, (part_rows, places) in enumerate(zip(rows, selection.places, strict=True)):
            chosen = np.flatnonzero(places == place)
            ends = np.cumsum(part_rows["tokens"][chosen].astype(np.int64))
            at = 0
            while at < len(chosen):
                before = int(ends[at - 1]) if at else 0
                fits = int(np.searchsorted(ends, before + tokens_per_shard - filled, side="right"))
                if (
                    fits <= at
                ):  # nothing fits any more: a new shard, which takes one document whatever its size
                    shards.append([])
                    filled = 0
                    fits = max(at + 1, int(np.searchsorted(ends, before + tokens_per_shard, side="right")))
                shards[-1].append((part, int(chosen[at]), int(chosen[fits - 1]) + 1))
                filled += int(ends[fits - 1]) - before
                at = fits
        cuts += [Cut(split, f"{split}-{n:05d}.arrow", stretches) for n, stretches in enumerate(shards)]
    return cuts


def write_cut(
    cut: Cut, rows: list[np.ndarray], selection: Selection, parts: list[Path], dtype: np.dtype, output: Path
):
    """Copy a shard's documents out of the encoded parts; returns its ShardEntry."""
    place = SPLITS[cut.split]
    ids_runs, length_runs = [], []
    for part, first, last in cut.stretches:
        lengths = rows[part]["tokens"].astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        source = np.memmap(parts[part] / "ids.bin", dtype=dtype, mode="r")
        chosen = selection.places[part][first:last] == place
        edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]))) + first
        ids_runs += [source[starts[a] : starts[b]] for a, b in zip(edges[::2], edges[1::2], strict=True)]
        length_runs.append(lengths[first:last][chosen])
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(length_runs))]).astype(np.int32)
    entry: ShardEntry = write_shard(output / cut.file, cut.split, np.concatenate(ids_runs), offsets)
    return entry
