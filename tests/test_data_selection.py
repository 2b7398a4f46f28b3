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
    for key in sorted({documents[number][0] for number in kept}):
        if reached < wanted:
            validation.add(key)
            reached += sum(documents[number][1] for number in kept if documents[number][0] == key)
    places, number = [], 0
    for part in parts:
        row = []
        for key, _ in part:
            place = selection.VALIDATION if key in validation else selection.TRAIN
            row.append(place if number in kept else selection.DROPPED)
            number += 1
        places.append(row)
    return places


@settings(deadline=None, max_examples=150)
@given(
    parts=st.lists(DOCUMENTS, min_size=1, max_size=4),
    deduplicate=st.booleans(),
    wanted=st.integers(0, 60),
    limit=st.none() | st.integers(1, 120),
)
def test_the_choice_is_that_of_one_document_after_the_other(parts, deduplicate, wanted, limit):
    with (
        tempfile.TemporaryDirectory() as scratch,
        mock.patch.object(selection, "ROWS_AT_ONCE", 4),  # sizes, so that twelve rows are many
        mock.patch.object(selection, "DROPPED_AT_ONCE", 3),
    ):
        folders = []
        for number, part in enumerate(parts):
            folders.append(Path(scratch) / f"{number}")
            folders[-1].mkdir()
            rows = np.empty(len(part), ROW)
            rows["key"] = [key * (2**64 // 13) for key, _ in part]
            rows["tokens"] = [tokens for _, tokens in part]
            rows.tofile(folders[-1] / "rows.bin")
        made = selection.select_documents(
            folders,
            Path(scratch) / "selection",
            deduplicate=deduplicate,
            validation_tokens=wanted,
            limit_tokens=limit,
        )
        places = [
            [int(place) for first in made.firsts(part) for place in made.rows(part, first)[1]]
            for part in range(len(parts))
        ]
    assert places == chosen_in_memory(parts, deduplicate, wanted, limit)
