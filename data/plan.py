"""What a preparation would read, write and take, from a look at the source's first documents."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.contamination import ngrams_of
from data.encoder import FastEncoder
from data.near_duplicates import signing
from data.remote import SourceError
from data.settings import PrepareSettings
from data.shards import read_manifest
from data.share import find_set
from data.sources import PYTHON_DOCS, Part, list_parts, read_part
from data.tokenizer import load_tokenizer

SAMPLE_CHARACTERS = 8_000_000  # encoded to measure the rate; a second or two
SIGNED_CHARACTERS = 200_000  # signed to measure what near duplicates cost


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
    if found := find_set(settings.spec()):
        manifest = read_manifest(found.parent)
        size = sum(shard.bytes for shard in manifest.shards)
        return (
            f"{settings.source} is a set of token shards, taken as it is: {len(manifest.shards):,} shards, "
            f"{manifest.tokens():,} tokens of {manifest.documents():,} documents, {size / 1e9:,.2f} GB into "
            f"{settings.output}, where {_free(settings) / 1e9:,.1f} GB are free."
        )
    parts = list_parts(settings.spec())
    # A tokenizer that is yet to be trained encodes at about the same rate, into more tokens.
    tokenizer = load_tokenizer("gpt2" if settings.train_tokenizer else settings.tokenizer)
    encoder = FastEncoder(tokenizer)
    started = time.monotonic()
    texts, read, is_all = _beginning(settings, parts)
    ids = encoder.encode_batch(texts)
    seconds = time.monotonic() - started
    steps = ["read and encoded"]
    if settings.looks_for_questions():
        # Whatever the questions are: nearly all n-grams of a corpus are passed over by one look at a table.
        seconds += _seconds(lambda: ngrams_of([])[0].found_in(texts))
        steps.append("searched for evaluation questions")
    characters = sum(map(len, texts))
    if settings.near_deduplicate:
        step, few = signing(Path()), "".join(texts)[:SIGNED_CHARACTERS]
        # What has fewer words than one n-gram is not signed.
        signed = _seconds(lambda: step.get_signature(s) if len(s := step.get_shingles(few)) else None)
        seconds += signed * characters / len(few)
        steps.append("signed for near duplicates")
    tokens = sum(map(len, ids)) + len(ids)

    size = sum(part.bytes for part in parts)
    files = sum(len(part.paths) for part in parts)
    cores = min(settings.workers or os.cpu_count() or 1, os.cpu_count() or 1, len(parts))
    where = f"on {cores:,} core{'s' * (cores > 1)} of this machine"
    if settings.executor != "local":
        cores, where = 1, f"of one core, to be shared by at most {len(parts):,} tasks"
    lines = [
        f"Read    {files:,} files, {size / 1e9:,.2f} GB, in {len(parts):,} parts:",
        *(f"          {path}" for path in parts[0].paths[:3]),
        "          …",
        f"Encode  with {'a tokenizer to be trained' if settings.train_tokenizer else settings.tokenizer}, "
        f"{'gigatoken' if encoder.is_fast else 'tokenizers: ' + str(encoder.why_slow)}; "
        f"{tokens / seconds / 1e6:.1f} million tokens/s on one core ({', '.join(steps)}), measured here on "
        f"the first {characters / 1e6:,.1f} million characters",
    ]
    if not (read or is_all):
        return "\n".join([*lines, "Write   unknown: the source does not say how large it is"])
    total = tokens if is_all else int(tokens * size / read)
    if settings.limit_tokens is not None:
        total = min(total, settings.limit_tokens)
    shard_bytes = total * encoder.dtype.itemsize
    hashing = _seconds(lambda: hashlib.sha256(np.concatenate(ids).data)) / max(1, tokens)
    return "\n".join(
        [
            *lines,
            f"Write   about {total:,} tokens, {total // settings.tokens_per_shard + 1:,} shards, "
            f"{shard_bytes / 1e9:,.2f} GB in {settings.output}; twice that while it works, "
            f"{_free(settings) / 1e9:,.1f} GB are free",
            f"Take    about {_in_words(total * seconds / tokens / cores)} {where}, then "
            f"{_in_words(total * hashing)} to copy and hash the shards; more where the network or the disk "
            "is slower than that",
        ]
    )


def _beginning(settings: PrepareSettings, parts: list[Part]) -> tuple[list[str], int, bool]:
    """The first documents, how many bytes of the source they took, and whether they are all."""
    counts: Counter[str] = Counter()
    texts: list[str] = []
    characters = 0
    for part in parts:
        for document in read_part(settings.spec(), part, counts):
            texts.append(document.text)
            characters += len(document.text)
            if characters >= SAMPLE_CHARACTERS:
                return texts, counts["bytes"], False
    if not texts:
        raise SourceError(f"{settings.source!r} holds no document with text.")
    return texts, counts["bytes"], True


def _free(settings: PrepareSettings) -> int:
    """Bytes that are free where the output would be."""
    folder = Path(settings.output).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _in_words(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} seconds"
    return f"{seconds / 60:,.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"


def _seconds(action: Callable[[], object]) -> float:
    started = time.monotonic()
    action()
    return time.monotonic() - started
