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

# A chat model answers instead of going on with a text: it must be told what the prompt wants.
CHAT_REQUEST = """Write the description of a room for a tabletop role-playing game, for the game master to
read to the players: one paragraph that mentions all that is asked for below. Answer with the description
alone, without a title or a word about it.

{prompt}"""


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
        ValueError: with the line's number, if a row has no description, nothing to ask for or what is no
            text; if there are none, or the limit is not positive.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} rows leaves none; give at least 1")
    if not path.is_file():
        raise ValueError(f"no file {path}; give a .jsonl with description and any of {', '.join(FIELDS)}")
    rooms: list[Room] = []
    # Not splitlines, which also breaks at characters that stand within JSON's texts, such as U+2028.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip() or (limit is not None and len(rooms) >= limit):
            continue
        try:
            rooms.append(_room(json.loads(line)))
        except ValueError as error:  # JSON's errors are of this kind
            raise ValueError(f"{path.name}, line {number}: {error}") from error
    if not rooms:
        raise ValueError(f"{path} holds no rows to evaluate on")
    return rooms


def _room(row: Any) -> Room:
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, not an object")
    fields = {name: row[name] for name in FIELDS if row.get(name)}
    for name, value in fields.items():
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{name} is {value!r}; a text or a list of texts is needed")
    prompt, description = row.get("prompt") or "", row.get("description")
    if not isinstance(prompt, str):
        raise ValueError(f"prompt is {prompt!r}; a text is needed")
    if not fields and not prompt:
        raise ValueError(f"none of {', '.join(FIELDS)} and no prompt: nothing to ask")
    if not isinstance(description, str) or not description.strip():
        raise ValueError(f"description is {description!r}; a text is needed")
    return Room(fields, prompt or build_prompt(**fields), description)


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

    Raises:
        ValueError: if a description alone is longer than the context, or the model returns NaN or infinity.
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
    logs: list[float] = []
    with undisturbed(model):
        for first in range(0, len(pieces), batch_size):
            batch = pieces[first : first + batch_size]
            logs += score_continuations(model, batch, accelerator, context=context, packed=False)
    if broken := sum(not math.isfinite(log) for log in logs):
        raise ValueError(
            f"the model returned NaN or infinity on {broken:,} of {len(rooms):,} descriptions: its weights "
            "are broken or overflow in this dtype"
        )
    return -math.fsum(logs) / math.log(2) / sum(len(room.description.encode()) for room in rooms)


def describe_texts(
    texts_or_none: Sequence[str | None], rooms: Sequence[Room], training: CopyIndex | None
) -> dict[str, Any]:
    """Means over a writer's texts, one for each room; coverage is over the rooms that ask for that field.

    Where the text is None, for its writer could not be reached, the room is left out and counted as failed.
    """
    coverage: dict[str, list[float]] = {}
    written = [(t, room) for t, room in zip(texts_or_none, rooms, strict=True) if t is not None]
    texts = [text for text, _ in written]
    for text, room in written:
        for name, share in field_coverage(text, room.fields).items():
            coverage.setdefault(name, []).append(share)
    numbers: dict[str, Any] = {
        "words": fmean(len(words(text)) for text in texts),
        "empty": sum(not words(text) for text in texts),
        "failed": len(rooms) - len(texts),
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
