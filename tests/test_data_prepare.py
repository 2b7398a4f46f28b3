"""`python -m data.prepare`: what it writes, what it refuses, and that it goes on where it stopped."""

import argparse
import hashlib
import inspect
import json
import os
import pydoc
import random
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import strategies as st

from data.parts import content_key
from data.plan import plan
from data.prepare import PrepareSettings, main, prepare
from data.readers import cut_text
from data.shards import ShardError, TokenBlocks, read_manifest, read_shard_documents
from data.tokenizer import gpt2_tokenizer, load_tokenizer, train_tokenizer
from data.verify import verify
from tests.test_data_sources import small_environment
from tests.test_data_tokenizer import PROSE, large_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent


def write_corpus(path, documents=60, seed=0):
    """JSON lines of short different documents; returns their texts."""
    generator = random.Random(seed)
    words = " ".join(PROSE[:3]).split()
    texts = [f"{number}: " + " ".join(generator.choices(words, k=30)) for number in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(PROSE, 400).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl")
    return tmp_path / "corpus.jsonl"


def run(tmp_path, corpus, tokenizer_folder, name="shards", **settings):
    return prepare(
        PrepareSettings(
            source=str(corpus), output=str(tmp_path / name), **{"tokenizer": tokenizer_folder, **settings}
        ),
        progress=False,
    )


@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=80), max_size=6))
def test_every_different_text_comes_back_from_its_shards(tmp_path_factory, tokenizer_folder, texts):
    """From JSON lines to ids on disk to text, in order; blanks alone are no document, copies are one."""
    folder = tmp_path_factory.mktemp("round")
    texts = ["so that there is one", *texts, *texts[::2]]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shards = run(folder, folder / "corpus.jsonl", tokenizer_folder, validation_tokens=0, workers=1)
    tokenizer = load_tokenizer(tokenizer_folder)
    seen = [tokenizer.decode(ids[:-1]) for ids in read_shard_documents(shards / "train-00000.arrow")]
    kept: dict[int, str] = {}
    for text in filter(str.strip, texts):
        kept.setdefault(content_key(text), text)
    assert seen == list(kept.values())


def decoded(folder, split):
    tokenizer = load_tokenizer(folder / "tokenizer")
    entries = read_manifest(folder).of_split(split)
    documents = [ids for entry in entries for ids in read_shard_documents(folder / entry.file)]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in documents)
    return [tokenizer.decode(ids[:-1]) for ids in documents]


def test_every_document_comes_back_once_in_order_from_several_shards(tmp_path, corpus, tokenizer_folder):
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    folder = run(tmp_path, corpus, tokenizer_folder, tokens_per_shard=500, validation_tokens=300)
    manifest = read_manifest(folder)
    train, validation = decoded(folder, "train"), decoded(folder, "validation")
    assert sorted(train + validation) == sorted(texts)
    assert [text for text in texts if text in set(train)] == train
    assert [text for text in texts if text in set(validation)] == validation
    assert len(manifest.of_split("train")) > 3
    assert all(entry.tokens <= 500 for entry in manifest.shards)
    assert 300 <= manifest.tokens("validation") < 300 + max(len(text) for text in texts)
    dropped = {"duplicates": 0, "near_duplicates": 0, "blank": 0}
    assert manifest.counts == {"documents": 60, **dropped, "repaired": 0}
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["manifest.json", "tokenizer", *(entry.file for entry in manifest.shards)]
    )


def test_what_is_written_is_ready_for_training(tmp_path, corpus, tokenizer_folder):
    folder = run(tmp_path, corpus, tokenizer_folder)
    blocks = TokenBlocks(folder, 32, check_hashes=True)
    blocks.manifest.check_tokenizer(load_tokenizer(folder / "tokenizer"))
    assert len(TokenBlocks(folder, 32, split="validation")) >= 1
    with pytest.raises(ShardError, match=r"made with the tokenizer .* \(400 words.* has 50,257 words"):
        blocks.manifest.check_tokenizer(gpt2_tokenizer())


def test_two_preparations_write_the_same_bytes(tmp_path, corpus, tokenizer_folder):
    hashes = [
        [entry.sha256 for entry in read_manifest(run(tmp_path, corpus, tokenizer_folder, name)).shards]
        for name in ("one", "two")
    ]
    assert hashes[0] == hashes[1]


def test_another_tokenizer_in_the_same_place_is_another_tokenizer(tmp_path, corpus):
    """The encoder was kept by the path of its file: shards of the first one's ids got the receipt of the
    second, and passed every check.
    """
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    for number, prose in enumerate([PROSE, [text.swapcase() * 3 for text in PROSE]]):
        train_tokenizer(prose, 320).save_pretrained(tmp_path / f"{number}")
        shutil.rmtree(tmp_path / "shards", ignore_errors=True)
        folder = run(tmp_path, corpus, str(tmp_path / f"{number}"), validation_tokens=0, workers=1)
        assert decoded(folder, "train") == texts


def test_the_receipt_says_which_files_were_read(tmp_path, corpus, tokenizer_folder):
    manifest = read_manifest(run(tmp_path, corpus, tokenizer_folder))
    digest = hashlib.sha256(b"corpus.jsonl").hexdigest()
    assert manifest.origin == {"files": 1, "bytes": corpus.stat().st_size, "files_sha256": digest}
    names = {path.name for path in (tmp_path / "shards" / "tokenizer").iterdir()}
    assert manifest.tokenizer_files.keys() == names and "tokenizer.json" in names


def test_a_tokenizer_is_trained_on_the_source(tmp_path, corpus, capsys):
    folder = prepare(
        PrepareSettings(source=str(corpus), output=str(tmp_path / "out"), train_tokenizer=300), progress=False
    )
    assert read_manifest(folder).vocab_size == len(load_tokenizer(folder / "tokenizer")) == 300


def test_a_large_vocabulary_gives_uint32_shards(tmp_path, corpus):
    large_tokenizer().save_pretrained(tmp_path / "large")
    folder = run(tmp_path, corpus, str(tmp_path / "large"))
    manifest = read_manifest(folder)
    assert manifest.dtype == "uint32"
    assert manifest.vocab_size == 256 + 65_536 + 1
    assert int(TokenBlocks(folder, 16)[0]["input_ids"].max()) > 65_535 or manifest.eos_token_id > 65_535


def test_the_embedded_corpus_is_prepared_with_a_tokenizer_of_its_own(tmp_path, monkeypatch):
    small_environment(monkeypatch, tmp_path)
    settings = PrepareSettings(source="python-docs", output=str(tmp_path / "out"), train_tokenizer=270)
    folder = prepare(settings, progress=False)
    assert read_manifest(folder).documents() == 3
    assert any("help" not in text and "lamp" in text for text in decoded(folder, "train"))


def test_one_text_file_gives_both_splits(tmp_path, tokenizer_folder):
    """It was one document, which the validation split took whole: nothing was left to train on."""
    modules = (argparse, inspect, pydoc, subprocess, random)
    texts = [inspect.getdoc(value) or "" for module in modules for value in vars(module).values()]
    content = "\n\n".join(dict.fromkeys(texts))
    content = "\n\n".join([content, *(f"Chapter {n}.\n{content[n:9000]}" for n in range(20))])[:200_000]
    assert len(content) > 150_000
    (tmp_path / "input.txt").write_text(content)
    folder = run(tmp_path, tmp_path / "input.txt", tokenizer_folder)
    for split in ("train", "validation"):
        assert len(TokenBlocks(folder, 128, split)) > 10
    assert len(TokenBlocks(folder, 128)) > len(TokenBlocks(folder, 128, "validation")) * 4
    everything = decoded(folder, "train") + decoded(folder, "validation")
    assert sorted(everything) == sorted(cut_text([content]))


def test_a_text_too_short_to_divide_is_refused_with_advice_that_helps(tmp_path, tokenizer_folder):
    (tmp_path / "a.txt").write_text(" ".join(PROSE))
    with pytest.raises(
        ValueError,
        match=r"\(one document\) leaves nothing to train on.*1 different doc.*Give more or smaller",
    ):
        run(tmp_path, tmp_path / "a.txt", tokenizer_folder)
    write_corpus(tmp_path / "b.jsonl")
    assert run(tmp_path, tmp_path / "?.*", tokenizer_folder, "both").exists()


# ---- duplicates and the split


def test_copies_are_dropped_and_counted_wherever_they_stand(tmp_path, tokenizer_folder):
    texts = write_corpus(tmp_path / "a.jsonl")
    with open(tmp_path / "a.jsonl", "a") as file:
        for text in (texts[3], texts[7].replace(" ", "\n  "), texts[3] + "\n"):
            file.write(json.dumps({"text": text}) + "\n")
    folder = run(tmp_path, tmp_path / "a.jsonl", tokenizer_folder)
    assert read_manifest(folder).counts["duplicates"] == 3
    assert sorted(decoded(folder, "train") + decoded(folder, "validation")) == sorted(texts)
    kept = run(tmp_path, tmp_path / "a.jsonl", tokenizer_folder, "kept", deduplicate=False)
    assert read_manifest(kept).counts["duplicates"] == 0
    assert read_manifest(kept).documents() == 63


def test_no_copy_crosses_the_split_even_when_copies_are_kept(tmp_path, tokenizer_folder):
    texts = write_corpus(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    folder = run(tmp_path, tmp_path / "?.jsonl", tokenizer_folder, deduplicate=False, validation_tokens=500)
    train, validation = decoded(folder, "train"), decoded(folder, "validation")
    assert len(train) + len(validation) == 2 * len(texts)
    assert not set(train) & set(validation)


@pytest.mark.parametrize("validation_tokens", [None, 600])
def test_training_documents_stay_training_documents_when_the_source_grows(
    tmp_path, tokenizer_folder, validation_tokens
):
    """By default 1% of the tokens validated, of however many there were: a larger source took some back."""
    documents = 60 if validation_tokens else 1000
    write_corpus(tmp_path / "b.jsonl", documents)
    wanted = {"validation_tokens": validation_tokens}
    small = run(tmp_path, tmp_path / "b.jsonl", tokenizer_folder, "small", **wanted)
    for number in range(3):
        write_corpus(tmp_path / f"a{number}.jsonl", documents, seed=1 + number)
    grown = run(tmp_path, tmp_path / "*.jsonl", tokenizer_folder, "grown", **wanted)
    assert not set(decoded(small, "train")) & set(decoded(grown, "validation"))
    if validation_tokens is None:  # then a document's side is its own, whatever stands beside it
        assert set(decoded(small, "validation")) <= set(decoded(grown, "validation"))
        assert 4 * 5 <= len(decoded(grown, "validation")) <= 4 * 20


def test_keys_ignore_white_space_only():
    assert content_key("a b\nc") == content_key(" a  b c ")
    assert content_key("a b c") != content_key("a b C")


def test_a_token_limit_takes_the_first_documents(tmp_path, corpus, tokenizer_folder):
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    folder = run(tmp_path, corpus, tokenizer_folder, limit_tokens=1000, validation_tokens=0)
    manifest = read_manifest(folder)
    seen = decoded(folder, "train")
    assert seen == texts[: len(seen)]
    last = len(load_tokenizer(folder / "tokenizer")(seen[-1]).input_ids) + 1
    assert manifest.tokens() - last < 1000 <= manifest.tokens()


def write_questions(path, passages):
    """HellaSwag's questions with these contexts."""
    question = {"ctx_b": "", "ind": 1, "activity_label": "Caving", "split": "val", "split_type": "indomain"}
    question |= {"source_id": "activitynet~v_1", "label": 1}
    rows = []
    for index, passage in enumerate(passages):
        endings = ["sings loudly.", "rests awhile.", "falls asleep.", "goes home."]
        rows.append({**question, "ind": index, "ctx_a": passage, "ctx": passage, "endings": endings})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_nothing_behind_a_token_limit_is_in_the_receipt(tmp_path, tokenizer_folder, monkeypatch):
    """Blank lines, repaired ones and questions behind it were, and how far behind hung on the workers."""
    monkeypatch.setattr("data.sources.PART_BYTES", 1000)
    (tmp_path / "source").mkdir()
    passage = "A man climbs down a rope into a dark and narrow shaft of stone. He"
    questions = write_questions(tmp_path / "questions.jsonl", [passage])
    long = " ".join(PROSE[:3]) * 2
    rows = [[f"{part} {number} {long}" for number in range(20)] for part in range(4)]
    for part, texts in enumerate(rows):
        texts[3:3] = ["", None]
        if part >= 2:  # behind the limit, but in the part that it lies in
            texts[15:15] = ["", f"{part} {passage} rests awhile. {long}", None]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "source" / f"{part}.jsonl").write_text(lines)
    tokenizer = load_tokenizer(tokenizer_folder)
    limit = sum(
        len(tokenizer(text).input_ids) + 1 for texts in [*rows[:2], rows[2][:10]] for text in texts if text
    )
    manifests = []
    for workers in (1, 2, 4):
        with pytest.warns(UserWarning, match="not the official"):
            folder = run(
                tmp_path,
                tmp_path / "source",
                tokenizer_folder,
                f"{workers}",
                workers=workers,
                limit_tokens=limit,
                contamination=questions,
            )
        manifests.append(read_manifest(folder))
        assert manifests[-1].counts["documents"] == 20 + 20 + 8
        assert manifests[-1].counts["blank"] == 2 + 2 + 2
        assert manifests[-1].contamination["questions_in_corpus"] == 0
        assert manifests[-1].shards == manifests[0].shards


def test_questions_with_a_passage_in_the_corpus_are_counted(tmp_path, tokenizer_folder):
    """13 words in a row, whatever the case and punctuation; 12 are not enough."""
    passages = [
        "A man climbs down a rope into a dark and narrow shaft of stone. He",
        "A woman lights a lamp and walks through the flooded gallery below the mill. She",
        "Two boys roll a heavy barrel along the pier while gulls are watching them. They",
    ]
    questions = write_questions(tmp_path / "questions.jsonl", passages)
    texts = write_corpus(tmp_path / "a.jsonl")
    whole = "It says: a MAN climbs down a rope, into a dark and narrow shaft of stone! Then"
    twelve = "a woman lights a lamp and walks through the flooded gallery below nothing"
    with open(tmp_path / "a.jsonl", "a") as file:
        for text in (whole, twelve, *(text.upper() for text in texts[:2])):
            file.write(json.dumps({"text": text}) + "\n")
    with pytest.warns(UserWarning, match="not the official"):
        folder = run(tmp_path, tmp_path / "a.jsonl", tokenizer_folder, contamination=questions)
    assert read_manifest(folder).contamination == {
        "evaluation": "HellaSwag",
        "questions_from": "questions.jsonl",
        "words_in_a_row": 13,
        "questions": 3,
        "questions_in_corpus": 1,
    }


# ---- interruptions and refusals


def test_a_finished_output_is_left_alone(tmp_path, corpus, tokenizer_folder, capsys):
    folder = run(tmp_path, corpus, tokenizer_folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    run(tmp_path, corpus, tokenizer_folder)
    assert "already prepared" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_what_a_kill_after_the_manifest_left_is_cleared_away(tmp_path, corpus, tokenizer_folder, capsys):
    """`.work` stayed for ever, with a second copy of all ids in it."""
    folder = run(tmp_path, corpus, tokenizer_folder)
    (folder / ".work" / "parts").mkdir(parents=True)
    with pytest.raises(ShardError, match=r"\.work is not in manifest\.json"):
        verify(folder)
    run(tmp_path, corpus, tokenizer_folder)
    assert "nothing to do" in capsys.readouterr().out
    assert not (folder / ".work").exists()
    assert "is whole" in verify(folder)


def interrupted(tmp_path, corpus, tokenizer_folder):
    """A preparation whose parts are encoded: a file in the way of the shards' receipts ends it there."""
    obstacle = tmp_path / "shards" / ".work" / "shards"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("")
    with pytest.raises(OSError):
        run(tmp_path, corpus, tokenizer_folder)
    obstacle.unlink()
    return obstacle.parent / "parts" / "00000"


def test_a_part_that_is_cut_short_is_encoded_again_after_the_advice_to_delete_it(
    tmp_path, corpus, tokenizer_folder
):
    """datatrove had marked it as done: with the folder gone there was nothing to read and nobody to write."""
    part = interrupted(tmp_path, corpus, tokenizer_folder)
    os.truncate(part / "ids.bin", 100)
    with pytest.raises(
        ValueError, match=r"shorter than its rows say. Delete .*00000 and run the same command"
    ):
        run(tmp_path, corpus, tokenizer_folder)
    shutil.rmtree(part)
    assert TokenBlocks(run(tmp_path, corpus, tokenizer_folder), 32, check_hashes=True)[0]


def test_an_unfinished_preparation_of_an_older_version_is_not_mixed_with_this_ones(
    tmp_path, corpus, tokenizer_folder
):
    part = interrupted(tmp_path, corpus, tokenizer_folder)
    path = part.parent.parent / "settings.json"
    before = json.loads(path.read_text())
    del before["format_version"]
    path.write_text(json.dumps(before))
    with pytest.raises(ValueError, match="by an older version of this program"):
        run(tmp_path, corpus, tokenizer_folder)


def test_an_output_of_other_settings_is_refused_with_the_differences(tmp_path, corpus, tokenizer_folder):
    folder = run(tmp_path, corpus, tokenizer_folder)
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match=r"tokens_per_shard was 100000000, is 7.*Nothing was changed"):
        run(tmp_path, corpus, tokenizer_folder, tokens_per_shard=7)
    assert (folder / "manifest.json").read_bytes() == before


def test_an_output_that_holds_something_else_is_refused(tmp_path, corpus, tokenizer_folder):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds something else \(holiday\.jpg\)"):
        run(tmp_path, corpus, tokenizer_folder)
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["holiday.jpg"]
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ValueError, match="is a file"):
        run(tmp_path, corpus, tokenizer_folder, "file")


def test_a_second_process_on_the_same_output_is_refused(tmp_path, corpus, tokenizer_folder):
    work = tmp_path / "shards" / ".work"
    work.mkdir(parents=True)
    with filelock.FileLock(work / "lock"), pytest.raises(ValueError, match="Another process is preparing"):
        run(tmp_path, corpus, tokenizer_folder)


def test_an_unfinished_output_is_not_continued_with_other_settings(tmp_path, corpus, tokenizer_folder):
    (tmp_path / "bad.jsonl").write_text(corpus.read_text() + "broken")
    with pytest.raises(ValueError, match=r"bad\.jsonl:61"):
        run(tmp_path, tmp_path / "bad.jsonl", tokenizer_folder)
    assert not list((tmp_path / "shards").glob("*.arrow"))
    with pytest.raises(ValueError, match="unfinished preparation made with other settings: source was"):
        run(tmp_path, corpus, tokenizer_folder)


def test_a_source_that_changed_since_an_interruption_is_refused(tmp_path, tokenizer_folder):
    path = tmp_path / "a.jsonl"
    write_corpus(path)
    path.write_text(path.read_text() + "broken")
    with pytest.raises(ValueError, match="not one JSON object"):
        run(tmp_path, path, tokenizer_folder)
    path.write_text(path.read_text().removesuffix("broken"))
    with pytest.raises(ValueError, match="have changed since"):
        run(tmp_path, path, tokenizer_folder)


@pytest.mark.parametrize("content", ["", '{"text": ""}\n{"text": null}\n'])
def test_an_empty_corpus_is_an_error(tmp_path, tokenizer_folder, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match="is empty: it has no document with text"):
        run(tmp_path, tmp_path / "a.jsonl", tokenizer_folder)


def test_a_validation_split_that_takes_everything_is_an_error(tmp_path, corpus, tokenizer_folder):
    with pytest.raises(ValueError, match="leaves nothing to train on"):
        run(tmp_path, corpus, tokenizer_folder, validation_tokens=10**9)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path, corpus):
    tokenizer = large_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="no end-of-text token"):
        run(tmp_path, corpus, str(tmp_path / "endless"))


def test_bad_settings_are_reported_all_at_once(tmp_path):
    settings = PrepareSettings(
        "x", str(tmp_path / "o"), limit_tokens=0, tokens_per_shard=2**31, validation_tokens=-1
    )
    with pytest.raises(ValueError, match=r"tokens_per_shard=.*limit_tokens=0.*validation_tokens=-1"):
        prepare(settings)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"config": "sample-10BT"}, "config='sample-10BT' is for datasets on the Hub, not for 'x'"),
        ({"revision": "main", "split": "test"}, r"split='test' is for.*revision='main' is for"),
        ({"source": "dungeons", "config": "a"}, "config='a' is for datasets on the Hub"),
        (
            {"train_tokenizer": 300, "tokenizer": "y"},
            "tokenizer='y' and train_tokenizer=300: one or the other",
        ),
        ({"slurm_cpus": 0, "slurm_memory_gb": -1}, "slurm_cpus=0 is not positive; slurm_memory_gb=-1"),
    ],
)
def test_settings_that_would_be_passed_over_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        PrepareSettings(**{"source": "x", "output": "o", **settings}).validate()
    PrepareSettings("fineweb-edu", "o", config="100BT", split="train", revision="main").validate()


def test_the_command_prepares_and_prints_a_table(tmp_path, corpus, tokenizer_folder):
    command = [
        sys.executable,
        "-m",
        "data.prepare",
        "--source",
        str(corpus),
        "--output",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [*command, "--tokenizer", tokenizer_folder],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "validation" in done.stdout
    assert read_manifest(tmp_path / "out").documents() == 60


def test_the_command_ends_with_one_line_and_status_one_on_bad_input(tmp_path, capsys):
    assert main(["--source", str(tmp_path / "nothing"), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: No source")
    assert "Traceback" not in error


@pytest.mark.parametrize("output", ["corpus.jsonl/out", "/proc/nowhere/out"])
def test_an_output_that_cannot_be_is_one_line(tmp_path, corpus, tokenizer_folder, capsys, output):
    """Below a file, and where no folder can be made: both came out as tracebacks."""
    flags = ["--source", str(corpus), "--tokenizer", tokenizer_folder]
    assert main([*flags, "--output", str(tmp_path / output)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_flags_that_are_missing_are_named(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "--source and --output" in capsys.readouterr().err


def test_a_plan_reckons_the_whole_from_a_part_of_any_kind_of_file(tmp_path, tokenizer_folder, monkeypatch):
    """Of Parquet a plan promised 1.4 times the tokens, of a text file a quarter, of long lines nothing."""
    monkeypatch.setattr("data.plan.SAMPLE_CHARACTERS", 500_000)
    monkeypatch.setattr("data.readers.TEXT_BYTES", 10_000)
    generator = random.Random(0)
    words = [word * generator.randint(1, 3) for word in " ".join(PROSE[:3]).split()]
    texts = [" ".join(generator.choices(words, k=2000)) for _ in range(250)]
    books = ["\n".join(texts[start : start + 25]) for start in range(0, len(texts), 25)]
    pa.parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in books))
    (tmp_path / "d.txt").write_text("\n\n".join(texts))
    tokenizer = load_tokenizer(tokenizer_folder)
    tokens = sum(len(tokenizer(text).input_ids) + 1 for text in texts)
    assert sum(map(len, texts)) > 4 * 500_000
    for path in sorted(tmp_path.glob("?.*")):
        planned = plan(PrepareSettings(str(path), str(tmp_path / "out"), tokenizer_folder))
        found = re.search(r"about ([\d,]+) tokens", planned)
        assert found and int(found[1].replace(",", "")) == pytest.approx(tokens, rel=0.05), (path, planned)


def test_a_plan_measures_what_the_settings_ask_for(tmp_path, corpus, tokenizer_folder):
    settings = {"source": str(corpus), "output": str(tmp_path / "out"), "tokenizer": tokenizer_folder}
    assert "on one core (read and encoded), measured here" in plan(PrepareSettings(**settings))
    more = plan(PrepareSettings(**settings, contamination="q.jsonl", near_deduplicate=True))
    assert "(read and encoded, searched for evaluation questions, signed for near duplicates)" in more
    cluster = plan(PrepareSettings(**settings, executor="slurm", slurm_partition="cpu"))
    assert "of one core, to be shared by at most 1 tasks" in cluster


def test_a_plan_signs_nothing_where_there_are_no_five_words(tmp_path, tokenizer_folder):
    (tmp_path / "short.txt").write_text("two words")
    asked = PrepareSettings(
        str(tmp_path / "short.txt"), str(tmp_path / "out"), tokenizer_folder, near_deduplicate=True
    )
    assert "signed for near duplicates" in plan(asked)


def test_a_plan_says_what_would_happen_and_touches_nothing(tmp_path, corpus, tokenizer_folder, capsys):
    before = sorted(tmp_path.rglob("*"))
    flags = ["--source", str(corpus), "--output", str(tmp_path / "out"), "--tokenizer", tokenizer_folder]
    assert main([*flags, "--plan"]) == 0
    planned = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert main(flags) == 0
    assert f"about {read_manifest(tmp_path / 'out').tokens():,} tokens" in planned


@pytest.mark.parametrize(
    "limit, source",
    [(20, "corpus"), (2_000, "corpus"), (1_000, "python-docs")],
    ids=["claim", "rust", "gather"],
)
def test_a_disk_that_fills_before_the_encoding_is_one_line_too(
    tmp_path, corpus, capsys, monkeypatch, limit, source
):
    """A limit on the size of files stands for the full disk; Python has the signal for it ignored."""
    small_environment(monkeypatch, tmp_path)
    source = str(corpus) if source == "corpus" else source
    flags = ["--source", source, "--output", str(tmp_path / "out"), "--train_tokenizer", "270"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        status = main(flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert (status, error.count("error: The disk is full"), error.count("Traceback")) == (1, 1, 0), error
    assert main(flags) == 0


# ---- sizes


def test_a_corpus_smaller_than_one_block_is_an_error(tmp_path, tokenizer_folder):
    write_corpus(tmp_path / "a.jsonl", documents=1)
    folder = run(tmp_path, tmp_path / "a.jsonl", tokenizer_folder, validation_tokens=0)
    with pytest.raises(ValueError, match="less than one block of 4,096"):
        TokenBlocks(folder, 4096)


def test_a_document_larger_than_a_shard_gets_its_own(tmp_path, tokenizer_folder):
    texts = ["short one", "long " * 200, "short two", "short three"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    folder = run(tmp_path, tmp_path / "a.jsonl", tokenizer_folder, tokens_per_shard=50, validation_tokens=0)
    manifest = read_manifest(folder)
    assert [entry.documents for entry in manifest.shards] == [1, 1, 2]
    assert decoded(folder, "train") == texts
    assert np.dtype(manifest.dtype) == np.uint16


def test_help_shows_every_setting(capsys):
    """A per cent sign in a help text once ended `--help` with a traceback: argparse formats these texts."""
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "default the 1% of documents" in " ".join(shown.split())
    for flag in ("--source", "--near_deduplicate", "--no-deduplicate", "--verify", "--push_to_hub"):
        assert flag in shown
