"""Documents → token shards: `python -m data.prepare --source … --output … --tokenizer …`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PrepareSettings:
    source: str
    output: str
    tokenizer: str = "gpt2"
    train_tokenizer: int | None = None
    text_column: str = "text"
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    validation_tokens: int | None = None
    tokens_per_shard: int = 100_000_000
    limit_tokens: int | None = None


def prepare(settings: PrepareSettings, *, progress: bool = True) -> Path:
    """Shards, tokenizer and manifest in `settings.output`; returns that folder."""
    raise NotImplementedError
