"""Between text and shards: a part of the source, encoded.

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
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.contamination import Ngrams
from data.shards import write_atomically
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
    ngrams: Ngrams | None = None,
    advance: Callable[[int, int], object] = lambda documents, tokens: None,
) -> None:
    """Encode documents into `folder`, which appears under its name only when it is complete.

    ids.bin holds the ids of all documents, each followed by `end_of_text`; rows.npy one ROW a document (its
    tokens count the end); counts.json what the reader counted. Stops after the document that reaches
    `limit_tokens`.
    """
    started = time.monotonic()
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    rows: list[np.ndarray] = []
    found: list[np.ndarray] = []
    total = 0
    end = np.array([end_of_text], dtype=encoder.dtype)
    with open(temporary / "ids.bin", "wb") as file, ThreadPoolExecutor(1) as helper:
        # While a batch is encoded (which frees Python's lock), the next is read and the last one written.
        waiting: deque[tuple[list[str], Future[list[np.ndarray]]]] = deque()
        batches = _batches(documents)
        while limit_tokens is None or total < limit_tokens:
            batch = next(batches, None)
            if batch is not None:
                waiting.append((batch, helper.submit(encoder.encode_batch, batch)))
                if len(waiting) < 2:
                    continue
            if not waiting:
                break
            texts, future = waiting.popleft()
            encoded = future.result()
            lengths = [len(ids) + 1 for ids in encoded]
            if limit_tokens is not None and total + sum(lengths) >= limit_tokens:
                keep = int(np.searchsorted(np.cumsum(lengths), limit_tokens - total)) + 1
                texts, encoded, lengths = texts[:keep], encoded[:keep], lengths[:keep]
            file.write(np.concatenate([piece for ids in encoded for piece in (ids, end)]).data)
            row = np.empty(len(texts), dtype=ROW)
            row["key"], row["tokens"] = list(map(content_key, texts)), lengths
            rows.append(row)
            if ngrams is not None:
                found.append(ngrams.found_in(texts))
            total += sum(lengths)
            advance(len(texts), sum(lengths))
        file.flush()
        os.fsync(file.fileno())
    np.save(temporary / "rows.npy", np.concatenate(rows) if rows else np.empty(0, dtype=ROW))
    if ngrams is not None:
        np.save(temporary / "ngrams.npy", np.unique(np.concatenate([np.empty(0, np.uint64), *found])))
    statistics = {
        "counts": dict(counts),
        "documents": sum(map(len, rows)),
        "tokens": total,
        "seconds": time.monotonic() - started,
    }
    write_atomically(temporary / "counts.json", json.dumps(statistics).encode())
    try:
        os.replace(temporary, folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(temporary)  # another process was faster: its part holds the same


def read_statistics(folder: Path) -> dict:
    """What a finished part counted: "counts", "documents", "tokens", "seconds"."""
    statistics: dict = json.loads((folder / "counts.json").read_text())
    return statistics


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
