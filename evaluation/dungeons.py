"""Writers of dungeon descriptions on the same held-out rows: what they predict, what they write."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from data.dungeons import FIELDS, build_prompt
from evaluation.continuations import Continuation, score_continuations
from evaluation.diversity import CopyIndex, distinct, field_coverage, repetition, words
from evaluation.isolation import bare_model, undisturbed


@dataclass(frozen=True)
class Room:
    """A held-out row: what is asked for, how it is asked, and what a person wrote.

    `fields` holds those of FIELDS that the row has, each a text or a list of texts.
    """

    fields: dict[str, str | list[str]]
    prompt: str
    description: str


def read_rooms(path: Path, *, limit: int | None = None) -> list[Room]:
    """Rows of a JSON-lines file with `description` and any of FIELDS; `prompt`, if there, is used as it is.

    Without one, the prompt is `build_prompt`'s, which any language model can continue.

    Raises:
        ValueError: with the line's number, if a row has no description or nothing to ask for; if there are
        none.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}; give a .jsonl with description and any of {', '.join(FIELDS)}")
    rooms: list[Room] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or (limit is not None and len(rooms) >= limit):
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}, line {number}: not JSON ({error})") from error
        fields = {name: row[name] for name in FIELDS if row.get(name)} if isinstance(row, dict) else {}
        if not fields and not (isinstance(row, dict) and row.get("prompt")):
            raise ValueError(
                f"{path.name}, line {number}: none of {', '.join(FIELDS)} and no prompt: nothing to ask"
            )
        if not isinstance(row.get("description"), str) or not row["description"].strip():
            raise ValueError(f"{path.name}, line {number}: description is {row.get('description')!r}")
        rooms.append(Room(fields, row.get("prompt") or build_prompt(**fields), row["description"]))
    if not rooms:
        raise ValueError(f"{path} holds no rows to evaluate on")
    return rooms


def bits_per_byte(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rooms: Sequence[Room],
    accelerator: Accelerator,
    *,
    batch_size: int = 8,
) -> float:
    """Bits per UTF-8 byte of the descriptions, each given its prompt; comparable across tokenizers.

    A prompt that would not fit the context with its description loses its beginning.
    """
    pieces = []
    for room in rooms:
        blank = "" if room.prompt[-1:].isspace() else " "
        prompt = tokenizer(room.prompt)["input_ids"]
        target = tokenizer(blank + room.description, add_special_tokens=False)["input_ids"]
        pieces.append(Continuation(prompt + target, len(target)))
    pieces.sort(key=lambda piece: -len(piece.tokens))
    context = getattr(bare_model(model).config, "max_position_embeddings", None)
    too_long = sum(piece.scored > context for piece in pieces) if context is not None else 0
    if too_long:
        raise ValueError(
            f"{too_long} descriptions alone are longer than the model's context of {context} tokens"
        )
    nats = 0.0
    with undisturbed(model):
        for first in range(0, len(pieces), batch_size):
            nats -= sum(
                score_continuations(
                    model, pieces[first : first + batch_size], accelerator, context=context, packed=False
                )
            )
    return nats / math.log(2) / sum(len(room.description.encode()) for room in rooms)


def describe_texts(texts: Sequence[str], rooms: Sequence[Room], training: CopyIndex | None) -> dict[str, Any]:
    """Means over a writer's texts, one for each room; coverage is over the rooms that ask for that field."""
    coverage: dict[str, list[float]] = {}
    for text, room in zip(texts, rooms, strict=True):
        for name, share in field_coverage(text, room.fields).items():
            coverage.setdefault(name, []).append(share)
    numbers: dict[str, Any] = {
        "words": fmean(len(words(text)) for text in texts),
        "empty": sum(not words(text) for text in texts),
        **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)},
        "repetition": fmean(repetition(text) for text in texts),
        "coverage": {name: fmean(shares) for name, shares in coverage.items()},
    }
    asked = [share for shares in coverage.values() for share in shares]
    numbers["coverage_all"] = fmean(asked) if asked else None
    if training is not None:
        numbers["longest_copied_words"] = max(training.longest_span(text) for text in texts)
        numbers["copied_13_grams"] = fmean(training.overlap(text) for text in texts)
    return numbers
