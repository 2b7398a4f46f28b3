"""From encoded parts to shards: what is kept, where the files are cut, and the manifest.

`selection.py` decides which documents are kept and on which side; the shards are cut from them here, in the
order of the source. So they are the same bytes however the encoding was shared out.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.files import write_atomically
from data.progress import read_statistics
from data.readers import PIECE_OF_TEXT_CHARACTERS
from data.selection import SPLITS, Selection, count_rows, select_documents
from data.shards import ShardEntry, write_shard

MEMORY_FOR_SHARDS = 500_000_000  # bytes of ids held while shards are written, or else one shard
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(ValueError):
    """No room to go on; the message says how much is missing. The same command continues later."""


def is_no_room(error: BaseException | None) -> bool:
    """Whether this, or what it was raised from, is the system's refusal to store more."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return True
        # tokenizers and the Hub's Xet write files in Rust, and only the text of their errors says why that
        # failed.
        is_of_rust = type(error) in (Exception, RuntimeError)
        if is_of_rust and any(f"os error {code})" in str(error) for code in NO_ROOM):
            return True
        error = error.__cause__ or error.__context__
    return False


@dataclass(frozen=True)
class Stretch:
    """Rows first … last - 1 of a part, among those that `Selection.rows(part, chunk)` gives; the ids of the
    chunk begin at `start` in the part's file.
    """

    part: int
    chunk: int
    start: int
    first: int
    last: int


@dataclass(frozen=True)
class Cut:
    """One shard to write: the documents of its split in some stretches."""

    split: str
    file: str
    tokens: int
    stretches: list[Stretch]


def plan_cuts(selection: Selection, tokens_per_shard: int) -> list[Cut]:
    """Where each split's stream of documents is cut: after the last document that still fits the shard."""
    shards: dict[str, list[list[Stretch]]] = {split: [] for split in SPLITS}
    sizes: dict[str, list[int]] = {split: [] for split in SPLITS}
    for part in range(len(selection.parts)):
        start = 0
        for chunk in selection.firsts(part):
            tokens, places = selection.rows(part, chunk)
            for split, place in SPLITS.items():
                chosen = np.flatnonzero(places == place)
                ends = np.cumsum(tokens[chosen])
                at = 0
                while at < len(chosen):
                    before = int(ends[at - 1]) if at else 0
                    room = tokens_per_shard - sizes[split][-1] if shards[split] else 0
                    fits = int(np.searchsorted(ends, before + room, side="right"))
                    if fits <= at:  # nothing fits: a new shard, which takes one document whatever its size
                        shards[split].append([])
                        sizes[split].append(0)
                        fits = int(np.searchsorted(ends, before + tokens_per_shard, side="right"))
                        fits = max(at + 1, fits)
                    stretch = Stretch(
                        part, chunk, start, chunk + int(chosen[at]), chunk + int(chosen[fits - 1]) + 1
                    )
                    shards[split][-1].append(stretch)
                    sizes[split][-1] += int(ends[fits - 1]) - before
                    at = fits
            start += int(tokens.sum())
    return [
        Cut(split, f"{split}-{n:05d}.arrow", tokens, stretches)
        for split in SPLITS
        for n, (tokens, stretches) in enumerate(zip(sizes[split], shards[split], strict=True))
    ]


def write_cut(cut: Cut, selection: Selection, dtype: np.dtype, output: Path) -> ShardEntry:
    """Copy a shard's documents out of the encoded parts."""
    ids = np.empty(cut.tokens, dtype=dtype)
    filled = 0
    lengths = []
    for stretch in cut.stretches:
        tokens, places = selection.rows(stretch.part, stretch.chunk)
        starts = stretch.start + np.concatenate([[0], np.cumsum(tokens)])
        low, high = stretch.first - stretch.chunk, stretch.last - stretch.chunk
        chosen = np.zeros(len(tokens) + 2, dtype=np.int8)  # with a false at each end
        chosen[1 + low : 1 + high] = places[low:high] == SPLITS[cut.split]
        lengths.append(tokens[chosen[1:-1] == 1])
        edges = np.flatnonzero(np.diff(chosen))
        with open(selection.parts[stretch.part] / "ids.bin", "rb") as file:
            for first, last in zip(edges[::2], edges[1::2], strict=True):
                run = ids[filled : filled + int(starts[last] - starts[first])]
                file.seek(int(starts[first]) * dtype.itemsize)
                if file.readinto(run.data) != run.nbytes:
                    folder = selection.parts[stretch.part]
                    raise ValueError(
                        f"{file.name} is shorter than its rows say. Delete {folder} and run the same command "
                        "again: that part alone is encoded anew."
                    )
                filled += len(run)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int32)
    entry: ShardEntry = write_shard(output / cut.file, cut.split, ids, offsets)
    return entry


def _in_words(validation_tokens: int | None) -> str:
    return "one document" if validation_tokens is None else f"--validation_tokens {validation_tokens}"


def assemble(
    output: Path,
    work: Path,
    parts: list[Path],
    dtype: np.dtype,
    *,
    deduplicate: bool,
    validation_tokens: int | None,
    limit_tokens: int | None,
    tokens_per_shard: int,
    progress: bool,
) -> tuple[list[ShardEntry], dict[str, int]]:
    """Write every shard that has no receipt in `work` yet; returns their entries and the counts for the
    manifest.

    Raises:
        ValueError: if there are no documents, or validation takes all of them.
    """
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(read_statistics(part)["counts"])
    if not any(map(count_rows, parts)):
        raise ValueError(
            "The source is empty: it has no document with text in it "
            f"({counts['blank']:,} blank or null ones were left out)."
        )
    selection = select_documents(
        parts,
        work / "selection",
        deduplicate=deduplicate,
        validation_tokens=validation_tokens,
        limit_tokens=limit_tokens,
    )
    # Near duplicates were read, but never encoded; a limit on tokens is not taken together with them.
    counts["near_duplicates"] = 0 if limit_tokens else counts["read"] - selection.documents
    counts["documents"] = selection.documents + counts["near_duplicates"]
    counts["duplicates"] = selection.duplicates
    cuts = plan_cuts(selection, tokens_per_shard)
    if not any(cut.split == "train" for cut in cuts):
        raise ValueError(
            f"The validation split ({_in_words(validation_tokens)}) leaves nothing to train on: the source "
            f"has {selection.tokens:,} tokens in {selection.documents - selection.duplicates:,} different "
            "documents, and each goes whole to one side. Give more or smaller documents (a text file longer "
            f"than {PIECE_OF_TEXT_CHARACTERS:,} characters is cut into several), or ask for fewer validation "
            "tokens."
        )
    receipts = work / "shards"
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

    def entry_of(cut: Cut) -> ShardEntry:
        receipt = receipts / f"{cut.file}.json"
        if not receipt.exists():
            entry = write_cut(cut, selection, dtype, output)
            write_atomically(receipt, json.dumps(asdict(entry)).encode())
        return ShardEntry(**json.loads(receipt.read_text()))

    # While one shard waits for the disk, another is copied and hashed.
    largest = max(cut.tokens for cut in cuts) * dtype.itemsize
    with ThreadPoolExecutor(max(1, min(os.cpu_count() or 1, MEMORY_FOR_SHARDS // largest))) as pool:
        writing = [pool.submit(entry_of, cut) for cut in cuts]
        try:
            shown = tqdm(writing, desc="writing shards", unit="shard", disable=not progress)
            entries = [entry.result() for entry in shown]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    names = ("documents", "duplicates", "near_duplicates", "blank", "repaired")
    return entries, {name: counts[name] for name in names}
