"""Datasets of the Hub through the real clients, against a loopback server that is not always well."""

import base64
import contextlib
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet
import pytest

from data.prepare import PrepareSettings, prepare
from data.shards import TokenBlocks, read_manifest, read_shard_documents
from tests.hub_server import COMMIT, HubServer
from tests.test_data_resilience import REPOSITORY, command, hashes, kill_tree, run, tokenizer_folder
from tests.test_data_tokenizer import PROSE

__all__ = ["tokenizer_folder"]  # a fixture


def parquet_file(seed, rows=600):
    """A Parquet file with FineWeb-Edu's columns, in several row groups."""
    generator = random.Random(seed)
    words = " ".join(PROSE[:3]).split()
    texts = [f"{seed}.{row} " + " ".join(generator.choices(words, k=80)) for row in range(rows)]
    table = pa.table(
        {
            "text": texts,
            "id": [f"<urn:uuid:{seed}-{row}>" for row in range(rows)],
            "dump": ["CC-MAIN-2024-10"] * rows,
            "url": [f"https://example.org/{seed}/{row}" for row in range(rows)],
            "date": ["2024-02-21T00:00:00Z"] * rows,
            "file_path": ["s3://commoncrawl/x.warc.gz"] * rows,
            "language": ["en"] * rows,
            "language_score": [0.9] * rows,
            "token_count": [100] * rows,
        }
    )
    buffer = io.BytesIO()
    pa.parquet.write_table(table, buffer, row_group_size=100)
    return buffer.getvalue()


CARD = b"""---
configs:
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
- config_name: default
  data_files:
  - split: train
    path: data/*
---
# Educational pages
"""


def files():
    return {
        "README.md": CARD,
        "sample/10BT/000_00000.parquet": parquet_file(0),
        "sample/10BT/001_00000.parquet": parquet_file(1),
        "data/other.parquet": parquet_file(2),
    }


def environment(hub, tmp_path):
    quick = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return {
        **os.environ,
        **quick,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_DATASETS_OFFLINE": "0",
        "NO_PROXY": "*",
    }


@pytest.fixture
def local(tmp_path, tokenizer_folder):
    """The same files from the disk: what the Hub must give too."""
    source = tmp_path / "source"
    source.mkdir()
    for number, name in enumerate(["sample/10BT/000_00000.parquet", "sample/10BT/001_00000.parquet"]):
        (source / f"{number}.parquet").write_bytes(files()[name])
    settings = PrepareSettings(str(source), str(tmp_path / "local"), tokenizer=tokenizer_folder)
    return prepare(settings, progress=False)


def test_a_hub_dataset_gives_the_shards_of_its_files_whatever_the_server_goes_through(
    tmp_path, tokenizer_folder, local
):
    troubles = (429, 503, "cut", 500, 429, "cut", 502, "cut")
    with HubServer({"HuggingFaceFW/fineweb-edu": files()}, troubles, seed=3) as hub:
        done = run("fineweb-edu", tmp_path / "out", tokenizer_folder, env=environment(hub, tmp_path))
        assert done.returncode == 0, done.stderr + "\n".join(map(str, hub.served[-20:]))
        assert not hub.troubles, "the server was meant to be in trouble more often"
    assert hashes(tmp_path / "out") == hashes(local)
    assert TokenBlocks(tmp_path / "out", 64, check_hashes=True)[0]
    manifest = read_manifest(tmp_path / "out")
    assert manifest.counts["documents"] == 1200
    assert manifest.contamination is None
    assert "will not be compared with HellaSwag's questions" in done.stdout
    assert not any("data/other" in path and method == "GET" for method, path, _ in hub.served)
    sizes = [len(content) for name, content in files().items() if name.startswith("sample/")]
    names = "sample/10BT/000_00000.parquet\nsample/10BT/001_00000.parquet"
    assert manifest.origin == {
        "dataset": "HuggingFaceFW/fineweb-edu",
        "config": "sample-10BT",
        "split": "train",
        "commit": COMMIT,
        "files": 2,
        "bytes": sum(sizes),
        "files_sha256": hashlib.sha256(names.encode()).hexdigest(),
    }
    assert "Trying again in" in done.stderr


FIRST, SECOND = "000_00000", "001_00000"


def test_a_server_that_does_not_answer_is_asked_again(tmp_path, tokenizer_folder, local):
    """Three requests for the second file hang until the test is over; the client's patience is a second."""
    hanging = {f"GET .*{SECOND}": ["hang"] * 3}
    with HubServer({"HuggingFaceFW/fineweb-edu": files()}, scripted=hanging) as hub:
        there = {**environment(hub, tmp_path), "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
        done = run("fineweb-edu", tmp_path / "out", tokenizer_folder, "--workers", "1", env=there)
        assert done.returncode == 0, done.stderr + "\n".join(map(str, hub.served[-20:]))
        assert hub.hanging.is_set() and not hub.scripted[f"GET .*{SECOND}"], "it was asked more often"
    assert hashes(tmp_path / "out") == hashes(local)


@contextlib.contextmanager
def stuck_at_the_second_file(tmp_path, tokenizer_folder, on_interrupt=signal.SIG_DFL):
    """(hub, the command's process, its arguments): a part is encoded, the other waits for the Hub.

    `on_interrupt` is what a Ctrl-C would do to the process: SIG_IGN in what a shell starts with `&`.
    """
    with HubServer({"HuggingFaceFW/fineweb-edu": files()}, scripted={f"GET .*{SECOND}": ["hang"]}) as hub:
        arguments = ("fineweb-edu", tmp_path / "out", tokenizer_folder, "--workers", "2")
        there = {**environment(hub, tmp_path), "HF_HUB_DOWNLOAD_TIMEOUT": "600"}
        process = subprocess.Popen(
            command(*arguments),
            cwd=REPOSITORY,
            env=there,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, on_interrupt),
        )
        try:
            while not (hub.hanging.is_set() and (tmp_path / "out" / ".work" / "parts" / "00000").exists()):
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.05)
            yield hub, process, arguments
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_an_interrupted_run_goes_on_at_the_commit_that_it_began_with(tmp_path, tokenizer_folder, local):
    """A README that someone edits on the Hub ended a run of days: its paths hold the commit, and were
    compared.
    """
    with stuck_at_the_second_file(tmp_path, tokenizer_folder) as (hub, process, arguments):
        kill_tree(process)
        changed = {"README.md": CARD + b"More words.", "sample/10BT/002_00000.parquet": parquet_file(7)}
        operations = [
            {"key": "file", "value": {"path": path, "content": base64.b64encode(content)}}
            for path, content in changed.items()
        ]
        hub.snapshots["HuggingFaceFW/fineweb-edu", COMMIT] = files()
        assert hub.commit("HuggingFaceFW/fineweb-edu", "main", operations) != COMMIT
        hub.served.clear()
        done = run(*arguments, env=environment(hub, tmp_path))
        assert done.returncode == 0, done.stderr + "\n".join(map(str, hub.served[-20:]))
    assert "Going on with the unfinished preparation" in done.stdout
    assert hashes(tmp_path / "out") == hashes(local)
    assert read_manifest(tmp_path / "out").origin["commit"] == COMMIT
    bodies = [path for method, path, _ in hub.served if method == "GET" and ".parquet" in path]
    encoded_again = [path for path in bodies if SECOND not in path]
    assert len(encoded_again) <= 2, "the first part is looked into, to compare the encoders, and not read"


def test_ctrl_c_is_one_line_that_says_what_is_kept_and_how_to_go_on(tmp_path, tokenizer_folder, local):
    """To the whole group of processes, as a terminal sends it: each of the workers printed a traceback."""
    with stuck_at_the_second_file(tmp_path, tokenizer_folder) as (hub, process, arguments):
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 130, errors
        assert "Interrupted: 1 of 2 parts are encoded; the same command goes on from there." in errors
        assert "Traceback" not in errors
        done = run(*arguments, env=environment(hub, tmp_path))
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "out") == hashes(local)


def test_a_worker_that_is_killed_ends_the_run_with_a_reason_and_the_next_run_goes_on(
    tmp_path, tokenizer_folder, local
):
    """A pool of processes waits for ever for the result of one that the kernel killed for memory.

    The other part is done by then, so that nothing else wakes the pool; and Ctrl-C is ignored. The run once
    waited for ever in either case.
    """
    with stuck_at_the_second_file(tmp_path, tokenizer_folder, signal.SIG_IGN) as (hub, process, arguments):
        progress = tmp_path / "out" / ".work" / "parts" / "00001.progress"
        os.kill(json.loads(progress.read_text())["pid"], signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert (
            f"The process at work on part 00001 ({SECOND}.parquet) was killed. Other parts are kept" in errors
        )
        assert not (tmp_path / "out" / "manifest.json").exists()
        done = run(*arguments, env=environment(hub, tmp_path))
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "out") == hashes(local)


# The Hub's client waits between its own attempts, too.
IMPATIENT = """
import sys, time
import data.remote
from data.prepare import main

time.sleep = lambda seconds: None
data.remote.RETRY_SECONDS = (0, 0)
sys.exit(main())
"""


@pytest.mark.parametrize(
    "status, complaint",
    [
        (401, "may not be read with the credentials at hand"),
        (403, "accept its terms where it has some"),
        (404, "parquet is not there ("),
        (503, "cannot be read (HfHubHTTPError"),
    ],
)
def test_a_file_that_the_hub_refuses_or_cannot_give_is_not_called_damaged(
    tmp_path, tokenizer_folder, status, complaint
):
    """It was "not a whole Parquet file"."""
    refusals = {f"GET .*{FIRST}": [status] * 99}
    with HubServer({"HuggingFaceFW/fineweb-edu": files()}, scripted=refusals) as hub:
        flags = ["--source", "fineweb-edu", "--output", tmp_path / "out", "--tokenizer", tokenizer_folder]
        done = subprocess.run(
            [sys.executable, "-c", IMPATIENT, *map(str, flags), "--workers", "1"],
            cwd=REPOSITORY,
            env=environment(hub, tmp_path),
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 1
    error = done.stderr[done.stderr.index("error: ") :]
    assert complaint in error and FIRST in error and error.count("\n") == 1, error
    assert "whole" not in error


@pytest.mark.slow
def test_a_dataset_or_split_that_does_not_exist_is_named(tmp_path, tokenizer_folder):
    with HubServer({"HuggingFaceFW/fineweb-edu": files()}) as hub:
        missing = run("hub:nobody/nothing", tmp_path / "a", tokenizer_folder, env=environment(hub, tmp_path))
        assert missing.returncode == 1
        assert "Cannot open the Hub dataset 'nobody/nothing'" in missing.stderr
        split = run(
            "fineweb-edu", tmp_path / "b", tokenizer_folder, "--split", "test", env=environment(hub, tmp_path)
        )
        assert split.returncode == 1
        assert "has no split 'test'; it has train" in split.stderr


@pytest.mark.slow
def test_a_source_can_be_looked_at_without_fetching_it(tmp_path, tokenizer_folder):
    with HubServer({"HuggingFaceFW/fineweb-edu": files()}) as hub:
        planned = run(
            "fineweb-edu", tmp_path / "out", tokenizer_folder, "--plan", env=environment(hub, tmp_path)
        )
    assert planned.returncode == 0, planned.stderr
    assert "2 files" in planned.stdout
    assert "000_00000.parquet" in planned.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_set_goes_to_the_hub_and_comes_back_whole(tmp_path, local):
    with HubServer({}) as hub:
        there = {**environment(hub, tmp_path), "HF_TOKEN": "hf_loopback"}
        pushed = command_line("--output", local, "--push_to_hub", "user/shards", env=there)
        assert pushed.returncode == 0, pushed.stderr + "\n".join(map(str, hub.served))
        files = hub.repositories["user/shards"]
        assert files["train-00000.arrow"] == (local / "train-00000.arrow").read_bytes()
        card = files["README.md"].decode()
        assert "path: train-*.arrow" in card
        assert f"{read_manifest(local).tokens():,} tokens" in card
        back = command_line("--source", "hub:user/shards", "--output", tmp_path / "back", env=there)
        assert back.returncode == 0, back.stderr + "\n".join(map(str, hub.served))
        again = command_line("--source", "hub:user/shards", "--output", tmp_path / "back", env=there)
        assert "nothing to do" in again.stdout
        files["train-00000.arrow"] = files["train-00000.arrow"][:-1] + b"x"
        damaged = command_line("--source", "hub:user/shards", "--output", tmp_path / "bad", env=there)
    assert (tmp_path / "back" / "manifest.json").read_bytes() == (local / "manifest.json").read_bytes()
    assert TokenBlocks(tmp_path / "back", 64, check_hashes=True)[0]
    assert damaged.returncode == 1
    assert "train-00000.arrow" in damaged.stderr
    assert not (tmp_path / "bad").exists()


PUSH_AND_TAKE = """
import sys, time
import datasets
import data.remote
from data.prepare import main

if __name__ == "__main__":
    data.remote.RETRY_SECONDS = (0,) * 8
    time.sleep = lambda seconds: None  # the Hub's client tries again, too
    many, one, back = sys.argv[1:]
    assert main(["--output", many, "--push_to_hub", "user/shards"]) == 0
    for split, rows in datasets.load_dataset("user/shards").items():
        print(split, len(rows), rows[0]["input_ids"])
    for split, rows in datasets.load_dataset("user/shards", streaming=True).items():
        print(split, sum(1 for _ in rows), next(iter(rows))["input_ids"])
    assert main(["--output", one, "--push_to_hub", "user/shards"]) == 0
    assert main(["--source", "hub:user/shards", "--output", back]) == 0
"""


def test_a_set_is_pushed_loaded_replaced_by_one_of_fewer_shards_and_taken_back(
    tmp_path, local, tokenizer_folder
):
    """The shards that the second has no more of stayed there: whoever took it found files that were not its
    own, and `load_dataset` read them as its documents. Uploads that failed were not tried again.
    """
    source = str(tmp_path / "source")
    settings = PrepareSettings(source, str(tmp_path / "many"), tokenizer_folder, tokens_per_shard=30_000)
    many = prepare(settings, progress=False)
    assert len(read_manifest(many).of_split("train")) > 3 > len(read_manifest(local).of_split("train"))
    troubles = {
        r"PUT /lfs/": [500] * 12,  # more than the client takes by itself, which then raises a RuntimeError
        r"POST /api/datasets/user/shards/commit": [500, 429],
        r"POST .*/user/shards.git/info/lfs": [503],
        r"POST /api/repos/create": [500],
        r"(HEAD|GET) .*manifest\.json": [503] * 12,
    }
    with HubServer({}, scripted=troubles) as hub:
        done = subprocess.run(
            [sys.executable, "-c", PUSH_AND_TAKE, many, local, tmp_path / "back"],
            cwd=REPOSITORY,
            env={**environment(hub, tmp_path), "HF_TOKEN": "hf_loopback"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        files = hub.repositories.get("user/shards", {})
    assert done.returncode == 0, done.stderr + "\n".join(map(str, hub.served))
    for split in ("train", "validation"):
        entry = read_manifest(many).of_split(split)[0]
        first = next(read_shard_documents(many / entry.file)).tolist()
        documents = read_manifest(many).documents(split)
        assert done.stdout.count(f"{split} {documents} {first}") == 2, done.stdout
    assert not any(hub.scripted.values()), hub.scripted
    shards = {entry.file for entry in read_manifest(local).shards}
    assert {path for path in files if path.endswith(".arrow")} == shards
    assert hashes(tmp_path / "back") == hashes(local)
    assert TokenBlocks(tmp_path / "back", 64, check_hashes=True)[0]
    card = files["README.md"].decode()
    assert "Evaluation questions were not looked for in the corpus." in card
    assert f"| origin: files_sha256 | {read_manifest(local).origin['files_sha256']} |" in card


def test_a_hub_that_is_switched_off_is_not_waited_for(tmp_path, tokenizer_folder):
    """Four minutes of silence, from waits for what cannot come."""
    there = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    for source in ("fineweb-edu", "hub:user/shards"):
        done = run(source, tmp_path / "out", tokenizer_folder, env=there)
        assert done.returncode == 1
        assert "offline mode is enabled" in done.stderr and "Trying again" not in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


def test_finished_shards_of_the_hub_need_no_network(tmp_path, tokenizer_folder):
    source = {"README.md": CARD, "sample/10BT/000_00000.parquet": parquet_file(0)}
    arguments = ("hub:user/pages", tmp_path / "out", tokenizer_folder, "--config", "sample-10BT")
    with HubServer({"user/pages": source}) as hub:
        done = run(*arguments, env=environment(hub, tmp_path))
        assert done.returncode == 0, done.stderr
    again = run(*arguments, env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")})
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True), again.stderr


def test_a_dataset_of_files_that_only_datasets_reads_is_pinned_too(tmp_path, tokenizer_folder):
    table = "text,number\n" + "".join(f'"Room {n} of the keep, and its door.",{n}\n' for n in range(40))
    card = b"---\nconfigs:\n- config_name: rooms\n  data_files:\n  - split: train\n    path: data.csv\n---\n"
    with HubServer({"user/table": {"README.md": card, "data.csv": table.encode()}}) as hub:
        done = run("hub:user/table", tmp_path / "out", tokenizer_folder, env=environment(hub, tmp_path))
    assert done.returncode == 0, done.stderr + "\n".join(map(str, hub.served))
    manifest = read_manifest(tmp_path / "out")
    assert manifest.counts["documents"] == 40
    assert manifest.origin == {"dataset": "user/table", "config": "rooms", "split": "train", "commit": COMMIT}


def wikitext_file(first):
    rows = [
        row for n in range(first, first + 40) for row in ("", f" = Room {n} = \n", f" It has {n} doors . \n")
    ]
    buffer = io.BytesIO()
    pa.parquet.write_table(pa.table({"text": rows}), buffer)
    return buffer.getvalue()


@pytest.mark.slow
def test_wikitext_comes_from_the_hub_as_articles_and_is_compared_with_hellaswag(tmp_path, tokenizer_folder):
    card = b"""---
configs:
- config_name: wikitext-103-raw-v1
  data_files:
  - split: train
    path: wikitext-103-raw-v1/train-*
---
"""
    files = {"README.md": card}
    files |= {f"wikitext-103-raw-v1/train-0000{n}-of-00002.parquet": wikitext_file(40 * n) for n in range(2)}
    question = {
        "ctx_a": "It is dark.",
        "ctx_b": "",
        "ctx": "It is dark.",
        "activity_label": "x",
        "label": "0",
    }
    question |= {"ind": 1, "split": "val", "split_type": "indomain", "source_id": "activitynet~v_1"}
    buffer = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist([{**question, "endings": list("abcd")}] * 3), buffer)
    questions = {"data/validation-00000-of-00001.parquet": buffer.getvalue()}
    with HubServer({"Salesforce/wikitext": files, "Rowan/hellaswag": questions}) as hub:
        done = run("wikitext", tmp_path / "out", tokenizer_folder, env=environment(hub, tmp_path))
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "out")
    assert manifest.counts["documents"] == 80
    assert manifest.contamination["questions"] == 3
    assert manifest.contamination["questions_from"] == "hellaswag"


def command_line(*arguments, env):
    command = [sys.executable, "-m", "data.prepare", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120)
