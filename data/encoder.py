"""Text → ids, fast: `tiktoken` with the merges of a `tokenizers` file, checked against it on real text.

A worker imports this and neither torch nor transformers, which take longer to load than a part to encode.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import tiktoken
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
# How GPT-2 cuts text into words before merging bytes (Radford et al. 2019); `tokenizers` has that pattern
# built in. This one, tiktoken's own for GPT-2, makes the same cuts without ever going back over a match.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# A text longer than this is encoded in pieces, so that one enormous document neither holds one thread for
# minutes nor overflows the regular expression's stack.
PIECE_CHARACTERS = 200_000
# Between a letter and a space every byte-level pattern in use starts a new word: cutting there changes no id.
SAFE_CUT = re.compile(r"(?<=[^\W\d_])(?= )")


class FastEncoder:
    """Encodes batches of texts to ids with `tiktoken` in threads, or with `tokenizers` where that is
    impossible.

    `<|endoftext|>` and its like inside a text are encoded as the text they are, never as the special token;
    nothing is added at either end. `is_fast` says which of the two works; `why_slow` is the reason for the
    fallback, or None. `tokenizer` may also be the content of a tokenizer.json. With `checked`, the two are
    not compared again: another process has done it, and `why_slow` is what it found.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast | str,
        threads: int | None = None,
        *,
        checked: bool = False,
        why_slow: str | None = None,
    ):
        self._json = tokenizer if isinstance(tokenizer, str) else tokenizer.backend_tokenizer.to_str()
        spec = json.loads(self._json)
        vocab = spec["model"]["vocab"]  # a list of [word, score] in models that are no BPE
        words = set(vocab if isinstance(vocab, dict) else (word for word, _ in vocab))
        words.update(token["content"] for token in spec.get("added_tokens", []))
        self.dtype = np.dtype(np.uint16 if len(words) <= 2**16 else np.uint32)
        self._threads = threads or os.cpu_count() or 1
        self._pool: ThreadPoolExecutor | None = None
        self.why_slow = why_slow
        if self.is_fast:
            try:
                self._fast = tiktoken_encoding(spec)
                if not checked:
                    self._check_agreement(PROBE_TEXTS)
            except ValueError as error:
                self.why_slow = str(error)

    @cached_property
    def _plain(self) -> Tokenizer:
        plain = Tokenizer.from_str(self._json)
        plain.encode_special_tokens = True
        plain.no_truncation()
        plain.no_padding()
        return plain

    @property
    def is_fast(self) -> bool:
        return self.why_slow is None

    def verify(self, texts: Sequence[str]) -> None:
        """Compare both encoders on these texts; on any difference, go on with the slow one and say why."""
        if self.is_fast:
            try:
                self._check_agreement(texts)
            except ValueError as error:
                self.why_slow = str(error)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One array of ids (self.dtype) per text, in order."""
        if not self.is_fast:
            return [self._slow_ids(text) for text in texts]
        runs, order = [], []
        for index, text in enumerate(texts):
            for piece in split_long(text):
                runs.append(piece)
                order.append(index)
        ids = self._map(runs)
        if len(ids) == len(texts):
            return ids
        grouped: list[list[np.ndarray]] = [[] for _ in texts]
        for index, piece_ids in zip(order, ids, strict=True):
            grouped[index].append(piece_ids)
        return [group[0] if len(group) == 1 else np.concatenate(group) for group in grouped]

    def _map(self, texts: list[str]) -> list[np.ndarray]:
        if self._threads == 1 or len(texts) < 2:
            return [self._fast_ids(text) for text in texts]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads)
        # Threads are fed runs of documents: one call a document would spend its time in hand-overs.
        size = max(1, len(texts) // (self._threads * 4))
        chunks = [texts[start : start + size] for start in range(0, len(texts), size)]
        return [
            ids
            for run in self._pool.map(lambda chunk: [self._fast_ids(t) for t in chunk], chunks)
            for ids in run
        ]

    def _fast_ids(self, text: str) -> np.ndarray:
        if not text:
            return np.empty(0, dtype=self.dtype)
        try:
            return self._fast.encode_to_numpy(text, disallowed_special=()).astype(self.dtype)
        except ValueError:
            # The pattern's stack overflows on some inputs (a million blanks in a row); the other engine's
            # does not.
            return self._slow_ids(text)

    def _slow_ids(self, text: str) -> np.ndarray:
        return np.array(self._plain.encode(text, add_special_tokens=False).ids, dtype=self.dtype)

    def _check_agreement(self, texts: Sequence[str]) -> None:
        for text in texts:
            expected = self._slow_ids(text)
            seen = np.concatenate([self._fast_ids(piece) for piece in split_long(text)])
            if not np.array_equal(expected, seen):
                at = int(np.argmin(expected[: len(seen)] == seen[: len(expected)])) if len(seen) else 0
                raise ValueError(f"tiktoken and tokenizers disagree at token {at} of {text[:60]!r}…")


# Every class of character that GPT-2's pattern tells apart, and what is easily got wrong.
PROBE_TEXTS = (
    "The dungeon's door wasn't locked; we'll go in.  Two  spaces,\ttabs\t\tand\r\nends\n\n\n  indented\n",
    f"a literal {END_OF_TEXT} is text{END_OF_TEXT}\n",
    "naïve café — “quoted” … 12345 3.14 ½ ² ٣ 日本語テキスト 한국어 русский Ελληνικά עברית العربية",
    "emoji 👩‍👩‍👧‍👦🏽 combining e\u0301 a\u0308 zero\u200bwidth",
    "non\u00a0breaking \ufeffbom \u2028 line \x00\x1f\x7f",
    "def f(x):\n    return x ** 2  # comment\n\n\n\nclass A: pass\n"
    + "=" * 70
    + "\n"
    + " " * 300
    + "x" * 300,
    "   leading and trailing   ",
)


def split_long(text: str, limit: int = PIECE_CHARACTERS) -> list[str]:
    """Pieces of at most about `limit` characters, cut where a new word starts anyway: ids are those of the
    whole.
    """
    if len(text) <= limit:
        return [text]
    pieces, start = [], 0
    while len(text) - start > limit:
        cut = SAFE_CUT.search(text, start + limit // 2)
        if cut is None:
            break
        pieces.append(text[start : cut.start()])
        start = cut.start()
    pieces.append(text[start:])
    return pieces


def tiktoken_encoding(spec: dict) -> tiktoken.Encoding:
    """`tiktoken` with the same merges as `spec`, the content of a tokenizer.json.

    Raises:
        ValueError: if the tokenizer holds anything that tiktoken cannot express; the message says what.
    """
    model = spec["model"]
    if model["type"] != "BPE":
        raise ValueError(f"its model is {model['type']}, not byte-level BPE")
    if spec.get("normalizer"):
        raise ValueError(f"it normalises text ({spec['normalizer']['type']})")
    unlike = [
        name
        for name in ("dropout", "byte_fallback", "ignore_merges", "continuing_subword_prefix")
        if model.get(name)
    ]
    unlike += [name for name in ("end_of_word_suffix",) if model.get(name)]
    if unlike:
        raise ValueError(f"its BPE uses {', '.join(unlike)}")
    plain_added = [t["content"] for t in spec.get("added_tokens", []) if not t["special"]]
    if plain_added:
        raise ValueError(f"it has added words that are not special, such as {plain_added[0]!r}")
    pattern = _word_pattern(spec.get("pre_tokenizer"))

    symbols = _Symbols()
    special = {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
    ranks: dict[bytes, int] = {}
    for token, index in model["vocab"].items():
        if token in special:
            continue
        try:
            ranks[token.translate(symbols).encode("latin-1")] = index
        except UnicodeEncodeError:
            raise ValueError(f"its word {token!r} is not made of byte symbols") from None
    if any(bytes([value]) not in ranks for value in range(256)):
        raise ValueError("its vocabulary lacks some of the 256 bytes")
    # tiktoken merges the pair with the smallest id first: ids must grow in the order of the merges.
    merged = ["".join(m.split(" ")) if isinstance(m, str) else "".join(m) for m in model["merges"]]
    order = [model["vocab"][token] for token in dict.fromkeys(merged)]
    if any(later <= earlier for earlier, later in itertools.pairwise(order)):
        raise ValueError("its ids do not follow the order of its merges")
    if len(order) + 256 != len(ranks):
        raise ValueError("some of its words come from no merge")
    return tiktoken.Encoding("corpus", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def _word_pattern(pre_tokenizer: dict | None) -> str:
    steps = [pre_tokenizer] if pre_tokenizer else []
    if pre_tokenizer and pre_tokenizer["type"] == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return GPT2_PATTERN
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return pattern
    raise ValueError(f"it cuts words in another way ({', '.join(s['type'] for s in steps) or 'not at all'})")


class _Symbols(dict):
    """For str.translate: GPT-2's symbols → the Latin-1 characters of their bytes, others → no such
    character.
    """

    def __init__(self) -> None:
        super().__init__({ord(symbol): chr(byte) for symbol, byte in byte_of_character().items()})

    def __missing__(self, key: int) -> str:
        return "\uffff"


def byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: a printable character stands for each byte (Radford et al. 2019,
    `bytes_to_unicode`).
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {
        chr(256 + n): value for n, value in enumerate(others)
    }
