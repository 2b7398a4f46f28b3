"""Interrupted, killed, shared out, out of space: the shards come out the same, or the run says why not."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.shards import TokenBlocks, read_manifest, read_shard_documents
from data.tokenizer import train_tokenizer
from tests.test_data_tokenizer import PROSE

REPOSITORY = Path(__file__).resolve().parent.parent


def write_files(folder, files=6, documents=400):
    """Several files with copies within and across them; each becomes a part of its own in `small_parts`."""
    folder.mkdir()
    generator = random.Random(0)
    words = " ".join(PROSE[:3]).split()
    for number in range(files):
        with open(folder / f"{number}.jsonl", "w") as file:
            for _ in range(documents):
                seed = generator.randrange(files * documents)  # drawn with repetition: copies everywhere
                text = f"{seed} " + " ".join(random.Random(seed).choices(words, k=60))
                file.write(json.dumps({"text": text}) + "\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(PROSE, 400).save_pretrained(folder)
    return str(folder)


def hashes(folder):
    return [(entry.file, entry.sha256) for entry in read_manifest(folder).shards]


def command(source, output, tokenizer_folder, *flags):
    """The real command in a process of its own, with parts of one small file each."""
    code = (
        "import sys, data.sources; data.sources.PART_BYTES = 1000\n"
        "if __name__ == '__main__':\n    from data.prepare import main; sys.exit(main())"
    )
    arguments = ["--source", str(source), "--output", str(output), "--tokenizer", tokenizer_folder, *flags]
    return [sys.executable, "-c", code, *arguments]


def run(*arguments, **options):
    return subprocess.run(
        command(*arguments), cwd=REPOSITORY, capture_output=True, text=True, timeout=300, **options
    )


def test_the_number_of_workers_changes_no_byte(tmp_path, tokenizer_folder):
    source = write_files(tmp_path / "source")
    for workers in ("1", "3"):
        flags = ("--workers", workers, "--tokens_per_shard", "20000")
        done = run(source, tmp_path / workers, tokenizer_folder, *flags)
        assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "1") == hashes(tmp_path / "3")
    manifest = read_manifest(tmp_path / "1")
    assert len(manifest.of_split("train")) > 2
    assert manifest.counts["documents"] == 2400
    assert 0 < manifest.counts["duplicates"] == 2400 - manifest.documents()


@pytest.mark.slow
def test_a_tokenizer_on_which_the_encoders_disagree_is_encoded_slowly_by_every_worker(tmp_path):
    """tiktoken joins any two neighbours that make a word; here the file allows q+zj but not qz+j."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "qz", "zj", "qzj"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("q", "z"), ("z", "j"), ("q", "zj")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "source").mkdir()
    for number in range(2):
        text = f"{number} qzj " + "words that fill the part to its size " * 40
        (tmp_path / "source" / f"{number}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    flags = ("--workers", "2", "--validation_tokens", "0")
    done = run(tmp_path / "source", tmp_path / "out", str(tmp_path / "tokenizer"), *flags)
    assert done.returncode == 0, done.stderr
    assert "Encoding with tokenizers, which is slower" in done.stdout
    documents = list(read_shard_documents(tmp_path / "out" / "train-00000.arrow"))
    assert len(documents) == 2
    for ids in documents:
        assert vocab["qz"] in ids
        assert vocab["qzj"] not in ids


@pytest.mark.slow
def test_a_token_limit_changes_nothing_with_the_number_of_workers(tmp_path, tokenizer_folder):
    source = write_files(tmp_path / "source")
    for workers in ("1", "2"):
        done = run(
            source, tmp_path / workers, tokenizer_folder, "--workers", workers, "--limit_tokens", "50000"
        )
        assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")
    assert read_manifest(tmp_path / "1").counts["documents"] < 2400


def test_a_worker_that_is_killed_ends_the_run_with_a_reason_and_the_next_run_goes_on(
    tmp_path, tokenizer_folder
):
    """A pool of processes waits for ever for the result of one that the kernel killed for memory.

    The other part is done by then, so that nothing else wakes the pool; and Ctrl-C is ignored, as in what a
    shell starts with `&`. The run once waited for ever in either case.
    """
    source = write_files(tmp_path / "source", files=1, documents=10)
    lines = (f"{number} " + " ".join(PROSE[:3]) for number in range(8_000))
    (source / "1.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    output = tmp_path / "out"
    arguments = (source, output, tokenizer_folder, "--workers", "2")
    process = subprocess.Popen(
        command(*arguments),
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    parts = output / ".work" / "parts"
    while not (parts / "00001.progress").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    victim = json.loads((parts / "00001.progress").read_text())["pid"]
    os.kill(victim, signal.SIGSTOP)  # so that it is in the middle of its part however long the rest takes
    while not (parts / "00000").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    assert not (parts / "00001").exists()
    os.kill(victim, signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "was killed. Other parts are kept: run the same command again" in errors
    assert not (output / "manifest.json").exists()
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert TokenBlocks(output, 64, check_hashes=True)[0]


def kill_tree(process):
    """SIGKILL for the process and all it started, at once, as when a machine goes down."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def seen_below(folder):
    """What a preparation has done to its files so far: a rewritten one counts again.

    os.walk, not rglob: a folder that is renamed between its listing and its turn is passed over.
    """
    found = set()
    for parent, folders, files in os.walk(folder):
        for name in folders + files:
            try:
                found.add((name, os.stat(os.path.join(parent, name)).st_mtime_ns))
            except FileNotFoundError:  # renamed or deleted in between
                continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)  # thirty-odd runs of the command
def test_twenty_kills_at_random_moments_change_no_byte(tmp_path, tokenizer_folder):
    """Moments are counted in files that appear, not in seconds: a run is killed after its n-th change."""
    source = write_files(tmp_path / "source", files=8, documents=2000)
    arguments = (tokenizer_folder, "--workers", "2", "--tokens_per_shard", "100000")
    done = run(source, tmp_path / "undisturbed", *arguments)
    assert done.returncode == 0, done.stderr
    generator = random.Random(1)
    output = tmp_path / "killed"
    kills = 0
    while kills < 20:
        process = subprocess.Popen(
            command(source, output, *arguments), cwd=REPOSITORY, stderr=subprocess.DEVNULL
        )
        before, changes = seen_below(output), generator.randint(1, 25)
        while process.poll() is None:
            if len(seen_below(output) - before) >= changes:
                # Half of the times its workers live on for a moment, and meet those of the next run.
                kill_tree(process) if generator.random() < 0.5 else process.kill()
                process.wait()
                kills += 1
            time.sleep(0.005)
        for shard in output.glob("*.arrow"):  # whatever has its final name is whole
            assert pa.ipc.open_stream(pa.memory_map(str(shard))).read_all().num_rows > 0
        if (output / "manifest.json").exists():
            assert hashes(output) == hashes(tmp_path / "undisturbed")
            shutil.rmtree(output)
    done = run(source, output, *arguments)
    assert done.returncode == 0, done.stderr
    assert hashes(output) == hashes(tmp_path / "undisturbed")
    assert TokenBlocks(output, 64, check_hashes=True)[0]


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_arithmetic_and_the_next_run_goes_on(tmp_path, tokenizer_folder):
    """A limit on the size of files stands for the full disk: the system refuses a write in the middle of
    one.
    """
    source = write_files(tmp_path / "source", files=2, documents=3000)

    def limit_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    arguments = (source, tmp_path / "out", tokenizer_folder, "--workers", "1")
    done = run(*arguments, preexec_fn=limit_files)
    assert done.returncode == 1
    assert "The disk is full" in done.stderr
    assert "MB are free at" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("*.arrow"))
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert TokenBlocks(tmp_path / "out", 64, check_hashes=True)[0]


@pytest.mark.slow
def test_two_processes_on_one_output_cannot_both_write(tmp_path, tokenizer_folder):
    source = write_files(tmp_path / "source", files=2, documents=3000)
    arguments = (source, tmp_path / "out", tokenizer_folder, "--workers", "1")
    both = [
        subprocess.Popen(
            command(*arguments), cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    results = [(process.communicate(timeout=120), process.returncode) for process in both]
    outcomes = sorted(code for _, code in results)
    # The slower one is refused, or finds the work done if it began after the other had finished.
    assert outcomes[0] == 0
    for (out, err), code in results:
        assert code == 0 or "Another process is preparing" in err, err + out
    assert TokenBlocks(tmp_path / "out", 64, check_hashes=True)[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_to_write_is_one_line(tmp_path, tokenizer_folder):
    source = write_files(tmp_path / "source", files=1, documents=10)
    (tmp_path / "locked").mkdir(mode=0o500)
    done = run(source, tmp_path / "locked" / "out", tokenizer_folder)
    assert done.returncode == 1
    assert "Permission denied" in done.stderr
    assert "Traceback" not in done.stderr
