"""Between text and shards: a part of the source, encoded.

Every part of a source is encoded on its own, in any order and by any number of processes, into a folder of
three files. Only then is it decided, from hashes alone, which documents are duplicates and which are for
validation; and the shards are cut from the kept documents in source order. So the shards are the same bytes
however the work was shared.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

from data.contamination import Ngrams
from data.encoder import FastEncoder
from data.files import commit, flush, write_atomically

BATCH_CHARACTERS = 4_000_000  # encoded and written together
HASHED_AT_ONCE = 2**20
LAST_BLANK = 32  # of ASCII: blank, tab, line ends and control characters lie below
ROW = np.dtype([("key", np.uint64), ("tokens", np.uint32)])  # what is kept of a document to choose by


class HasText(Protocol):
    """A document, ours or datatrove's."""

    @property
    def text(self) -> str: ...


def content_key(text: str) -> int:
    """64 bits (XXH3 of the UTF-8 bytes above 32) that two documents share when they differ in blanks, line
    ends and control characters at most.

    Among a thousand million documents, two different ones share a key with a probability of 3%.
    """
    content = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
    digest = xxhash.xxh3_64()
    for start in range(0, len(content), HASHED_AT_ONCE):  # numpy takes eight times the memory for a moment
        piece = content[start : start + HASHED_AT_ONCE]
        digest.update(np.compress(piece > LAST_BLANK, piece).data)
    return digest.intdigest()


def encode_part(
    documents: Iterable[HasText],
    counts: Counter[str],
    folder: Path,
    encoder: FastEncoder,
    end_of_text: int,
    *,
    limit_tokens: int | None = None,
    ngrams: Ngrams | None = None,
    advance: Callable[[int, int], object] = lambda documents, tokens: None,
) -> None:
    """Encode documents into `folder`, which appears under its name only when it is complete.

    ids.bin holds the ids of all documents, each followed by `end_of_text`; rows.bin one ROW a document (its
    tokens count the end); counts.json what the reader counted. Stops after the document that reaches
    `limit_tokens`, and knows of nothing behind it.
    """
    started = time.monotonic()
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    found = np.empty(0, np.uint64)
    number = total = 0
    end = np.array([end_of_text], dtype=encoder.dtype)
    is_limited = limit_tokens is not None
    with (
        open(temporary / "ids.bin", "wb") as ids_file,
        open(temporary / "rows.bin", "wb") as rows_file,
    ):
        for texts, counts_then in _batches(documents, counts, is_limited):
            encoded = encoder.encode_batch(texts)
            lengths = [len(ids) + 1 for ids in encoded]
            if limit_tokens is not None and total + sum(lengths) >= limit_tokens:
                keep = int(np.searchsorted(np.cumsum(lengths), limit_tokens - total)) + 1
                texts, encoded, lengths = texts[:keep], encoded[:keep], lengths[:keep]
                counts = counts_then[keep - 1]
            ids_file.write(np.concatenate([piece for ids in encoded for piece in (ids, end)]).data)
            rows = np.empty(len(texts), dtype=ROW)
            rows["key"], rows["tokens"] = list(map(content_key, texts)), lengths
            rows_file.write(rows.data)
            if ngrams is not None:
                found = np.union1d(found, ngrams.found_in(texts))
            number, total = number + len(texts), total + sum(lengths)
            advance(len(texts), sum(lengths))
            if limit_tokens is not None and total >= limit_tokens:
                break
        for file in (ids_file, rows_file):
            flush(file)
    if ngrams is not None:
        with open(temporary / "ngrams.npy", "wb") as ngrams_file:
            np.save(ngrams_file, found)
            flush(ngrams_file)
    statistics = {
        "counts": dict(counts),
        "documents": number,
        "tokens": total,
        "seconds": time.monotonic() - started,
    }
    write_atomically(temporary / "counts.json", json.dumps(statistics).encode())
    try:
        commit(temporary, folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(temporary)  # another process was faster: its part holds the same


def _batches(
    documents: Iterable[HasText], counts: Counter[str], keeps_counts: bool
) -> Iterator[tuple[list[str], list[Counter[str]]]]:
    """Texts to encode together and, if asked for, what had been counted when each of them came."""
    batch: list[str] = []
    counts_then: list[Counter[str]] = []
    characters = 0
    for document in documents:
        batch.append(document.text)
        if keeps_counts:
            counts_then.append(counts.copy())
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch, counts_then
            batch, counts_then, characters = [], [], 0
    if batch:
        yield batch, counts_then
