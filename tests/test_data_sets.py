"""A finished set: whether it is what its receipt says, and taking it from elsewhere as a source."""

import dataclasses
import json
import os
import re
import resource
import shutil

import filelock
import pytest

from data.prepare import main
from data.shards import ShardError, TokenBlocks, read_manifest, write_manifest
from data.tokenizer import fingerprint_of_format_1, gpt2_tokenizer, load_tokenizer
from data.verify import verify
from tests.test_data_prepare import corpus, run, tokenizer_folder, write_corpus

__all__ = ["corpus", "tokenizer_folder"]  # fixtures


@pytest.fixture
def finished(tmp_path, corpus, tokenizer_folder):
    return run(tmp_path, corpus, tokenizer_folder, tokens_per_shard=1000)


def flip_bits(*places):
    """Of a shard, at these parts of its length: the head, the metadata, the offsets, the ids, the end."""

    def damage(folder):
        path = folder / "train-00001.arrow"
        content = bytearray(path.read_bytes())
        for place in places:
            content[int(place * (len(content) - 1))] ^= 4
        path.write_bytes(content)

    return damage


def damage_manifest(folder):
    fields = json.loads((folder / "manifest.json").read_text())
    fields["shards"][0]["documents"] += 1
    (folder / "manifest.json").write_text(json.dumps(fields))


def claim(**fields):
    """A whole manifest that says something else; of its shards, that the first has one document more."""

    def damage(folder):
        manifest = read_manifest(folder)
        first = dataclasses.replace(manifest.shards[0], documents=manifest.shards[0].documents + 1)
        write_manifest(
            folder, dataclasses.replace(manifest, **(fields or {"shards": (first, *manifest.shards[1:])}))
        )

    return damage


def damage_tokenizer(folder):
    shutil.rmtree(folder / "tokenizer")
    gpt2_tokenizer().save_pretrained(folder / "tokenizer")


def lower_the_tokenizers_case(folder):
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "normalizer": {"type": "Lowercase"}}))


def add_a_file(name):
    return lambda folder: (folder / name).write_bytes(b"x")


@pytest.mark.parametrize(
    "damage, complaint",
    [
        *(
            (flip_bits(place), r"train-00001\.arrow: its bytes have changed, the SHA-256 is another\.$")
            for place in (0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.5, 0.9, 1)
        ),
        (flip_bits(0, 0.02, 0.1, 0.5), r"train-00001\.arrow: its bytes have changed"),
        (
            lambda folder: os.truncate(folder / "train-00000.arrow", 99),
            r"train-00000\.arrow has 99 bytes instead",
        ),
        (lambda folder: (folder / "train-00001.arrow").unlink(), r"train-00001\.arrow is missing"),
        (lambda folder: (folder / "x.arrow").write_bytes(b""), r"x\.arrow is not in manifest\.json"),
        (damage_manifest, r"manifest\.json was changed after it was written"),
        (claim(), r"train-00000\.arrow: it holds \d+ documents of"),
        (
            claim(counts={"documents": 7, "duplicates": 2, "near_duplicates": 1}),
            r"manifest\.json: 7 documents were read and 3 dropped, which leaves 4; the shards hold 60\.",
        ),
        (claim(vocab_size=300), r"it holds the id 399; the vocabulary has 300 words"),
        (damage_tokenizer, r"tokenizer/: The shards were made with"),
        (damage_tokenizer, r"tokenizer/tokenizer\.json: its bytes have changed"),
        (lower_the_tokenizers_case, r"tokenizer/tokenizer\.json: its bytes have changed"),
        (lower_the_tokenizers_case, r"tokenizer/: The shards were made with"),
        (
            lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{"),
            "tokenizer/: No tokenizer at",
        ),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), r"tokenizer/: No tokenizer at"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), r"tokenizer/tokenizer\.json is missing"),
        (add_a_file("notes.txt"), r"notes\.txt is not in manifest\.json"),
        (add_a_file("train-00009.arrow.tmp"), r"train-00009\.arrow\.tmp is not in manifest\.json"),
        (add_a_file("tokenizer/merges.txt"), r"tokenizer/merges\.txt is not in manifest\.json"),
        (
            lambda folder: os.replace(folder / "train-00001.arrow", folder / "train-00000.arrow"),
            r"train-00000\.arrow.*\n?.*train-00001\.arrow is missing",
        ),
    ],
)
def test_verification_names_what_is_wrong(finished, capsys, damage, complaint):
    assert main(["--verify", str(finished)]) == 0
    assert "is whole" in capsys.readouterr().out
    add_a_file("README.md")(finished)  # as a set has that came from the Hub
    assert main(["--verify", str(finished)]) == 0
    capsys.readouterr()
    damage(finished)
    assert main(["--verify", str(finished)]) == 1
    assert re.search(complaint, capsys.readouterr().err, re.MULTILINE)


def test_a_set_of_format_1_is_verified_and_what_its_receipt_cannot_tell_is_said(finished):
    fields = json.loads((finished / "manifest.json").read_text())
    for name in ("checksum", "origin", "tokenizer_files"):
        del fields[name]
    tokenizer = load_tokenizer(finished / "tokenizer")
    fields |= {"format_version": 1, "tokenizer_fingerprint": fingerprint_of_format_1(tokenizer)}
    (finished / "manifest.json").write_text(json.dumps(fields))
    assert "is whole" in verify(finished) and "receipt is of format 1" in verify(finished)
    damage_tokenizer(finished)
    with pytest.raises(ShardError, match="tokenizer/: The shards were made with"):
        verify(finished)


# ---- a finished set as a source


def test_a_set_is_taken_whole_and_settings_that_it_cannot_follow_are_named(finished, tmp_path, capsys):
    flags = ["--source", str(finished), "--output", str(tmp_path / "copy")]
    assert main([*flags, "--limit_tokens", "100", "--tokens_per_shard", "50", "--tokenizer", "nonsense"]) == 1
    error = capsys.readouterr().err
    assert "--tokenizer nonsense, --limit_tokens 100, --tokens_per_shard 50 cannot be had from it" in error
    assert not (tmp_path / "copy").exists()
    (finished / "holiday.jpg").write_bytes(b"")  # is no part of it, and stays where it is
    assert main([*flags, "--tokens_per_shard", "1000"]) == 0  # as it is
    assert "is whole" in verify(tmp_path / "copy")
    assert main(flags) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_plan_for_a_set_says_that_it_is_one(finished, tmp_path, capsys):
    assert main(["--source", str(finished), "--output", str(tmp_path / "copy"), "--plan"]) == 0
    manifest = read_manifest(finished)
    planned = capsys.readouterr().out
    assert f"taken as it is: {len(manifest.shards)} shards, {manifest.tokens():,} tokens" in planned
    assert not (tmp_path / "copy").exists()


def test_two_processes_do_not_take_a_set_into_one_output(finished, tmp_path, capsys):
    work = tmp_path / "copy" / ".work"
    work.mkdir(parents=True)
    flags = ["--source", str(finished), "--output", str(tmp_path / "copy")]
    with filelock.FileLock(work / "lock"):
        assert main(flags) == 1
    assert "Another process is preparing" in capsys.readouterr().err
    assert main(flags) == 0


def test_a_damaged_set_leaves_nothing_where_it_should_go(finished, tmp_path, capsys):
    flip_bits(0.5)(finished)
    assert main(["--source", str(finished), "--output", str(tmp_path / "copy")]) == 1
    assert "train-00001.arrow: its bytes have changed" in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()


def test_a_disk_that_fills_while_a_set_is_taken_is_one_line_and_the_copy_goes_on(
    tmp_path, tokenizer_folder, capsys
):
    """In the middle of a shard; a limit on the size of files stands for the full disk."""
    write_corpus(tmp_path / "a.jsonl", documents=2000)
    finished = run(tmp_path, tmp_path / "a.jsonl", tokenizer_folder)
    flags = ["--source", str(finished), "--output", str(tmp_path / "copy")]
    largest = max(path.stat().st_size for path in finished.rglob("*"))
    assert largest == (finished / "train-00000.arrow").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, before[1]))
    try:
        status = main(flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert status == 1
    assert error.startswith("error: The disk is full: the set has") and error.count("\n") == 1, error
    assert main(flags) == 0
    assert "is whole" in verify(tmp_path / "copy")


def test_another_programs_manifest_json_does_not_make_a_folder_a_set(tmp_path, tokenizer_folder):
    """A browser's extension has one too: its folder was refused as a damaged set."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "manifest.json").write_text(
        '{"name": "an extension", "text": "a text like others"}'
    )
    write_corpus(tmp_path / "texts" / "a.jsonl")
    assert read_manifest(run(tmp_path, tmp_path / "texts", tokenizer_folder)).documents() == 61


def test_a_manifest_of_another_set_is_found(tmp_path, finished, tokenizer_folder, capsys):
    write_corpus(tmp_path / "other.jsonl", seed=5)
    other = run(tmp_path, tmp_path / "other.jsonl", tokenizer_folder, "other", tokens_per_shard=1000)
    shutil.copy(other / "manifest.json", finished / "manifest.json")
    with pytest.raises(ShardError, match=r"\.arrow has .* bytes instead of"):
        TokenBlocks(finished, 16)
