"""Readers: where a text is cut, how far a file is read, what memory it takes, what is said when it cannot be
read.
"""

import errno
import gzip
import lzma
import os
import tracemalloc
from collections import Counter
from functools import partial
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from huggingface_hub.errors import OfflineModeIsEnabled
from hypothesis import given, settings
from hypothesis import strategies as st

from data.readers import BLANK_LINE, READERS, TEXT_BYTES, cut_text, kind_of
from data.remote import patiently
from data.sources import SourceError
from tests.test_data_sources import TEXTS, jsonl, texts_of

PARAGRAPHS = st.lists(st.sampled_from(["word ", "\n", "\n\n", "\r\n \r\n", "x" * 9, "é"]), max_size=60)


def pieces_of_whole_text(text, limit):
    """By the rules of docs/formats.md, with all of the text at hand."""
    pieces = []
    while len(text) > limit:
        blanks = [match.end() for match in BLANK_LINE.finditer(text, limit // 2, limit)]
        cut = max(blanks, default=0) or text.rfind("\n", 0, limit) + 1 or text.find("\n") + 1 or len(text)
        pieces.append(text[:cut])
        text = text[cut:]
    return [*pieces, text] if text or not pieces else pieces


@settings(deadline=None, max_examples=300)
@given(blocks=PARAGRAPHS, limit=st.integers(2, 40))
def test_a_text_is_cut_at_the_same_places_whatever_the_blocks_that_it_comes_in(blocks, limit):
    text = "".join(blocks)
    pieces = list(cut_text(blocks, limit))
    assert pieces == pieces_of_whole_text(text, limit)
    assert "".join(pieces) == text
    assert all(len(piece) <= limit or "\n" not in piece[:-1] for piece in pieces)


@settings(deadline=None, max_examples=100)
@given(content=st.binary(max_size=40) | st.text(max_size=20).map(str.encode), size=st.integers(1, 5))
def test_blocks_of_a_text_file_are_decoded_as_the_whole(tmp_path_factory, content, size):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(content)
    counts = Counter()
    with mock.patch("data.readers.TEXT_BYTES", size):
        seen = "".join(text for text, _ in READERS[".txt"](str(path), "text", counts))
    assert seen == content.decode("utf-8", "replace")
    try:
        content.decode()
    except UnicodeDecodeError:
        assert counts["repaired"] == 1
    else:
        assert counts["repaired"] == 0
    assert counts["bytes"] == len(content)


def test_a_text_file_of_200_megabytes_takes_no_memory_of_its_size(tmp_path):
    """It was held as bytes, as a string and as pieces: 585 MB, and 854 with one typographer's quote."""
    line = "The corridor bends north and a cold draught smells of wet stone and iron.\n"
    with open(tmp_path / "a.txt", "w") as file:
        for _ in range(200):
            file.write((line * 10 + "\n") * (1_000_000 // (len(line) * 10 + 1)))
        file.write("“closed”\n")
    tracemalloc.start()
    try:
        pieces = sum(1 for _ in READERS[".txt"](str(tmp_path / "a.txt"), "text", Counter()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        (tmp_path / "a.txt").unlink()
    assert pieces > 9_000
    assert peak < 20e6


def in_the_middle_and_at_the_end(path):
    """The part of the file that a reader has counted at each of its documents, and the sum at the end."""
    counts = Counter()
    seen = []
    for _ in READERS[kind_of(str(path))](str(path), "text", counts):
        seen.append(counts["bytes"] / path.stat().st_size)
    return seen, counts["bytes"]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.jsonl.xz", "a.parquet", "a.arrow", "b.arrow", "a.txt"]
)
def test_what_has_been_read_of_a_file_is_known_at_each_document(tmp_path, name):
    """`--plan` reckons the whole from it: Parquet's rows came before their bytes, a text file's bytes before
    its pieces, and of lines only every 256th told.
    """
    path = tmp_path / name
    # Numbers, which no compression does away with.
    texts = [" ".join(map(str, np.random.default_rng(n).integers(0, 10**9, 300))) for n in range(3000)]
    compress = {"gz": gzip.compress, "zst": zstandard.compress, "xz": partial(lzma.compress, preset=0)}
    if name == "a.parquet":
        pa.parquet.write_table(pa.table({"text": texts}), path, row_group_size=1000)
    elif name.endswith("arrow"):
        table = pa.table({"text": texts})
        opener = pa.ipc.new_stream if name == "a.arrow" else pa.ipc.new_file
        with opener(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=500)
    elif name == "a.txt":
        path.write_text("\n\n".join(texts))
    else:
        path.write_bytes(compress.get(name.rpartition(".")[2], bytes)(jsonl(texts)))
    seen, total = in_the_middle_and_at_the_end(path)
    size = path.stat().st_size
    expected = np.arange(1, len(seen) + 1) / len(seen)
    # What is read ahead: a block of text, of Zstandard's input, of gzip's.
    assert np.abs(np.array(seen) - expected).max() < 2 * TEXT_BYTES / size + 0.01
    assert size * 0.999 < total <= size


def test_text_that_is_stored_by_dictionary_is_text(tmp_path):
    """As pandas' categories and pyarrow's own writer leave it; it was refused as no text."""
    column = pa.array([*TEXTS, None, TEXTS[0]]).dictionary_encode()
    pa.parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    table = pa.table({"text": column})
    with pa.ipc.new_stream(str(tmp_path / "b.arrow"), table.schema) as writer:
        writer.write_table(table)
    counts = Counter()
    assert texts_of(tmp_path, counts) == [*TEXTS, TEXTS[0]] * 2
    assert counts["blank"] == 2
    numbers = pa.table({"text": pa.array([1, 1]).dictionary_encode()})
    pa.parquet.write_table(numbers, tmp_path / "c.parquet")
    with pytest.raises(SourceError, match="not text"):
        texts_of(tmp_path / "c.parquet")


@pytest.mark.skipif(
    not os.path.exists("/proc/self/mem"), reason="a file that opens and cannot be read: Linux's"
)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".jsonl.gz", ".parquet", ".arrow", ".wld"])
def test_what_the_system_refuses_to_read_is_not_called_damaged(tmp_path, kind):
    """Permission denied and read errors of the disk were "damaged or cut off", or "no whole Parquet file"."""
    path = tmp_path / f"a{kind}"
    path.symlink_to("/proc/self/mem")
    with pytest.raises(
        SourceError, match=r"cannot be read: (Input/output error|Invalid argument)"
    ) as refused:
        list(READERS[kind_of(str(path))](str(path), "text", Counter()))
    assert str(path) in str(refused.value)


def test_what_may_pass_is_tried_again_and_said_so(monkeypatch, capsys):
    monkeypatch.setattr("data.remote.RETRY_SECONDS", (0, 0))
    troubles = [TimeoutError("no answer"), ConnectionResetError("reset")]

    def attempt():
        if troubles:
            raise troubles.pop(0)
        return "read"

    assert patiently(attempt) == "read"
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "TimeoutError: no answer. Trying again in 0 s.",
        "ConnectionResetError: reset. Trying again in 0 s.",
    ]


@pytest.mark.parametrize(
    "error",
    [
        OfflineModeIsEnabled("offline"),
        ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"),
        PermissionError("no"),
        FileNotFoundError("gone"),
        ValueError("ours"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_cannot_pass_is_not_waited_for(error):
    """Without a network, four minutes went by in silence although the Hub was switched off."""

    def attempt(tries=[]):  # noqa: B006
        tries.append(1)
        assert len(tries) == 1
        raise error

    with pytest.raises(type(error)):
        patiently(attempt)
