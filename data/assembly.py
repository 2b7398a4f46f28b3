"""From encoded parts to shards: what is kept, where the files are cut, and the manifest.

It is decided here, from hashes alone, which documents are duplicates and which are for validation; the shards
are then cut from the kept documents in source order. So they are the same bytes however the encoding was
shared out.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.parts import read_statistics
from data.readers import PIECE_OF_TEXT_CHARACTERS
from data.shards import ShardEntry, write_atomically, write_shard

# Unless asked otherwise: one token in a hundred, and no more than gives an exact validation loss anyway.
VALIDATION_SHARE, VALIDATION_AT_MOST = 0.01, 10_000_000

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(ValueError):
    """No room to go on; the message says how much is missing. The same command continues later."""


def is_no_room(error: BaseException | None) -> bool:
    """Whether this, or what it was raised from, is the system's refusal to store more."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return True
        # tokenizers writes its file in Rust, and only the text of its error says why that failed.
        if type(error) is Exception and any(f"os error {code})" in str(error) for code in NO_ROOM):
            return True
        error = error.__cause__ or error.__context__
    return False


@dataclass(frozen=True)
class Selection:
    """Which documents go where: one int8 array per part, of TRAIN, VALIDATION or DROPPED a document."""

    places: list[np.ndarray]
    documents: int  # up to the token limit; duplicates are among them
    tokens: int
    duplicates: int
    validation_tokens: int  # wanted
    threshold: int  # documents whose key is at most this are for validation; -1: none


TRAIN, VALIDATION, DROPPED = 0, 1, 2
SPLITS = {"train": TRAIN, "validation": VALIDATION}


def select_documents(
    rows: list[np.ndarray], *, deduplicate: bool, validation_tokens: int | None, limit_tokens: int | None
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
    total = int(tokens.sum())
    if validation_tokens is None:
        validation_tokens = min(int(total * VALIDATION_SHARE), VALIDATION_AT_MOST)
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
    return Selection(
        np.split(places, np.cumsum(sizes)[:-1]), len(keys), total, len(copies), validation_tokens, threshold
    )


@dataclass(frozen=True)
class Cut:
    """One shard to write: documents of the stream of its split, as (part, first row, last row + 1)
    stretches.
    """

    split: str
    file: str
    tokens: int
    stretches: list[tuple[int, int, int]]


def plan_cuts(rows: list[np.ndarray], selection: Selection, tokens_per_shard: int) -> list[Cut]:
    """Where each split's stream of documents is cut: after the last document that still fits the shard."""
    cuts = []
    for split, place in SPLITS.items():
        shards: list[list[tuple[int, int, int]]] = []
        sizes: list[int] = []
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
                    sizes.append(0)
                    filled = 0
                    fits = max(at + 1, int(np.searchsorted(ends, before + tokens_per_shard, side="right")))
                shards[-1].append((part, int(chosen[at]), int(chosen[fits - 1]) + 1))
                filled += int(ends[fits - 1]) - before
                sizes[-1] = filled
                at = fits
        cuts += [
            Cut(split, f"{split}-{n:05d}.arrow", tokens, stretches)
            for n, (tokens, stretches) in enumerate(zip(sizes, shards, strict=True))
        ]
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


def assemble(
    output: Path,
    receipts: Path,
    parts: list[Path],
    dtype: np.dtype,
    *,
    deduplicate: bool,
    validation_tokens: int | None,
    limit_tokens: int | None,
    tokens_per_shard: int,
    progress: bool,
) -> tuple[list[ShardEntry], dict[str, int]]:
    """Write every shard that has no receipt yet; returns their entries and the counts for the manifest.

    Raises:
        ValueError: if there are no documents, or validation takes all of them.
    """
    rows = [np.load(part / "rows.npy") for part in parts]
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(read_statistics(part)["counts"])
    if not any(map(len, rows)):
        raise ValueError(
            "The source is empty: it has no document with text in it "
            f"({counts['blank']:,} blank or null ones were left out)."
        )
    selection = select_documents(
        rows, deduplicate=deduplicate, validation_tokens=validation_tokens, limit_tokens=limit_tokens
    )
    counts["documents"], counts["duplicates"] = selection.documents, selection.duplicates
    cuts = plan_cuts(rows, selection, tokens_per_shard)
    if not any(cut.split == "train" for cut in cuts):
        raise ValueError(
            f"validation_tokens={selection.validation_tokens:,} leaves nothing to train on: the source has "
            f"{selection.tokens:,} tokens in {selection.documents - selection.duplicates:,} different "
            "documents, and each goes whole to one side. Give more or smaller documents (a text file longer "
            f"than {PIECE_OF_TEXT_CHARACTERS:,} characters is cut into several), or ask for fewer validation "
            "tokens."
        )
    receipts.mkdir(exist_ok=True)
    missing = [cut for cut in cuts if not (receipts / f"{cut.file}.json").exists()]
    needed = sum(cut.tokens for cut in missing) * dtype.itemsize
    free = shutil.disk_usage(output).free
    if needed > free:
        raise DiskFullError(
            f"The disk is too full for the shards: {needed / 1e6:,.1f} MB are still to be written to "
            f"{output}, "
            f"{free / 1e6:,.1f} MB are free. Make room for {(needed - free) / 1e6:,.1f} MB and run the same "
            "command again: nothing is lost."
        )
    entries = []
    for cut in tqdm(cuts, desc="writing shards", unit="shard", disable=not progress):
        receipt = receipts / f"{cut.file}.json"
        if not receipt.exists():
            entry = write_cut(cut, rows, selection, parts, dtype, output)
            write_atomically(receipt, json.dumps(asdict(entry)).encode())
        entries.append(ShardEntry(**json.loads(receipt.read_text())))
    return entries, {name: counts[name] for name in ("documents", "duplicates", "blank", "repaired")}
