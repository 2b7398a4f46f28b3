"""What fine-tuning brought and what it cost: bits per byte on rooms and on other text, before and after."""

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from data.dungeons import Dungeon, build_prompt
from evaluation.dungeons import Room, bits_per_byte
from evaluation.texts import evaluate_texts


def measure_both(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rooms: Sequence[Dungeon],
    texts: Sequence[str],
    accelerator: Accelerator,
) -> dict[str, float]:
    """Bits per byte of the rooms' descriptions, all fields given, and of `texts` if there are any."""
    asked = []
    for room in rooms:
        fields = {name: v if isinstance(v, str) else list(v) for name, v in room.fields.items()}
        asked.append(Room(fields, build_prompt(**fields), room.description))
    numbers = {"rooms": bits_per_byte(model, tokenizer, asked, accelerator)}
    if texts:
        numbers["general"] = evaluate_texts(model, tokenizer, texts, accelerator).bits_per_byte
    return numbers


def as_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """`{"before": {"rooms": …}, "after": …}` as lines for a person, in bits per byte."""
    columns = [name for name in ("rooms", "general") if all(name in row for row in results.values())]
    lines = ["bits per byte      " + "".join(f"{name:>12}" for name in columns)]
    for name, row in results.items():
        lines.append(f"  {name:<17}" + "".join(f"{row[column]:>12.4f}" for column in columns))
    return "\n".join(lines)
