"""Which blocks come when: a pure function of (seed, position), so that a run can stop and go on anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.shards import BlockRows

FEISTEL_ROUNDS = (
    6  # four make a strong pseudo-random permutation (Luby & Rackoff 1988); small domains profit from more
)
POSITIONS_AT_ONCE = 8192  # permuted together: numpy's cost a call is spread over them


def permuted(position: int | np.ndarray, length: int, seed: int) -> Any:
    """The index that stands at `position` of an endless stream of shuffled epochs over range(length).

    Positions [e·length, (e+1)·length) are epoch e; each epoch is a bijection onto range(length), keyed by
    (seed, e). Takes an int or an int64 array and returns the same kind. No list of indices is held: a Feistel
    network permutes the next power of two, and what falls outside the range walks on until it falls inside.
    """
    if length < 1:
        raise ValueError(f"length={length}: there is nothing to permute.")
    positions = np.atleast_1d(np.asarray(position, dtype=np.int64))
    epoch, index = np.divmod(positions, length)
    key = _mix(np.uint64(seed % 2**64) ^ _mix(epoch.astype(np.uint64)))
    bits = (length - 1).bit_length()
    value = _feistel(index.astype(np.uint64), key, bits)
    outside = np.flatnonzero(value >= length)
    while outside.size:
        value[outside] = _feistel(value[outside], key[outside], bits)
        outside = outside[value[outside] >= length]
    result = value.astype(np.int64)
    return int(result[0]) if np.ndim(position) == 0 else result


def _feistel(value: np.ndarray, key: np.ndarray, bits: int) -> np.ndarray:
    """A bijection on [0, 2**bits): halves take turns in being changed by a hash of the other."""
    low_bits = np.uint64(bits - bits // 2)
    low_mask = np.uint64(2 ** int(low_bits) - 1)
    high_mask = np.uint64(2 ** (bits // 2) - 1)
    high, low = value >> low_bits, value & low_mask
    for round_number in range(FEISTEL_ROUNDS):
        round_key = key + np.uint64(round_number)
        if round_number % 2 == 0:
            high = high ^ (_mix(low ^ round_key) & high_mask)
        else:
            low = low ^ (_mix(high ^ round_key) & low_mask)
    return (high << low_bits) | low


def _mix(value: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea & Flood 2014): each input bit flips each output bit half the
    time.
    """
    with np.errstate(over="ignore"):
        value = (value + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def collate_blocks(
    rows: BlockRows | list[dict[str, torch.Tensor]], *, end_id: int | None = None
) -> dict[str, torch.Tensor]:
    """{"input_ids": (B, T) int64, "labels": the same tensor}. Who masks labels clones them first.

    With `end_id` the documents of a row are kept apart: `position_ids`, (B, T) int64, start again after each
    `end_id`, which our model takes as the border between documents, and the first token of a document is no
    target, for what stands before it belongs to another one.
    """
    if isinstance(rows, BlockRows):
        input_ids = rows.input_ids
    else:
        input_ids = torch.stack([row["input_ids"] for row in rows])
    if end_id is None:
        return {"input_ids": input_ids, "labels": input_ids}
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    begins = torch.zeros_like(input_ids, dtype=torch.bool)
    begins[:, 1:] = input_ids[:, :-1] == end_id
    starts = torch.where(begins, positions, 0).cummax(dim=1).values
    labels = input_ids.masked_fill(begins, -100)
    return {"input_ids": input_ids, "labels": labels, "position_ids": positions - starts}


class ShuffledBatches:
    """Endless lists of dataset indices: global micro-batches start_batch + rank, + world_size, … of the
    stream. With `counts_epochs`, epoch e adds e times the length to each.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        start_batch: int,
        rank: int,
        world_size: int,
        counts_epochs: bool = False,
    ):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.counts_epochs = counts_epochs
        self.first, self.stride = start_batch + rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        batches = max(1, POSITIONS_AT_ONCE // self.batch_size)
        within = np.arange(self.batch_size, dtype=np.int64)
        batch = self.first
        while True:
            numbers = batch + self.stride * np.arange(batches, dtype=np.int64)
            positions = numbers[:, None] * self.batch_size + within
            indices = permuted(positions.ravel(), self.length, self.seed).reshape(positions.shape)
            if self.counts_epochs:
                indices += positions // self.length * self.length
            yield from indices.tolist()
            batch += self.stride * batches


class OrderedBatches:
    """One pass in order: micro-batches rank, rank + world_size, …; the last of the pass may be short."""

    def __init__(self, length: int, batch_size: int, start_batch: int, rank: int, world_size: int):
        batches = -(-length // batch_size)
        self.numbers = range(start_batch + rank, batches, world_size)
        self.length, self.batch_size = length, batch_size

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[list[int]]:
        for number in self.numbers:
            start = number * self.batch_size
            yield list(range(start, min(start + self.batch_size, self.length)))


def build_loader(
    dataset: Dataset,
    collate: Callable[[Any], dict[str, torch.Tensor]],
    *,
    micro_batch_size: int,
    seed: int | None,
    start_batch: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Micro-batches of one process, already sliced: do not hand the loader to `accelerator.prepare`.

    With a seed: an endless stream in permuted order, a new permutation each epoch, the last batch of an epoch
    running on into the next; global micro-batch g belongs to rank g % world_size, and `start_batch` is the
    first global one, so that a resumed run sees what it would have seen, on any number of processes. With
    seed None: one pass in order, sliced by rank in the same way; ranks may differ by one batch.

    A dataset whose items change from epoch to epoch says so with an attribute `varies_by_epoch`: in epoch e
    of the stream it is asked for index + e * len(dataset).

    Raises:
        ValueError: if the dataset is empty or the numbers do not fit each other.
    """
    length = len(dataset)  # type: ignore[arg-type]
    problems = []
    if length == 0:
        problems.append("the dataset is empty")
    if micro_batch_size < 1:
        problems.append(f"micro_batch_size={micro_batch_size} is not at least 1")
    if not 0 <= rank < world_size:
        problems.append(f"rank={rank} is not in [0, world_size={world_size})")
    elif start_batch < 0 or start_batch % world_size:
        problems.append(f"start_batch={start_batch} is not a multiple of world_size={world_size}")
    if problems:
        raise ValueError("Cannot build a loader: " + "; ".join(problems) + ".")
    if seed is None:
        batches: Any = OrderedBatches(length, micro_batch_size, start_batch, rank, world_size)
    else:
        counts_epochs = getattr(dataset, "varies_by_epoch", False)
        batches = ShuffledBatches(
            length, micro_batch_size, seed, start_batch, rank, world_size, counts_epochs=counts_epochs
        )
    # In this process: cutting a batch from mapped memory takes microseconds, handing it over from a worker
    # more.
    # Its iterators draw a number that nobody uses: from a generator of their own, not from the training's.
    return DataLoader(
        dataset, batch_sampler=batches, collate_fn=collate, num_workers=0, generator=torch.Generator()
    )
