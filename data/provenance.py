"""From rows of a training run back to the documents that they were cut from."""

from __future__ import annotations

from typing import Any

import numpy as np

from data.loader import permuted
from data.shards import TokenBlocks, open_shard


def describe_rows(dataset: Any, seed: int, first_row: int, rows: int) -> str:
    """Where rows [first_row, first_row + rows) of the shuffled stream come from, in words for a person.

    For `TokenBlocks`: files and documents, counted from 0 within each file. For other datasets: their
    indices.
    """
    indices = sorted(set(permuted(np.arange(first_row, first_row + rows), len(dataset), seed).tolist()))
    if not isinstance(dataset, TokenBlocks):
        return f"rows {', '.join(map(str, indices))} of the training set"
    return "; ".join(documents_of_block(dataset, index) for index in indices)


def documents_of_block(blocks: TokenBlocks, index: int) -> str:
    """The documents that block `index` has tokens of, as "train-00000.arrow, documents 3 to 7"."""
    start = index * blocks.block_size
    end = start + blocks.block_size
    parts = []
    shard_start = 0
    for shard in blocks.manifest.of_split(blocks.split):
        first, last = (
            max(start, shard_start) - shard_start,
            min(end, shard_start + shard.tokens) - shard_start,
        )
        if first < last:
            offsets = open_shard(blocks.shard_dir / shard.file).offsets.to_numpy()
            begins, ends = np.searchsorted(offsets, [first, last - 1], side="right") - 1
            parts.append(f"{shard.file}, documents {begins} to {ends}")
        shard_start += shard.tokens
    return " and ".join(parts)
