"""Interrupted, killed, shared out, out of space: the shards come out the same, or the run says why not."""

import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.prepare import PrepareSettings, main, prepare
from data.progress import Clock, Report, Task, Watch
from data.shards import TokenBlocks, read_manifest, read_shard_documents
from data.sources import SourceSpec, list_parts, read_part
from data.tokenizer import gpt2_tokenizer, train_tokenizer
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


def test_a_worker_loads_neither_torch_nor_transformers(tmp_path):
    """They took longer to load than a part takes to encode, in every task of a cluster."""
    code = "import sys, data.engine; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


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
    """gigatoken cuts words before it merges; here the file says not to, and a letter joins the next blank."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "sĠ"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("s", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "source").mkdir()
    for number in range(2):
        text = f"{number} " + "words that fill the part to its size " * 40
        (tmp_path / "source" / f"{number}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    flags = ("--workers", "2", "--validation_tokens", "0")
    done = run(tmp_path / "source", tmp_path / "out", str(tmp_path / "tokenizer"), *flags)
    assert done.returncode == 0, done.stderr
    assert "Encoding with tokenizers, which is slower" in done.stdout
    documents = list(read_shard_documents(tmp_path / "out" / "train-00000.arrow"))
    assert len(documents) == 2
    for ids in documents:
        assert vocab["sĠ"] in ids


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


def kill_tree(process):
    """SIGKILL for the process and all it started, at once, as when a machine goes down."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def test_nothing_of_a_killed_preparation_stays_behind(tmp_path, tokenizer_folder):
    """A server process of datatrove's did, for good, once for each kill."""
    source = write_files(tmp_path / "source", files=4, documents=2000)
    process = subprocess.Popen(
        command(source, tmp_path / "out", tokenizer_folder, "--workers", "2"),
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    family: list[psutil.Process] = []
    while len(family) < 4:  # the server of counters, the workers' own server, two workers
        assert process.poll() is None, "it ended before its workers were seen"
        family = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.01)
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(family, timeout=60)
    assert not [member for member in alive if member.status() != psutil.STATUS_ZOMBIE], (gone, alive)


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


def test_no_permission_to_write_is_one_line(tmp_path, tokenizer_folder):
    """Root may write anywhere, unless it gives up the capability to."""
    source = write_files(tmp_path / "source", files=1, documents=10)
    (tmp_path / "locked").mkdir(mode=0o500)
    prefix = []
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("no setpriv here (Debian: util-linux), and root may write anywhere")
        prefix = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    arguments = command(source, tmp_path / "locked" / "out", tokenizer_folder)
    done = subprocess.run([*prefix, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Permission denied" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_disk_that_fills_in_the_middle_of_a_shard_ends_the_run_with_arithmetic_and_room_is_all_it_needs(
    tmp_path, tokenizer_folder, monkeypatch, capsys
):
    """A limit on the size of files stands for the full disk: each part is small enough, a shard is not."""
    monkeypatch.setattr("data.sources.PART_BYTES", 1000)
    source = write_files(tmp_path / "source", files=4, documents=1000)
    flags = ["--source", str(source), "--tokenizer", tokenizer_folder, "--workers", "1", "--output"]
    assert main([*flags, str(tmp_path / "undisturbed")]) == 0
    capsys.readouterr()
    shard = read_manifest(tmp_path / "undisturbed").of_split("train")[0].bytes
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (shard * 2 // 3, before[1]))
    try:
        status = main([*flags, str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert status == 1
    assert error.count("error: The disk is full") == 1 and "Traceback" not in error
    found = re.search(r"4 of 4 parts are encoded, in ([\d.]+) MB; all will need about ([\d.]+) MB", error)
    assert found and found[1] == found[2] and float(found[1]) * 1e6 > shard
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "train-00000.arrow" not in names and "manifest.json" not in names
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / ".work" / "parts").iterdir()}
    assert len(parts) == 4
    assert main([*flags, str(tmp_path / "out")]) == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "undisturbed")


SMALL_DISK = r"""
set -e
mount -t tmpfs -o size=3m tmpfs "$DISK"
dd if=/dev/zero of="$DISK/other people's files" bs=1k count="$TAKEN" status=none
set +e
"$@" 2> "$LOGS/full.txt"
echo $? > "$LOGS/full.code"
ls "$DISK"/out/*.arrow "$DISK/out/manifest.json" > "$LOGS/full.files" 2>&1
rm "$DISK/other people's files"
"$@" 2> "$LOGS/room.txt"
echo $? > "$LOGS/room.code"
cp -r "$DISK/out" "$LOGS/out"
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "taken, said",
    [
        (2500, r"The disk is full: [\d.]+ MB are free at \S+\. [01] of 2 parts are encoded, in [\d.]+ MB;"),
        (1800, r"too full for the shards: [\d.]+ MB are still to be written to \S+, [\d.]+ MB are free\."),
    ],
    ids=["encoding", "shards"],
)
def test_a_disk_that_is_really_full_ends_the_run_with_arithmetic_and_room_is_all_it_needs(
    tmp_path, tokenizer_folder, taken, said
):
    """A disk of three megabytes in a mount namespace of its own, full in the middle of a part, or of the
    shards.
    """
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    (tmp_path / "disk").mkdir()
    trial = [*unshare, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "disk")]
    if not shutil.which("unshare") or subprocess.run(trial, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a small disk of our own")
    source = write_files(tmp_path / "source", files=2, documents=1500)
    here = run(source, tmp_path / "here", tokenizer_folder)
    assert here.returncode == 0, here.stderr
    logs = tmp_path / "logs"
    logs.mkdir()
    environment = {**os.environ, "DISK": str(tmp_path / "disk"), "LOGS": str(logs), "TAKEN": str(taken)}
    arguments = command(source, tmp_path / "disk" / "out", tokenizer_folder, "--workers", "1")
    shell = [*unshare, "bash", "-c", SMALL_DISK, "bash", *arguments]
    done = subprocess.run(shell, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    full = (logs / "full.txt").read_text()
    assert (logs / "full.code").read_text() == "1\n", full
    assert re.search(said, full), full
    assert "run the same command again" in full.replace("\n", " ")
    assert "Traceback" not in full
    assert (logs / "full.files").read_text().count("No such file") == 2
    assert (logs / "room.code").read_text() == "0\n", (logs / "room.txt").read_text()
    assert hashes(logs / "out") == hashes(tmp_path / "here")


def peak_memory_of_family(process):
    """The largest resident set, in bytes, that any process of the run ever had; seen while it runs."""
    peaks = {}
    while process.poll() is None:
        for member in (psutil.Process(process.pid), *children_of(process.pid)):
            try:
                status = Path(f"/proc/{member.pid}/status").read_text()
                peaks[member.pid] = int(status.partition("VmHWM:")[2].split()[0]) * 1024
            except (OSError, IndexError):
                continue
        time.sleep(0.05)
    return max(peaks.values())


def children_of(pid):
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_a_document_of_50_megabytes_goes_through_and_no_process_takes_a_gigabyte(tmp_path):
    gpt2_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "source").mkdir()
    generator = random.Random(0)
    words = " ".join(PROSE[:3]).split()
    block = " ".join(generator.choices(words, k=170_000))  # about a megabyte
    enormous = "\n".join(f"{number} {block}" for number in range(50))
    assert len(enormous) > 45_000_000
    (tmp_path / "source" / "0.jsonl").write_text(json.dumps({"text": enormous}) + "\n")
    with open(tmp_path / "source" / "1.jsonl", "w") as file:
        for number in range(2000):
            start = generator.randrange(900_000)
            file.write(json.dumps({"text": f"{number} {block[start : start + 10_000]}"}) + "\n")
    process = subprocess.Popen(
        command(tmp_path / "source", tmp_path / "out", str(tmp_path / "tokenizer"), "--workers", "2"),
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    peak = peak_memory_of_family(process)
    assert process.wait() == 0, process.stderr.read()
    assert peak < 1e9
    manifest = read_manifest(tmp_path / "out")
    assert manifest.counts["documents"] == 2001
    longest = max(
        (ids for entry in manifest.shards for ids in read_shard_documents(tmp_path / "out" / entry.file)),
        key=len,
    )
    tokenizer = gpt2_tokenizer()
    assert (
        tokenizer.decode(longest[:20_000].astype(int)) == enormous[: len(tokenizer.decode(longest[:20_000]))]
    )
    assert tokenizer.decode(longest[-1000:-1]) == enormous[-len(tokenizer.decode(longest[-1000:-1])) :]


SELECT = """
import sys, tracemalloc
from pathlib import Path
import numpy as np
import data.selection
from data.parts import ROW

tracemalloc.start()  # a process begins with the peak of its parent, as Linux counts
data.selection.ROWS_AT_ONCE = data.selection.DROPPED_AT_ONCE = 2**16
folder, parts = Path(sys.argv[1]), int(sys.argv[2])
generator = np.random.default_rng(0)
for part in range(parts):
    rows = np.empty(2**17, ROW)
    rows["key"] = generator.integers(0, 2**64, len(rows), dtype=np.uint64)
    rows["key"][::20] = rows["key"][0]  # a page that stands everywhere
    rows["tokens"] = 100
    (folder / f"{part}").mkdir(parents=True)
    rows.tofile(folder / f"{part}" / "rows.bin")
paths = [folder / f"{part}" for part in range(parts)]
selection = data.selection.select_documents(
    paths, folder / "selection", deduplicate=True, validation_tokens=10**6, limit_tokens=None
)
kept = 0
for part in range(parts):
    for first in selection.firsts(part):
        kept += int((selection.rows(part, first)[1] != data.selection.DROPPED).sum())
assert kept == selection.documents - selection.duplicates
print(selection.documents, selection.duplicates, tracemalloc.get_traced_memory()[1])
"""


def test_choosing_among_eight_times_the_documents_takes_the_same_memory(tmp_path):
    """It once took some 50 bytes a document: 180 MB more for the larger of the two."""
    peaks = []
    for parts in (4, 32):
        arguments = [sys.executable, "-c", SELECT, str(tmp_path / f"{parts}"), str(parts)]
        done = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        documents, duplicates, peak = map(int, done.stdout.split())
        assert documents == parts * 2**17
        assert duplicates == parts * len(range(0, 2**17, 20)) - parts
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 5e6


def test_progress_names_the_file_at_hand_of_a_part_of_many(tmp_path):
    """It was the part's first file from beginning to end."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    (part,) = list_parts(SourceSpec(str(tmp_path / "?.txt")))
    names = tuple(map(os.path.basename, part.paths))
    task = Task(tmp_path / "report", tmp_path / "done", "part 00000", part.bytes, names)
    ended = subprocess.Popen(["true"])
    ended.wait()
    counts, seen = Counter(), []
    for _ in read_part(SourceSpec(str(tmp_path)), part, counts):
        report = Report(task.report, (socket.gethostname(), os.getpid()))
        report.state["pid"] = ended.pid  # of a task that was killed right there
        report.advance(1, 10, counts)
        report.write()
        watch = Watch("encoding", [task], show=False)
        watch._look()
        seen.append(watch.lost)
    assert seen == [f"The process at work on part 00000 ({name}) was killed." for name in names]


def test_the_receipts_time_is_that_of_all_runs_together(tmp_path, tokenizer_folder):
    """A file in the way of the shards' receipts stands for whatever ended the first run."""
    source = write_files(tmp_path / "source", files=1, documents=50)
    settings = PrepareSettings(str(source), str(tmp_path / "out"), tokenizer=tokenizer_folder)
    obstacle = tmp_path / "out" / ".work" / "shards"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("")
    started = time.monotonic()
    with pytest.raises(OSError):
        prepare(settings, progress=False)
    first = time.monotonic() - started
    obstacle.unlink()
    (obstacle.parent / "elapsed_seconds").write_text(f"{1000 + first:.1f}")  # as after a long first run
    folder = prepare(settings, progress=False)
    seconds = read_manifest(folder).elapsed_seconds
    assert round(1000 + first, 1) <= seconds <= 1000 + time.monotonic() - started + 0.2  # kept in tenths


def test_a_killed_runs_time_is_noted_while_it_works(tmp_path):
    with Clock(tmp_path / "seconds"):
        while not (tmp_path / "seconds").exists():
            time.sleep(0.01)
        noted = float((tmp_path / "seconds").read_text())
        assert noted > 0.5
        assert noted <= Clock(tmp_path / "seconds").seconds
