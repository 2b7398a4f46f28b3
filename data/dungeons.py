"""Fields and a description of a room → prompt → token ids. The one place that knows the prompt's form.

    Setting: sewer
    Features: pewter spoons, rusted sluice wheel
    Description: Water slides over the spoons …<|endoftext|>

Any subset of FIELDS may be asked for, in the order of FIELDS; without any the prompt is "Description:" alone.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

FIELDS = ("title", "setting", "place", "mood", "features", "exits", "inhabitants")
IGNORED_LABEL = -100
TOO_LONG_SHOWN = 5  # of the descriptions that do not fit, an error names so many


@dataclass(frozen=True)
class Dungeon:
    """One room: what may be asked for, what was written, and where that stands.

    `fields` holds those of FIELDS that the room has, each a text or a list of texts.
    """

    fields: Mapping[str, str | Sequence[str]]
    description: str
    where: str = ""


class Row(TypedDict):
    """Ids of a prompt and its description, and labels of the same length: -100 on the prompt."""

    input_ids: list[int]
    labels: list[int]


class DescriptionTooLong(ValueError):
    """A description that does not fit the context even without its fields."""


def build_prompt(**fields: str | Sequence[str] | None) -> str:
    """What to give a model for these fields: `build_prompt(setting="crypt", features=["bell", "wet rope"])`.

    Empty fields are left out. The model goes on with a blank and the description.

    Raises:
        ValueError: for a name that is none of FIELDS.
    """
    if unknown := sorted(set(fields) - set(FIELDS)):
        raise ValueError(f"{', '.join(unknown)}: no such field; there are {', '.join(FIELDS)}")
    lines = []
    for name in FIELDS:
        if value := fields.get(name):
            lines.append(f"{name.capitalize()}: {value if isinstance(value, str) else ', '.join(value)}")
    return "\n".join([*lines, "Description:"])


def encode_dungeon(
    fields: Mapping[str, str | Sequence[str]],
    description: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Row:
    """The row that teaches `description` for `fields`: all its tokens are targets, and so is the end token.

    The prompt and the rest are tokenised apart, because at inference the prompt comes alone.

    Raises:
        DescriptionTooLong: if the row would have more than `max_length` tokens.
        ValueError: if the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the base's tokenizer has no end token, so no description could end: name one of its words as "
            "`eos_token` in its tokenizer_config.json, or take another base"
        )
    prompt = tokenizer(build_prompt(**fields))["input_ids"]
    target = tokenizer(" " + description.strip(), add_special_tokens=False)["input_ids"]
    target = [*target, tokenizer.eos_token_id]
    if len(prompt) + len(target) > max_length:
        raise DescriptionTooLong(
            f"{len(prompt)} tokens of prompt and {len(target)} of description do not fit {max_length}"
        )
    return {"input_ids": [*prompt, *target], "labels": [IGNORED_LABEL] * len(prompt) + target}


def check_dungeons(
    dungeons: Sequence[Dungeon],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    *,
    drop_too_long: bool,
    split: str,
    say: Callable[[str], object] = print,
) -> list[Dungeon]:
    """Those that fit a context of so many tokens; a description that fits only without its fields stays.

    Raises:
        ValueError: if there are none, or some do not fit and are not to be dropped (some are named).
    """
    fitting, too_long = [], []
    for dungeon in dungeons:
        try:
            encode_dungeon({}, dungeon.description, tokenizer, context)
            fitting.append(dungeon)
        except DescriptionTooLong:
            too_long.append(dungeon)
    if too_long:
        named = "; ".join(
            dungeon.where or repr(dungeon.description[:40]) for dungeon in too_long[:TOO_LONG_SHOWN]
        )
        more = ", …" if len(too_long) > TOO_LONG_SHOWN else ""
        what = (
            f"{len(too_long):,} of {len(dungeons):,} {split} descriptions are longer than the context of "
            f"{context:,} tokens ({named}{more})"
        )
        if not drop_too_long:
            raise ValueError(
                f"{what}. Shorten them, leave them out with --drop_too_long, or take a base (and a teacher) "
                "with a longer context."
            )
        say(f"{what}: left out.")
    if not fitting:
        raise ValueError(f"the {split} split is empty: no description is left")
    return fitting


class DungeonBlocks(Dataset):
    """Rooms as rows of a batch: several in a block of `block_size` tokens, or one a row if not `packs`.

    In a block, `position_ids` restart with each room, by which a model that heeds them keeps rooms apart; it
    must be given no attention mask and no cache. No label crosses a boundary, for a room begins with its
    prompt. Each field is left out with the probability `field_dropout`, a pure function of (seed, epoch,
    room). Index i is block i % len in epoch i // len: so `build_loader` counts for who `varies_by_epoch`.
    """

    varies_by_epoch = True

    def __init__(
        self,
        dungeons: Sequence[Dungeon],
        tokenizer: PreTrainedTokenizerBase,
        *,
        block_size: int,
        context: int,
        field_dropout: float = 0.0,
        seed: int = 0,
        packs: bool = True,
    ):
        """`context` is the model's, and the most that a room may take; `dungeons` are those that fit it.

        Raises:
            ValueError: if a description does not fit, or there is none.
        """
        if not dungeons:
            raise ValueError("no descriptions: the split is empty")
        self.dungeons, self.tokenizer = dungeons, tokenizer
        self.longest = min(context, block_size)
        self.block_size, self.field_dropout, self.seed, self.packs = block_size, field_dropout, seed, packs
        # Each room's place is for all its fields, or for as many as the context holds: which of them are left
        # out to fit it differs between epochs.
        whole = [encode_dungeon(d.fields, d.description, tokenizer, sys.maxsize) for d in dungeons]
        self.places = [min(self.longest, len(row["input_ids"])) for row in whole]
        self.longest_place = max(self.places)
        rows = [self.encode(number, epoch=0, field_dropout=0.0) for number in range(len(dungeons))]
        self.blocks = _pack(self.places, block_size) if packs else [[number] for number in range(len(rows))]
        descriptions = [sum(label != IGNORED_LABEL for label in row["labels"]) for row in rows]
        self.targets, self.longest_target = sum(descriptions), max(descriptions)
        content = [rows, self.blocks, block_size, context, field_dropout, seed]
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def encode(self, number: int, epoch: int, field_dropout: float) -> Row:
        """Room `number` in that epoch; fields that leave no place for the description go as well."""
        dungeon = self.dungeons[number]
        randomness = random.Random(f"{self.seed} {epoch} {number}")
        fields = {name: v for name, v in dungeon.fields.items() if randomness.random() >= field_dropout}
        while True:
            try:
                return encode_dungeon(fields, dungeon.description, self.tokenizer, self.places[number])
            except DescriptionTooLong as error:
                if not fields:
                    raise ValueError(f"{dungeon.where}: {error}") from error
                del fields[randomness.choice(list(fields))]

    def fullest(self) -> dict[str, Tensor]:
        """The block that holds the most rooms."""
        return self[max(range(len(self.blocks)), key=lambda block: len(self.blocks[block]))]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids`, `labels` and, if packed, `position_ids`: int64 (block_size,) or (room's length,)."""
        epoch, block = divmod(index, len(self.blocks))
        rows = [self.encode(number, epoch, self.field_dropout) for number in self.blocks[block]]
        input_ids = [token for row in rows for token in row["input_ids"]]
        labels = [label for row in rows for label in row["labels"]]
        position_ids = [position for row in rows for position in range(len(row["input_ids"]))]
        if self.packs:  # what is left of the block is one more document, of which nothing is learnt
            free = self.block_size - len(input_ids)
            input_ids += [self.tokenizer.eos_token_id] * free
            labels += [IGNORED_LABEL] * free
            # Within any context that holds the rooms, however much is free.
            position_ids += [position % self.longest_place for position in range(free)]
        block_of = {"input_ids": input_ids, "labels": labels}
        if self.packs:
            block_of["position_ids"] = position_ids
        return {name: torch.tensor(values) for name, values in block_of.items()}


def _pack(lengths: Sequence[int], block_size: int) -> list[list[int]]:
    """Indices of `lengths` in blocks of at most `block_size`: longest first, each where it fits tightest."""
    blocks: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens, block), ascending
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        place = bisect_left(free, (lengths[number], 0))
        if place == len(free):
            blocks.append([])
            room, block = block_size, len(blocks) - 1
        else:
            room, block = free.pop(place)
        blocks[block].append(number)
        insort(free, (room - lengths[number], block))
    return blocks


def collate_dungeons(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Items of `DungeonBlocks` as (B, T): shorter ones padded on the right, where nothing sees it.

    Padding repeats a row's last id, the end token.
    """
    width = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, list[Tensor]] = {name: [] for name in rows[0]}
    for row in rows:
        for name, values in row.items():
            fill: Any = IGNORED_LABEL if name == "labels" else values[-1].item()
            batch[name].append(torch.nn.functional.pad(values, (0, width - len(values)), value=fill))
    return {name: torch.stack(tensors) for name, tensors in batch.items()}
