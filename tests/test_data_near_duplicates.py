"""Near duplicates: the planted ones go, whatever the workers, and none crosses the split."""

import json
import random

import numpy as np
import pytest

from data.near_duplicates import SignPart
from data.prepare import PrepareSettings, prepare
from data.shards import read_manifest, read_shard_documents
from data.tokenizer import load_tokenizer
from tests.test_data_resilience import hashes, run, tokenizer_folder

__all__ = ["tokenizer_folder"]  # a fixture

WORDS = [f"{first}{last}" for first in ("lan", "mor", "tir", "vel", "gra") for last in "aeiouxyz"]


def write_pages(folder, files=3, pages=25):
    """Pages of 120 words; every fifth stands again in another file, with two of its words changed."""
    folder.mkdir()
    generator = random.Random(0)
    originals = [generator.choices(WORDS, k=120) for _ in range(files * pages)]
    rows = [[" ".join(page) for page in originals[number::files]] for number in range(files)]
    for number, page in enumerate(originals[::5]):
        copy = list(page)
        for at in generator.sample(range(len(copy)), 2):
            copy[at] = "changed"
        rows[number % files].append(" ".join(copy))
    for number, texts in enumerate(rows):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{number}.jsonl").write_text(lines)
    return [" ".join(page) for page in originals]


def shingles(text):
    words = text.split()
    return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}


def test_near_duplicates_go_whatever_the_workers_and_none_crosses_the_split(tmp_path, tokenizer_folder):
    originals = write_pages(tmp_path / "source")
    for workers in ("1", "3"):
        flags = ("--near_deduplicate", "--workers", workers, "--validation_tokens", "4000")
        done = run(tmp_path / "source", tmp_path / workers, tokenizer_folder, *flags)
        assert done.returncode == 0, done.stderr
    assert "15 nearly the same (16.67%)" in done.stdout
    assert hashes(tmp_path / "1") == hashes(tmp_path / "3")
    manifest = read_manifest(tmp_path / "1")
    assert manifest.counts["documents"] == len(originals) + 15
    assert manifest.counts["near_duplicates"] == 15
    assert manifest.documents() == len(originals)
    tokenizer = load_tokenizer(tmp_path / "1" / "tokenizer")
    texts = {
        entry.split: [tokenizer.decode(ids[:-1]) for ids in read_shard_documents(tmp_path / "1" / entry.file)]
        for entry in manifest.shards
    }
    assert len(texts["validation"]) > 5
    known = [shingles(text) for text in texts["train"]]
    for text in texts["validation"]:
        mine = shingles(text)
        assert all(len(mine & other) < 0.2 * len(mine) for other in known)


@pytest.mark.slow
def test_an_interrupted_search_goes_on_and_ends_the_same(tmp_path, tokenizer_folder):
    """The clustering fails once; signatures and pairs are kept."""
    write_pages(tmp_path / "source")
    settings = {"source": str(tmp_path / "source"), "tokenizer": tokenizer_folder, "near_deduplicate": True}
    whole = prepare(PrepareSettings(output=str(tmp_path / "whole"), **settings), progress=False)
    (tmp_path / "cut" / ".work" / "near").mkdir(parents=True)
    (tmp_path / "cut" / ".work" / "near" / "remove").write_text("in the way")
    with pytest.raises(OSError):
        prepare(PrepareSettings(output=str(tmp_path / "cut"), **settings), progress=False)
    signed = list((tmp_path / "cut" / ".work" / "near" / "signatures").rglob("*.sig"))
    before = {path: path.stat().st_mtime_ns for path in signed}
    assert before
    (tmp_path / "cut" / ".work" / "near" / "remove").unlink()
    again = prepare(PrepareSettings(output=str(tmp_path / "cut"), **settings), progress=False)
    assert hashes(whole) == hashes(again)


def test_a_long_document_is_signed_as_in_one_piece(tmp_path, monkeypatch):
    """What is done in pieces for the sake of memory changes no signature, but for n-grams across the cuts."""
    step = SignPart(tmp_path)
    text = " ".join(random.Random(1).choices(WORDS, k=5000))
    whole = step.get_signature(step.get_shingles(text))
    monkeypatch.setattr("data.near_duplicates.SHINGLES_AT_ONCE", 100)
    assert step.get_signature(step.get_shingles(text)) == whole
    monkeypatch.setattr("data.near_duplicates.PIECE_CHARACTERS", 5000)
    cut = step.get_signature(step.get_shingles(text))
    assert np.mean(np.array(cut) == np.array(whole)) > 0.9


def test_a_search_for_near_duplicates_needs_the_whole_source():
    with pytest.raises(ValueError, match="near_deduplicate looks at the whole source"):
        PrepareSettings("x", "y", near_deduplicate=True, limit_tokens=5).validate()
