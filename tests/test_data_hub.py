"""Datasets of the Hub through the real clients, against a loopback server that is not always well."""

import io
import os
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest

from data.prepare import PrepareSettings, prepare
from data.shards import TokenBlocks, read_manifest
from tests.hub_server import HubServer
from tests.test_data_resilience import REPOSITORY, hashes, run, tokenizer_folder
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
import sys
from data.prepare import main

if __name__ == "__main__":
    output, back = sys.argv[1:]
    assert main(["--output", output, "--push_to_hub", "user/shards"]) == 0
    assert main(["--source", "hub:user/shards", "--output", back]) == 0
"""


def test_a_set_is_pushed_and_taken_back(tmp_path, local):
    with HubServer({}) as hub:
        done = subprocess.run(
            [sys.executable, "-c", PUSH_AND_TAKE, local, tmp_path / "back"],
            cwd=REPOSITORY,
            env={**environment(hub, tmp_path), "HF_TOKEN": "hf_loopback"},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr + "\n".join(map(str, hub.served))
    assert hashes(tmp_path / "back") == hashes(local)
    assert TokenBlocks(tmp_path / "back", 64, check_hashes=True)[0]


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
