"""How many evaluation questions have a passage in the corpus: any 13 words in a row in common.

Words are compared without case and punctuation, as in the GPT-3 paper (Brown et al. 2020, appendix C). Each
part notes which of the questions' 13-grams it saw; the receipt counts the questions that have one of them.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.files import write_atomically

WORDS_IN_A_ROW = 13
WORD = re.compile(r"[^\W_]+")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # of the rolling hash; odd, so that no information is shifted out
UNKNOWN = 0
# Most of a corpus's n-grams are told from the questions' by their leading bits, without a search.
SIEVE_BITS = 24
SIEVE_SHIFT = np.uint64(64 - SIEVE_BITS)


@dataclass(frozen=True)
class Ngrams:
    """The questions' n-grams: `words` numbers their vocabulary from 1; `keys` (n,) uint64, sorted and
    different; `sieve` is true where a key's leading bits are those of one of them.
    """

    words: dict[str, int]
    keys: np.ndarray
    sieve: np.ndarray

    def found_in(self, texts: Iterable[str]) -> np.ndarray:
        """The keys (sorted, different) that occur in any of the texts."""
        found = [np.empty(0, np.uint64)]
        for text in texts:
            words = WORD.findall(text.lower())
            ids = np.fromiter(map(self.words.get, words, itertools.repeat(UNKNOWN)), np.uint64, len(words))
            keys = _keys(ids)
            found.append(keys[self.sieve[keys >> SIEVE_SHIFT]])
        return np.intersect1d(np.concatenate(found), self.keys)


def _keys(ids: np.ndarray) -> np.ndarray:
    """One key for each window of WORDS_IN_A_ROW known words."""
    windows = len(ids) - WORDS_IN_A_ROW + 1
    if windows < 1:
        return np.empty(0, dtype=np.uint64)
    unknown_before = np.concatenate([[0], np.cumsum(ids == UNKNOWN)])
    keys = np.zeros(windows, dtype=np.uint64)
    for place in range(WORDS_IN_A_ROW):
        keys = (keys ^ ids[place : place + windows]) * MULTIPLIER
        keys ^= keys >> np.uint64(29)
    return keys[unknown_before[WORDS_IN_A_ROW:] == unknown_before[:-WORDS_IN_A_ROW]]


def ngrams_of(texts: Sequence[str]) -> tuple[Ngrams, list[np.ndarray]]:
    """The n-grams of all texts, and those of each alone (sorted, different)."""
    words: dict[str, int] = {}
    ids = []
    for text in texts:
        found = WORD.findall(text.lower())
        ids.append(np.array([words.setdefault(word, len(words) + 1) for word in found], dtype=np.uint64))
    per_text = [np.unique(_keys(sequence)) for sequence in ids]
    keys = np.unique(np.concatenate([np.empty(0, np.uint64), *per_text]))
    sieve = np.zeros(2**SIEVE_BITS, dtype=bool)
    sieve[keys >> SIEVE_SHIFT] = True
    return Ngrams(words, keys, sieve), per_text


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
