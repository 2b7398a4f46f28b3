"""The choice made on the disk, in buckets, is the choice that one would make with everything in memory."""

import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data import selection
from data.parts import ROW

# Few keys, spread over the whole range, so that copies are common and buckets many.
DOCUMENTS = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9)), max_size=12)


KEYS = 13
SPREAD = 2**64 // KEYS
FEW_TOKENS = 20  # stand for the ten million that no default validation split goes beyond


def chosen_in_memory(parts, deduplicate, wanted, limit):
    """[(place of each document)] a part, by the rules of docs/formats.md, one document after the other."""
    documents, total = [], 0
    for part in parts:
        for key, tokens in part:
            if limit is None or total < limit:
                documents.append((key, tokens))
                total += tokens
    kept, seen = [], set()
    for number, (key, _) in enumerate(documents):
        if not (deduplicate and key in seen):
            kept.append(number)
        seen.add(key)
    validation, reached = set(), 0
    for key in sorted(seen):
        of_key = [tokens for other, tokens in documents if other == key]
        is_small = key * SPREAD <= selection.VALIDATION_KEYS or key == min(seen)
        if reached < (FEW_TOKENS if wanted is None else wanted) and (wanted is not None or is_small):
            validation.add(key)
            reached += max(of_key) if deduplicate else sum(of_key)
    places, number = [], 0
    for part in parts:
        row = []
        for key, _ in part:
            place = selection.VALIDATION if key in validation else selection.TRAIN
            row.append(place if number in kept else selection.DROPPED)
            number += 1
        places.append(row)
    return places


def chosen(parts, deduplicate, wanted, limit=None):
    """The same by `select_documents`, with sizes so small that twelve rows are many."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        mock.patch.object(selection, "ROWS_AT_ONCE", 4),
        mock.patch.object(selection, "DROPPED_AT_ONCE", 3),
        mock.patch.object(selection, "VALIDATION_TOKENS_AT_MOST", FEW_TOKENS),
        mock.patch.object(selection, "VALIDATION_KEYS", 5 * SPREAD),
    ):
        folders = []
        for number, part in enumerate(parts):
            folders.append(Path(scratch) / f"{number}")
            folders[-1].mkdir()
            rows = np.empty(len(part), ROW)
            rows["key"] = [key * SPREAD for key, _ in part]
            rows["tokens"] = [tokens for _, tokens in part]
            rows.tofile(folders[-1] / "rows.bin")
        made = selection.select_documents(
            folders,
            Path(scratch) / "selection",
            deduplicate=deduplicate,
            validation_tokens=wanted,
            limit_tokens=limit,
        )
        expected = chosen_in_memory(parts, deduplicate, wanted, limit)
        return expected, [
            [int(place) for first in made.firsts(part) for place in made.rows(part, first)[1]]
            for part in range(len(parts))
        ]


@settings(deadline=None, max_examples=150)
@given(
    parts=st.lists(DOCUMENTS, min_size=1, max_size=4),
    deduplicate=st.booleans(),
    wanted=st.none() | st.integers(0, 60),
    limit=st.none() | st.integers(1, 120),
)
def test_the_choice_is_that_of_one_document_after_the_other(parts, deduplicate, wanted, limit):
    expected, seen = chosen(parts, deduplicate, wanted, limit)
    assert seen == expected


def keys_at(parts, places, place):
    return {
        key
        for part, row in zip(parts, places, strict=True)
        for (key, _), p in zip(part, row, strict=False)
        if p == place
    }


GROWING = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9), st.booleans()), max_size=12)


@settings(deadline=None, max_examples=300)
@given(
    parts=st.lists(GROWING, min_size=1, max_size=3),
    deduplicate=st.booleans(),
    wanted=st.none() | st.integers(0, 60),
)
def test_text_that_is_added_anywhere_moves_no_training_document_to_validation(parts, deduplicate, wanted):
    """The default, one token in a hundred of what there was, moved some: it grew with the source. So could a
    set of given size, where a copy with fewer blanks came in front.
    """
    old = [[(key, tokens) for key, tokens, is_new in part if not is_new] for part in parts]
    grown = [[(key, tokens) for key, tokens, _ in part] for part in parts]
    was, now = chosen(old, deduplicate, wanted)[1], chosen(grown, deduplicate, wanted)[1]
    trained, validates = keys_at(old, was, selection.TRAIN), keys_at(grown, now, selection.VALIDATION)
    assert not trained & validates


def test_by_default_a_hundredth_of_documents_validates_and_at_least_one(tmp_path):
    generator = np.random.default_rng(0)
    for number, (documents, fewest, most) in enumerate([(1, 1, 1), (30, 1, 4), (100_000, 900, 1100)]):
        part = tmp_path / f"{number}"
        part.mkdir()
        rows = np.empty(documents, ROW)
        rows["key"], rows["tokens"] = generator.integers(0, 2**64, documents, dtype=np.uint64), 10
        rows.tofile(part / "rows.bin")
        made = selection.select_documents(
            [part], tmp_path / "s", deduplicate=True, validation_tokens=None, limit_tokens=None
        )
        places = np.concatenate([made.rows(0, first)[1] for first in made.firsts(0)])
        assert fewest <= (places == selection.VALIDATION).sum() <= most
