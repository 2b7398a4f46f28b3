"""What a training run needs for looking at its model in between."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from data.hellaswag import HUB_ID, Question, load_questions
from data.tokenizer import token_byte_lengths
from evaluation.isolation import NotFiniteError


def token_bytes_or_none(tokenizer: PreTrainedTokenizerFast, warn: Callable[[str], None]) -> Tensor | None:
    """UTF-8 bytes of each token, (vocabulary,) int32; None, and a word about it, where they are not fixed."""
    try:
        return torch.from_numpy(token_byte_lengths(tokenizer))
    except ValueError as error:
        warn(f"Validation leaves out bits per byte. {error}")
        return None


def questions_to_ask(source: str, limit: int) -> list[Question]:
    """The first `limit` questions of a local file, or of Rowan/hellaswag for "hub"; none for "".

    Raises:
        ValueError: as `load_questions`.
    """
    if not source:
        return []
    try:
        return load_questions(HUB_ID if source == "hub" else source, limit=limit)
    except ValueError as error:
        raise ValueError(f"{error}; --hellaswag_questions '' trains without them") from error


def unless_not_finite(say: Callable[[str], None], look: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `look` finds, or None, and a word about it, where the model's numbers overflow.

    Weights are looked at before; what is left are activations past the range of fp16, which the next steps
    may well mend. Every process finds the same, so all of them go on.
    """
    try:
        return look(*args, **kwargs)
    except NotFiniteError as error:
        say(f"Left out this time: {error}")
        return None
