"""The format on disk: round trip, what `datasets` makes of it, and every kind of damage."""

import json
import os
import pickle

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader import build_loader, collate_blocks
from data.shards import (
    Manifest,
    ShardEntry,
    ShardError,
    TokenBlocks,
    open_shard,
    read_manifest,
    read_shard_documents,
    write_manifest,
    write_shard,
)

END = 0


def write_set(folder, shards, dtype="uint16", split="train"):
    """A shard directory from lists of documents, each a list of ids without the end."""
    entries = []
    for number, documents in enumerate(shards):
        ids = np.array([i for document in documents for i in [*document, END]], dtype=dtype)
        offsets = np.cumsum([0, *(len(document) + 1 for document in documents)]).astype(np.int32)
        entries.append(write_shard(folder / f"{split}-{number:05d}.arrow", split, ids, offsets))
    manifest = Manifest("test", "0" * 64, 100, END, dtype, tuple(entries), {"source": "test"})
    return write_manifest(folder, manifest)


document = st.lists(st.integers(1, 65_535), max_size=30)


@settings(max_examples=25, deadline=None)
@given(documents=st.lists(document, min_size=1, max_size=8), dtype=st.sampled_from(["uint16", "uint32"]))
def test_documents_come_back_from_a_shard(tmp_path_factory, documents, dtype):
    folder = tmp_path_factory.mktemp("set")
    write_set(folder, [documents], dtype)
    seen = list(read_shard_documents(folder / "train-00000.arrow"))
    assert [ids.tolist() for ids in seen] == [[*ids, END] for ids in documents]
    assert all(ids.dtype == dtype for ids in seen)


@settings(max_examples=25, deadline=None)
@given(
    shards=st.lists(st.lists(document, min_size=1, max_size=5), min_size=1, max_size=5),
    block_size=st.integers(2, 17),
)
def test_blocks_are_the_stream_of_all_shards_cut_in_order(tmp_path_factory, shards, block_size):
    folder = tmp_path_factory.mktemp("set")
    write_set(folder, shards)
    stream = [i for documents in shards for ids in documents for i in [*ids, END]]
    if len(stream) < block_size:
        with pytest.raises(ValueError, match="less than one block"):
            TokenBlocks(folder, block_size)
        return
    blocks = TokenBlocks(folder, block_size)
    expected = torch.tensor(stream[: len(stream) // block_size * block_size]).reshape(-1, block_size)
    assert len(blocks) == len(expected)
    assert torch.equal(blocks.__getitems__(range(len(blocks))).input_ids, expected)
    assert torch.equal(torch.stack([blocks[i]["labels"] for i in range(len(blocks))]), expected)
    assert torch.equal(blocks[-1]["input_ids"], expected[-1])
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_batches_are_int64_and_labels_equal_input_ids(tmp_path):
    write_set(tmp_path, [[list(range(1, 40))]])
    batch = next(iter(build_loader(TokenBlocks(tmp_path, 8), collate_blocks, micro_batch_size=3, seed=0)))
    assert batch["input_ids"].shape == (3, 8)
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"])


def test_a_generic_collator_sees_ordinary_rows(tmp_path):
    """Fine-tuning brings its own collators: what `__getitems__` gives must pass as a list of dicts."""
    write_set(tmp_path, [[list(range(1, 40))]])
    loader = build_loader(
        TokenBlocks(tmp_path, 8), torch.utils.data.default_collate, micro_batch_size=2, seed=None
    )
    assert next(iter(loader))["input_ids"].tolist() == [list(range(1, 9)), list(range(9, 17))]


def test_shards_open_with_datasets(tmp_path):
    write_set(tmp_path, [[[1, 2], [3]], [[4]]])
    rows = [[1, 2, END], [3, END], [4, END]]
    one = datasets.Dataset.from_file(str(tmp_path / "train-00000.arrow"))
    assert one["input_ids"][:] == rows[:2]
    files = [str(tmp_path / f"train-0000{n}.arrow") for n in (0, 1)]
    whole = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert whole["input_ids"][:] == rows
    streamed = datasets.load_dataset("arrow", data_files=files, split="train", streaming=True)
    assert [row["input_ids"] for row in streamed] == rows


def test_a_shard_is_one_batch_mapped_without_copying(tmp_path):
    write_set(tmp_path, [[[1, 2, 3], [4]]])
    before = os.path.getsize(tmp_path / "train-00000.arrow")
    column = open_shard(tmp_path / "train-00000.arrow")
    values = column.values.to_numpy(zero_copy_only=True)
    assert values.tolist() == [1, 2, 3, END, 4, END]
    assert not values.flags.owndata
    assert before == read_manifest(tmp_path).shards[0].bytes


def test_blocks_travel_to_another_process_without_their_maps(tmp_path):
    write_set(tmp_path, [[list(range(1, 40))]])
    blocks = TokenBlocks(tmp_path, 8)
    first = blocks[0]["input_ids"]
    content = pickle.dumps(blocks)
    assert len(content) < 10_000
    assert torch.equal(pickle.loads(content)[0]["input_ids"], first)


def test_only_the_shards_that_are_read_from_are_opened(tmp_path):
    """Ninety-nine of a hundred files hold nothing but a hole of the right size: to touch one is an error."""
    tokens = 100_000_000  # the default size, of which a hundred are FineWeb-Edu's sample-10BT
    name = "train-00099.arrow"
    ids, offsets = np.full(tokens, 7, np.uint16), np.array([0, tokens], np.int32)
    last = write_shard(tmp_path / name, "train", ids, offsets)
    entries = [
        ShardEntry("train", f"train-{number:05d}.arrow", last.bytes, last.sha256, 1, tokens)
        for number in range(99)
    ]
    for entry in entries:
        (tmp_path / entry.file).touch()
        os.truncate(tmp_path / entry.file, entry.bytes)
    write_manifest(tmp_path, Manifest("test", "0" * 64, 100, END, "uint16", (*entries, last), {}))
    blocks = TokenBlocks(tmp_path, 1000)
    assert len(blocks) == 100 * tokens // 1000
    assert blocks[len(blocks) - 1]["input_ids"].tolist() == [7] * 1000
    with pytest.raises(ShardError, match=r"train-00098\.arrow is not a readable token shard"):
        blocks[len(blocks) - 1 - tokens // 1000]
    (tmp_path / name).unlink()  # 200 MB, which pytest would keep for three runs


# ---- damage


@pytest.fixture
def shard_set(tmp_path):
    write_set(tmp_path, [[[1, 2, 3]], [[4, 5]]])
    return tmp_path


def test_a_directory_without_manifest_is_not_read(shard_set):
    (shard_set / "manifest.json").unlink()
    with pytest.raises(ShardError, match=r"manifest\.json is missing.*data\.prepare"):
        TokenBlocks(shard_set, 2)


def test_a_missing_shard_is_named(shard_set):
    (shard_set / "train-00001.arrow").unlink()
    with pytest.raises(ShardError, match=r"train-00001\.arrow is missing"):
        TokenBlocks(shard_set, 2)


def test_a_truncated_and_an_extra_shard_are_named_together(shard_set):
    os.truncate(shard_set / "train-00000.arrow", 100)
    (shard_set / "train-00009.arrow").write_bytes(b"")
    with pytest.raises(
        ShardError, match=r"train-00000\.arrow has 100 bytes instead.*train-00009\.arrow is not in"
    ):
        TokenBlocks(shard_set, 2)


def test_a_flipped_bit_is_found_on_request(shard_set):
    path = shard_set / "train-00001.arrow"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    TokenBlocks(shard_set, 2)
    with pytest.raises(ShardError, match=r"train-00001\.arrow is damaged"):
        TokenBlocks(shard_set, 2, check_hashes=True)


def test_a_file_of_the_right_size_that_is_no_shard_is_named(shard_set):
    path = shard_set / "train-00000.arrow"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(ShardError, match=r"train-00000\.arrow is not a readable token shard"):
        TokenBlocks(shard_set, 2)[0]


def test_no_flipped_bit_ends_the_process_or_passes_for_another_shard(shard_set):
    """Metadata that named a place past the file's end was a SIGBUS when its ids were read; types that Arrow
    does not implement came out as they were, without the file's name.
    """
    path = shard_set / "train-00000.arrow"
    whole = path.read_bytes()
    for bit in range(len(whole) * 8):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.unlink()  # a mapped file that is written again would change under its readers
        path.write_bytes(content)
        try:
            column = open_shard(path)
        except ShardError as error:
            assert "train-00000.arrow" in str(error)
            continue
        assert len(column.values.to_numpy(zero_copy_only=True).copy()) == 4
        assert len(column.offsets.to_numpy().copy()) == 2


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format_version": 1}', '{"format_version": 1, "shards": [1]}']
)
def test_a_damaged_manifest_is_named(shard_set, content):
    (shard_set / "manifest.json").write_text(content)
    with pytest.raises(ShardError, match=r"manifest\.json is damaged"):
        read_manifest(shard_set)


def test_a_manifest_of_a_later_format_is_refused(shard_set):
    fields = json.loads((shard_set / "manifest.json").read_text())
    (shard_set / "manifest.json").write_text(json.dumps({**fields, "format_version": 3}))
    with pytest.raises(ShardError, match="version 3; this code reads versions 1 to 2"):
        read_manifest(shard_set)


@pytest.mark.parametrize("change", [{"tokenizer": "another"}, {"counts": {"documents": 7}}, {"settings": {}}])
def test_a_manifest_that_was_changed_by_hand_is_refused(shard_set, change):
    """Another source, or other counts, passed."""
    fields = json.loads((shard_set / "manifest.json").read_text())
    (shard_set / "manifest.json").write_text(json.dumps(fields, indent=7))
    read_manifest(shard_set)  # laid out in another way it says the same
    (shard_set / "manifest.json").write_text(json.dumps({**fields, **change}))
    with pytest.raises(ShardError, match=r"manifest\.json was changed after it was written"):
        TokenBlocks(shard_set, 2)


def test_a_set_of_format_1_is_read_as_it_was(shard_set):
    """Its manifest as the code of then wrote it: no checksum, no hashes of the tokenizer's files."""
    fields = json.loads((shard_set / "manifest.json").read_text())
    for name in ("checksum", "origin", "tokenizer_files"):
        del fields[name]
    (shard_set / "manifest.json").write_text(json.dumps({**fields, "format_version": 1}))
    assert len(TokenBlocks(shard_set, 2)) == 3
    assert read_manifest(shard_set).format_version == 1


def test_an_unknown_split_and_a_useless_block_size_are_refused(shard_set):
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        TokenBlocks(shard_set, 2, split="test")
    with pytest.raises(ValueError, match="at least two tokens"):
        TokenBlocks(shard_set, 1)


def test_the_manifests_hash_is_that_of_its_file(shard_set):
    assert read_manifest(shard_set).sha256 != ""
    before = read_manifest(shard_set).sha256
    with open(shard_set / "manifest.json", "a") as file:
        file.write(" ")
    assert read_manifest(shard_set).sha256 != before
