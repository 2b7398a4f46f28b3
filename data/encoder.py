"""Text → ids, fast: `gigatoken` with the merges of a `tokenizers` file, checked against it on real text.

A worker imports this and neither torch nor transformers, which take longer to load than a part to encode.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import gigatoken
import numpy as np
import psutil
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

# A text longer than this is encoded in pieces, so that one enormous document needs no memory of its size.
PIECE_CHARACTERS = 200_000
# Between a letter and a space every byte-level pattern in use starts a new word: cutting there changes no id.
SAFE_CUT = re.compile(r"(?<=[^\W\d_])(?= )")

# gigatoken remembers the ids of each word that it meets: new words never end, memory does. It starts afresh
# when the process has grown by so much.
REMEMBERED_BYTES = 256 * 2**20

# Letters and digits of Unicode 17, which gigatoken knows and tokenizers, at Unicode 16, does not: they cut
# words around them in different places. First and last of each range.
UNLIKE_RANGES = (
    (0x088F, 0x088F), (0x0C5C, 0x0C5C), (0x0CDC, 0x0CDC), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2),
    (0xA7D4, 0xA7D4), (0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7), (0x11DB0, 0x11DDB),
    (0x11DE0, 0x11DE9), (0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3), (0x16FF2, 0x16FF6), (0x187F8, 0x187FF),
    (0x18D09, 0x18D1E), (0x18D80, 0x18DF2), (0x1E6C0, 0x1E6DE), (0x1E6E0, 0x1E6E2), (0x1E6E4, 0x1E6E5),
    (0x1E6E7, 0x1E6ED), (0x1E6F0, 0x1E6F4), (0x1E6FE, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD),
    (0x323B0, 0x33479),
)  # fmt: skip
IS_UNLIKE = np.zeros(0x110000, dtype=bool)
for first, last in UNLIKE_RANGES:
    IS_UNLIKE[first : last + 1] = True


class FastEncoder:
    """Encodes batches of texts to ids with `gigatoken`, or with `tokenizers` where that is impossible.

    `<|endoftext|>` and its like inside a text are encoded as the text they are, never as the special token;
    nothing is added at either end. `is_fast` says which of the two works; `why_slow` is the reason for the
    fallback, or None. `tokenizer` may also be the content of a tokenizer.json. With `checked`, the two are
    not compared again: another process has done it, and `why_slow` is what it found.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast | str, *, checked: bool = False, why_slow: str | None = None
    ):
        self._json = tokenizer if isinstance(tokenizer, str) else tokenizer.backend_tokenizer.to_str()
        self._spec = json.loads(self._json)
        vocab = self._spec["model"]["vocab"]  # a list of [word, score] in models that are no BPE
        words = set(vocab if isinstance(vocab, dict) else (word for word, _ in vocab))
        words.update(token["content"] for token in self._spec.get("added_tokens", []))
        self.dtype = np.dtype(np.uint16 if len(words) <= 2**16 else np.uint32)
        self.why_slow = why_slow or why_unlike(self._spec)
        if self.is_fast:
            with self._or_slowly():
                self._start()
        if not checked:
            self.verify(PROBE_TEXTS)

    @contextlib.contextmanager
    def _or_slowly(self) -> Iterator[None]:
        """Whatever goes wrong within is the reason to go on with the slow encoder."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of its Rust is no Exception
            self.why_slow = str(error).partition("\n")[0]

    def _start(self) -> None:
        # It reads the JSON form; special tokens that it does not know are text.
        content = json.dumps({**self._spec, "added_tokens": []})
        self._fast = gigatoken.Tokenizer.from_json(content)
        self._memory = psutil.Process().memory_info().rss

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
            with self._or_slowly():
                self._check_agreement(texts)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One array of ids (self.dtype) per text, in order."""
        encode = self._fast_ids if self.is_fast else self._slow_ids
        ids = []
        for text in texts:
            pieces = [encode(piece) for piece in split_long(text)]
            ids.append(pieces[0] if len(pieces) == 1 else np.concatenate(pieces))
        if self.is_fast and psutil.Process().memory_info().rss > self._memory + REMEMBERED_BYTES:
            del self._fast
            self._start()
        return ids

    def _fast_ids(self, text: str) -> np.ndarray:
        if not text.isascii():
            codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
            if IS_UNLIKE[codes].any():
                return self._slow_ids(text)
        return self._fast.encode(text).astype(self.dtype)

    def _slow_ids(self, text: str) -> np.ndarray:
        return np.array(self._plain.encode(text, add_special_tokens=False).ids, dtype=self.dtype)

    def _check_agreement(self, texts: Sequence[str]) -> None:
        for text in texts:
            expected = self._slow_ids(text)
            seen = np.concatenate([self._fast_ids(piece) for piece in split_long(text)])
            if not np.array_equal(expected, seen):
                at = int(np.argmin(expected[: len(seen)] == seen[: len(expected)])) if len(seen) else 0
                raise ValueError(f"gigatoken and tokenizers disagree at token {at} of {text[:60]!r}…")


def why_unlike(spec: dict) -> str | None:
    """What in `spec`, a tokenizer.json, gigatoken would take for something else without a word, if anything.

    What it does not know at all it refuses by itself.
    """
    if spec["model"].get("dropout"):
        return "its BPE uses dropout"
    if words := [token["content"] for token in spec.get("added_tokens", []) if not token["special"]]:
        return f"it has added words that are not special, such as {words[0]!r}"
    steps = spec.get("pre_tokenizer") or {"type": "none"}
    steps = steps.get("pretokenizers", [steps])
    if steps[-1]["type"] != "ByteLevel" or any(step.get("add_prefix_space") for step in steps):
        return f"it cuts words in another way ({', '.join(step['type'] for step in steps)})"
    return None


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
