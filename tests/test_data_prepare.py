"""`python -m data.prepare`: what it writes, what it refuses, and that it goes on where it stopped."""

import argparse
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
import pytest
from hypothesis import strategies as st

from data.parts import content_key
from data.prepare import PrepareSettings, main, prepare
from data.readers import cut_text
from data.shards import ShardError, TokenBlocks, read_manifest, read_shard_documents
from data.tokenizer import gpt2_tokenizer, load_tokenizer, train_tokenizer
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
    assert sorted(everything) == sorted(cut_text(content))


def test_a_text_too_short_to_divide_is_refused_with_advice_that_helps(tmp_path, tokenizer_folder):
    (tmp_path / "a.txt").write_text(" ".join(PROSE))
    with pytest.raises(
        ValueError, match=r"leaves nothing to train on.*1 different doc.*Give more or smaller"
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


def test_training_documents_stay_training_documents_when_the_source_grows(tmp_path, tokenizer_folder):
    write_corpus(tmp_path / "b.jsonl")
    small = run(tmp_path, tmp_path / "b.jsonl", tokenizer_folder, "small", validation_tokens=600)
    write_corpus(tmp_path / "a.jsonl", seed=1)
    grown = run(tmp_path, tmp_path / "?.jsonl", tokenizer_folder, "grown", validation_tokens=600)
    assert not set(decoded(small, "train")) & set(decoded(grown, "validation"))


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


def test_questions_with_a_passage_in_the_corpus_are_counted(tmp_path, tokenizer_folder):
    """13 words in a row, whatever the case and punctuation; 12 are not enough."""
    question = {"ctx_b": "", "ind": 1, "activity_label": "Caving", "split": "val", "split_type": "indomain"}
    question |= {"source_id": "activitynet~v_1", "label": 1}
    passages = [
        "A man climbs down a rope into a dark and narrow shaft of stone. He",
        "A woman lights a lamp and walks through the flooded gallery below the mill. She",
        "Two boys roll a heavy barrel along the pier while gulls are watching them. They",
    ]
    rows = []
    for index, passage in enumerate(passages):
        endings = ["sings loudly.", "rests awhile.", "falls asleep.", "goes home."]
        rows.append({**question, "ind": index, "ctx_a": passage, "ctx": passage, "endings": endings})
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = write_corpus(tmp_path / "a.jsonl")
    whole = "It says: a MAN climbs down a rope, into a dark and narrow shaft of stone! Then"
    twelve = "a woman lights a lamp and walks through the flooded gallery below nothing"
    with open(tmp_path / "a.jsonl", "a") as file:
        for text in (whole, twelve, *(text.upper() for text in texts[:2])):
            file.write(json.dumps({"text": text}) + "\n")
    questions = str(tmp_path / "questions.jsonl")
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


def test_flags_that_are_missing_are_named(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "--source and --output" in capsys.readouterr().err


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


# ---- verification


@pytest.fixture
def finished(tmp_path, corpus, tokenizer_folder):
    return run(tmp_path, corpus, tokenizer_folder, tokens_per_shard=1000)


def damage_bit(folder):
    path = folder / "train-00001.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def damage_manifest(folder):
    fields = json.loads((folder / "manifest.json").read_text())
    fields["shards"][0]["documents"] += 1
    (folder / "manifest.json").write_text(json.dumps(fields))


def damage_tokenizer(folder):
    shutil.rmtree(folder / "tokenizer")
    gpt2_tokenizer().save_pretrained(folder / "tokenizer")


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (damage_bit, r"train-00001\.arrow: its bytes have changed"),
        (
            lambda folder: os.truncate(folder / "train-00000.arrow", 99),
            r"train-00000\.arrow has 99 bytes instead",
        ),
        (lambda folder: (folder / "train-00001.arrow").unlink(), r"train-00001\.arrow is missing"),
        (lambda folder: (folder / "x.arrow").write_bytes(b""), r"x\.arrow is not in manifest\.json"),
        (damage_manifest, r"train-00000\.arrow: it holds \d+ documents of"),
        (damage_tokenizer, r"tokenizer/: The shards were made with"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), r"tokenizer/: No tokenizer at"),
        (
            lambda folder: os.replace(folder / "train-00001.arrow", folder / "train-00000.arrow"),
            r"train-00000\.arrow.*\n?.*train-00001\.arrow is missing",
        ),
    ],
)
def test_verification_names_what_is_wrong(finished, capsys, damage, complaint):
    assert main(["--verify", str(finished)]) == 0
    assert "is whole" in capsys.readouterr().out
    damage(finished)
    assert main(["--verify", str(finished)]) == 1
    assert re.search(complaint, capsys.readouterr().err)


def test_a_manifest_of_another_set_is_found(tmp_path, finished, tokenizer_folder, capsys):
    write_corpus(tmp_path / "other.jsonl", seed=5)
    other = run(tmp_path, tmp_path / "other.jsonl", tokenizer_folder, "other", tokens_per_shard=1000)
    shutil.copy(other / "manifest.json", finished / "manifest.json")
    with pytest.raises(ShardError, match=r"train-00002\.arrow has .* bytes instead of"):
        TokenBlocks(finished, 16)


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
    assert "1% but at most" in " ".join(shown.split())
    for flag in ("--source", "--near_deduplicate", "--no-deduplicate", "--verify", "--push_to_hub"):
        assert flag in shown
