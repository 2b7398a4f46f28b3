"""How many evaluation questions have a passage in the corpus: any 13 words in a row in common.

Words are compared without case and punctuation, as in the GPT-3 paper (Brown et al. 2020, appendix C). Each
part notes which of the questions' 13-grams it saw; the receipt counts the questions that have one of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.hellaswag import load_questions

WORDS_IN_A_ROW = 13
WORD = re.compile(r"[^\W_]+")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # of the rolling hash; odd, so that no information is shifted out
UNKNOWN = 0


@dataclass(frozen=True)
class Ngrams:
    """The questions' n-grams: `words` numbers their vocabulary from 1; `keys` (n,) uint64, sorted and
    different.
    """

    words: dict[str, int]
    keys: np.ndarray

    def found_in(self, texts: Iterable[str]) -> np.ndarray:
        """The keys (sorted, different) that occur in any of the texts."""
        found = [self._keys_of(text) for text in texts]
        return np.intersect1d(np.concatenate([np.empty(0, np.uint64), *found]), self.keys)

    def _keys_of(self, text: str) -> np.ndarray:
        get = self.words.get
        ids = np.array([get(word, UNKNOWN) for word in WORD.findall(text.lower())], dtype=np.uint64)
        return _keys(ids)


def _keys(ids: np.ndarray) -> np.ndarray:
    """One key for each window of WORDS_IN_A_ROW known words."""
    if len(ids) < WORDS_IN_A_ROW:
        return np.empty(0, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(ids, WORDS_IN_A_ROW)
    unknown_before = np.concatenate([[0], np.cumsum(ids == UNKNOWN)])
    windows = windows[unknown_before[WORDS_IN_A_ROW:] == unknown_before[:-WORDS_IN_A_ROW]]
    keys = np.zeros(len(windows), dtype=np.uint64)
    for column in windows.T:
        keys = (keys ^ column) * MULTIPLIER
        keys ^= keys >> np.uint64(29)
    return keys


def question_ngrams(questions: str) -> tuple[Ngrams, list[np.ndarray]]:
    """The n-grams of all questions (a `.jsonl` file or a Hub id of HellaSwag), and those of each alone.

    A question's text is its context with the right ending.
    """
    texts = [f"{q.ctx} {q.endings[q.label]}" for q in load_questions(questions)]
    words: dict[str, int] = {}
    ids = []
    for text in texts:
        found = WORD.findall(text.lower())
        ids.append(np.array([words.setdefault(word, len(words) + 1) for word in found], dtype=np.uint64))
    per_question = [np.unique(_keys(sequence)) for sequence in ids]
    return Ngrams(words, np.unique(np.concatenate(per_question))), per_question


def contamination(questions: str, part_folders: list[Path]) -> dict:
    """The receipt's entry: how many questions have an n-gram in the corpus."""
    _, per_question = question_ngrams(questions)
    seen = np.unique(np.concatenate([np.load(folder / "ngrams.npy") for folder in part_folders]))
    hit = sum(bool(np.isin(keys, seen).any()) for keys in per_question)
    return {
        "evaluation": "HellaSwag",
        "questions_from": Path(questions).name,
        "words_in_a_row": WORDS_IN_A_ROW,
        "questions": len(per_question),
        "questions_in_corpus": hit,
    }
