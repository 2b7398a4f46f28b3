"""How many evaluation questions have a passage in the corpus: any 13 words in a row in common.

Words are compared without case and punctuation, as in the GPT-3 paper (Brown et al. 2020, appendix C). Each
part notes which of the questions' 13-grams it saw; the receipt counts the questions that have one of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.files import write_atomically

WORDS_IN_A_ROW = 13
# Texts are gone through as bytes, so many at once; what overlaps is longer than WORDS_IN_A_ROW words.
PIECE_BYTES, OVERLAP_BYTES = 2**17, 2**11
BETWEEN_TEXTS = b"\n\x01\n"  # a word that no question has
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no information is shifted out
with np.errstate(over="ignore"):
    POWERS = np.cumprod(np.full(PIECE_BYTES, MULTIPLIER))
    INVERSE_POWERS = np.cumprod(np.full(PIECE_BYTES, np.uint64(pow(int(MULTIPLIER), -1, 2**64))))
# Letters, digits, every byte of other scripts, and the one between texts.
IN_A_WORD = np.array([chr(byte).isalnum() or byte >= 128 or byte == 1 for byte in range(128)] + [True] * 128)
# Most of a corpus's n-grams are told from the questions' by their leading bits, without a search.
SIEVE_BITS = 24
SIEVE_SHIFT = np.uint64(64 - SIEVE_BITS)


@dataclass(frozen=True)
class Ngrams:
    """The questions' n-grams: `keys` (n,) uint64, sorted and different; `sieve` is true where a key's leading
    bits are those of one of them.
    """

    keys: np.ndarray
    sieve: np.ndarray

    def found_in(self, texts: Sequence[str]) -> np.ndarray:
        """The keys (sorted, different) that occur in any of the texts."""
        found = [np.empty(0, np.uint64)]
        for piece in _pieces(texts):
            keys = _keys(piece)
            found.append(keys[self.sieve[keys >> SIEVE_SHIFT]])
        likely = np.unique(np.concatenate(found))
        places = np.searchsorted(self.keys, likely, side="right")  # after a key that is there
        return likely[(places > 0) & (self.keys[places - 1] == likely)]


def _pieces(texts: Sequence[str]) -> Iterator[bytes]:
    content = BETWEEN_TEXTS.join(text.lower().encode("utf-8") for text in texts)
    for start in range(0, len(content), PIECE_BYTES - OVERLAP_BYTES):
        yield content[start : start + PIECE_BYTES]


def _keys(content: bytes) -> np.ndarray:
    """One key for each window of WORDS_IN_A_ROW words of some UTF-8 text in lower case."""
    values = np.frombuffer(content, dtype=np.uint8)
    inside = IN_A_WORD[values]
    if not content.isascii():  # quotes, dashes and blanks of typographers: U+00A0 …, U+2000 …, U+3000 …
        first, second = values[:-1], values[1:]
        for length, these in (
            (2, (first == 0xC2)),
            (3, (first == 0xE2) & ((second == 0x80) | (second == 0x81))),
            (3, (first == 0xE3) & (second == 0x80)),
        ):
            at = np.flatnonzero(these)
            for place in range(length):
                inside[np.minimum(at + place, len(inside) - 1)] = False
    edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    windows = len(starts) - WORDS_IN_A_ROW + 1
    if windows < 1:
        return np.empty(0, dtype=np.uint64)
    # A word's hash is a polynomial of its bytes: the difference of two prefix sums, moved to the origin.
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * POWERS[: len(values)])])
    words = (sums[ends] - sums[starts]) * INVERSE_POWERS[starts]
    words ^= words >> np.uint64(31)
    keys = np.zeros(windows, dtype=np.uint64)
    for place in range(WORDS_IN_A_ROW):
        keys ^= words[place : place + windows]
        keys *= MULTIPLIER
        keys ^= keys >> np.uint64(29)
    return keys


def ngrams_of(texts: Sequence[str]) -> tuple[Ngrams, list[np.ndarray]]:
    """The n-grams of all texts, and those of each alone (sorted, different)."""
    per_text = [np.unique(np.concatenate(list(map(_keys, _pieces([text]))))) for text in texts]
    keys = np.unique(np.concatenate([np.empty(0, np.uint64), *per_text]))
    sieve = np.zeros(2**SIEVE_BITS, dtype=bool)
    sieve[keys >> SIEVE_SHIFT] = True
    return Ngrams(keys, sieve), per_text


def save_questions(path: Path, name: str, texts: Sequence[str]) -> None:
    """For the tasks, on whatever machine: they need neither the questions' source nor what reads it."""
    content = {"name": name, "texts": list(texts)}
    write_atomically(path, json.dumps(content, ensure_ascii=False).encode())


def load_question_ngrams(path: Path) -> tuple[Ngrams, list[np.ndarray]]:
    """`ngrams_of` the saved questions."""
    return ngrams_of(json.loads(path.read_bytes())["texts"])


def contamination(questions: Path, part_folders: list[Path]) -> dict:
    """The receipt's entry: how many of the saved questions have an n-gram in the corpus."""
    _, per_question = load_question_ngrams(questions)
    seen = np.unique(np.concatenate([np.load(folder / "ngrams.npy") for folder in part_folders]))
    # Questions of fewer than WORDS_IN_A_ROW words have no n-gram, and none of them can be found.
    return {
        "evaluation": "HellaSwag",
        "questions_from": json.loads(questions.read_bytes())["name"],
        "words_in_a_row": WORDS_IN_A_ROW,
        "questions": len(per_question),
        "questions_in_corpus": sum(bool(np.isin(keys, seen).any()) for keys in per_question),
    }


def contamination_in_words(found: dict | None) -> str:
    """The receipt's entry as a sentence."""
    if found is None:
        return "Evaluation questions were not looked for in the corpus."
    return (
        f"{found['questions_in_corpus']:,} of {found['questions']:,} {found['evaluation']} questions have "
        f"{found['words_in_a_row']} words in a row in the corpus."
    )
