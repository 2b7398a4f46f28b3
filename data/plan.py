"""What a preparation would read, write and take, from a look at the source's first documents."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from pathlib import Path

from data.encoder import FastEncoder
from data.readers import SourceError
from data.settings import PrepareSettings
from data.sources import PYTHON_DOCS, list_parts, read_part
from data.tokenizer import load_tokenizer

SAMPLE_CHARACTERS = 8_000_000  # encoded to measure the rate; a second or two


def plan(settings: PrepareSettings) -> str:
    """The plan as text. Reads the beginning of the source, and writes nothing anywhere.

    Raises:
        ValueError: for bad settings, or a source that cannot be read.
    """
    settings.validate()
    if settings.source == PYTHON_DOCS:
        return (
            f"{PYTHON_DOCS}: documentation in this environment, gathered on the spot; tens of MB, a minute."
        )
    spec = settings.spec()
    parts = list_parts(spec)
    # A tokenizer that is yet to be trained encodes at about the same rate, into more tokens.
    tokenizer = load_tokenizer("gpt2" if settings.train_tokenizer else settings.tokenizer)
    encoder = FastEncoder(tokenizer)
    counts: Counter[str] = Counter()
    texts: list[str] = []
    characters = 0
    whole = True
    started = time.monotonic()
    for document in read_part(spec, parts[0], counts):
        texts.append(document.text)
        characters += len(document.text)
        if characters >= SAMPLE_CHARACTERS:
            whole = False
            break
    if not texts:
        raise SourceError(f"The first part of {settings.source!r} holds no document with text.")
    ids = encoder.encode_batch(texts)
    seconds = time.monotonic() - started
    tokens = sum(map(len, ids)) + len(ids)

    size = sum(part.bytes for part in parts)
    files = sum(len(part.paths) for part in parts)
    lines = [
        f"Read    {files:,} files, {size / 1e9:,.2f} GB, in {len(parts):,} parts:",
        *(f"          {path}" for path in parts[0].paths[:3]),
        "          …",
        f"Encode  with {'a tokenizer to be trained' if settings.train_tokenizer else settings.tokenizer}, "
        f"{'gigatoken' if encoder.is_fast else 'tokenizers: ' + str(encoder.why_slow)}; "
        f"{tokens / seconds / 1e6:.1f} million tokens/s measured here on {os.cpu_count()} cores",
    ]
    read = parts[0].bytes if whole else counts["bytes"]
    if read:
        total = int(tokens * size / read)
        if settings.limit_tokens is not None:
            total = min(total, settings.limit_tokens)
        shard_bytes = total * encoder.dtype.itemsize
        folder = Path(settings.output).absolute()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        lines += [
            f"Write   about {total:,} tokens, {total // settings.tokens_per_shard + 1:,} shards, "
            f"{shard_bytes / 1e9:,.2f} GB in {settings.output}; twice that while it works, "
            f"{free / 1e9:,.1f} GB are free",
            f"Take    about {total / (tokens / seconds) / 60:,.1f} minutes on this machine",
        ]
    else:
        lines.append("Write   unknown: the source does not say how large it is")
    return "\n".join(lines)
