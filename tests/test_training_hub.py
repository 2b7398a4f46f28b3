"""Runs that push themselves to a loopback Hub with the real client, whatever the Hub goes through."""

import hashlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_finetune_runs import SIZES, room
from test_finetune_runs import TOY as FINETUNE_TOY
from training_toys import (
    ROOT,
    as_flags,
    environment,
    train_command,
    train_flags_here,
    write_toy_shards,
)

from data.tokenizer import train_tokenizer
from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from tests.gated import wait_until
from tests.hub_server import HubServer, card_problems
from training.checkpoint import complete_checkpoints
from training.finetuning import FinetuneSettings
from training.publishing import has_ended
from training.recipe import TrainSettings
from training.settings import SettingsError, parse_settings

TOKEN = "hf_" + "secret" * 5
PUSH = {"push_to_hub": "true", "hub_model_id": "user/toy"}

LOAD_ELSEWHERE = """
import hashlib, sys
from huggingface_hub import hf_hub_download
from transformers import AutoModelForCausalLM, pipeline
model = AutoModelForCausalLM.from_pretrained("user/toy", trust_remote_code=True)
generate = pipeline("text-generation", model="user/toy", trust_remote_code=True)
assert generate("The", max_new_tokens=4)[0]["generated_text"].startswith("The")
assert "modeling_gpt_scratch" not in sys.modules, "the class came from the repository, not from the Hub"
print(hashlib.sha256(open(hf_hub_download("user/toy", "model.safetensors"), "rb").read()).hexdigest())
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_toy_shards(tmp_path_factory.mktemp("toy"))


def at_the_hub(hub, folder: Path, token: str | None = TOKEN) -> dict[str, str]:
    """An environment that knows this Hub, with an empty cache of its own."""
    kept = {name: value for name, value in environment().items() if name != "HF_TOKEN"}
    there = {
        "HF_ENDPOINT": hub if isinstance(hub, str) else hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder),
        "NO_PROXY": "*",
    }
    return {**kept, **there, **({"HF_TOKEN": token} if token else {})}


def run(env, *launch, **settings) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        train_command(*launch, **settings),
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(settings["run_dir"]).parent,
    )


@contextmanager
def nobody() -> Iterator[str]:
    """An address at which nobody listens, nor ever will: the port is taken, and deaf."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{deaf.getsockname()[1]}"


def test_wrong_settings_for_the_hub_are_named_all_at_once():
    def complaint(*flags, cls=TrainSettings):
        with pytest.raises(SettingsError) as caught:
            parse_settings(cls, list(flags))
        return str(caught.value)

    assert "push_to_hub needs a hub_model_id" in complaint("--push_to_hub")
    for name in ("crypt", "user/a/b", "user/--", "user/a b", "user/x.git", "../etc"):
        said = complaint("--push_to_hub", "--hub_model_id", name, "--dropout", "1")
        assert f"hub_model_id={name!r} is no name that the Hub takes" in said
        assert "dropout=1.0 must be below 1" in said
    said = complaint("--hub_model_id", "user/toy", "--hub_private", "--hub_strategy", "every_save")
    assert "3 problems" in said and said.count("is of no use without push_to_hub") == 3
    assert "must be one of end, every_save; is 'often'" in complaint("--hub_strategy", "often")
    assert "hub_minutes must be at least 0" in complaint("--hub_minutes", "-1")
    # It once was taken, and the export was not even tried.
    said = complaint("--push_to_hub", "--hub_model_id", "crypt", "--hub_minutes", "0")
    assert "hub_minutes=0 leaves no time" in said and "2 problems" in said
    lora = ["--push_to_hub", "--hub_model_id", "user/toy", "--hub_strategy", "every_save", "--method", "lora"]
    assert "a checkpoint of LoRA is no model to load" in complaint(*lora, cls=FinetuneSettings)
    assert parse_settings(TrainSettings, as_flags(PUSH)).hub_model_id == "user/toy"


def test_without_a_token_nothing_is_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    run_dir, shards = tmp_path / "run", tmp_path / "no-shards"
    with pytest.raises(SystemExit):
        train_flags_here(
            as_flags({**PUSH, "run_dir": run_dir, "shards": shards, "source": tmp_path / "nothing"})
        )
    said = capsys.readouterr().err
    assert "there is no token for the Hub" in said and "hf auth login" in said
    assert not run_dir.exists() and not shards.exists()


def test_a_run_has_ended_when_its_last_turn_did(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    for turns, ended in (
        ("started finished", True),
        ("started stopped resumed finished", True),
        ("started finished resumed stopped", False),
        ("started skipped_step", False),
    ):
        lines = [json.dumps({"event": turn, "unix_time": 1.0}) for turn in turns.split()]
        (tmp_path / "events.jsonl").write_text("\n".join(lines))
        assert has_ended(tmp_path) == ended
    assert not has_ended(tmp_path / "nothing")


@pytest.mark.slow
def test_a_finished_run_is_on_the_hub_whole_and_the_same_command_pushes_it_again(shards, tmp_path):
    settings = {"shards": shards, "run_dir": tmp_path / "run", **PUSH, "hub_private": "true"}
    with HubServer({}, token=TOKEN) as hub:
        env = at_the_hub(hub, tmp_path / "here")
        first = run(env, **settings)
        assert first.returncode == 0, first.stdout + first.stderr
        there = dict(hub.repositories["user/toy"])
        loaded = subprocess.run(
            [sys.executable, "-c", LOAD_ELSEWHERE],
            cwd=tmp_path,
            env={
                name: value
                for name, value in at_the_hub(hub, tmp_path / "far").items()
                if name != "PYTHONPATH"
            },
            capture_output=True,
            text=True,
        )
        assert loaded.returncode == 0, loaded.stderr
        assert "user/toy" in hub.private

        hub.repositories["user/toy"].clear()  # somebody deleted it
        weights = (tmp_path / "run" / "export" / "model.safetensors").stat().st_mtime_ns
        again = run(env, **settings)
        assert again.returncode == 0, again.stdout + again.stderr
        assert "is complete" in again.stdout and "The model is at " in again.stdout
        assert (tmp_path / "run" / "export" / "model.safetensors").stat().st_mtime_ns == weights
        assert set(hub.repositories["user/toy"]) == set(there)

    export = tmp_path / "run" / "export"
    for path in export.iterdir():
        if path.name != "README.md":
            assert there[path.name] == path.read_bytes()
    digest = hashlib.sha256((export / "model.safetensors").read_bytes()).hexdigest()
    assert loaded.stdout.split()[-1] == digest
    for name in ("settings.yaml", "metrics.jsonl", "report.html", "loss.png"):
        assert f"training/{name}" in there
    card = there["README.md"].decode()
    assert card_problems(card) == []
    assert "](loss.png)" in card and there["loss.png"].startswith(b"\x89PNG")
    assert b"hub_" not in there["training/settings.yaml"]
    assert yaml.safe_load(there["training/settings.yaml"])["max_steps"] == 12
    for said in (first.stdout, first.stderr, again.stdout, again.stderr):
        assert TOKEN not in said
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_every_checkpoint_is_pushed_while_training_goes_on_and_the_export_last(shards, tmp_path):
    """Checkpoints are pruned at once, here: what is on its way must not mind."""
    settings = {"shards": shards, "run_dir": tmp_path / "run", **PUSH, "hub_strategy": "every_save"}
    settings |= {
        "max_steps": 100_000,
        "save_every_steps": 20,
        "keep_last": 1,
        "keep_best": "false",
    }
    settings |= {"eval_every_steps": 100_000, "sample_every_steps": 100_000, "warmup_steps": 1}
    stop = tmp_path / "run" / "STOP"
    with HubServer({}, token=TOKEN) as hub:
        env = at_the_hub(hub, tmp_path / "here")
        process = subprocess.Popen(
            train_command(**settings),
            env=env,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with ThreadPoolExecutor(1) as pool:  # a pipe that nobody empties would stop the run
            output = pool.submit(process.communicate)
            wait_until(lambda: len(hub.snapshots) >= 3 or process.poll() is not None)
            stop.touch()
            said, _ = output.result(300)
        assert process.returncode == 0, said
        assert len(hub.snapshots) >= 3, said
        assert "Stopped after step" in said and "Not pushed" not in said and TOKEN not in said
        for files in hub.snapshots.values():
            assert "optimizer.safetensors" not in files and "training_state.json" not in files
            assert {"config.json", "model.safetensors", "README.md", "training/metrics.jsonl"} <= set(files)
        assert len({files["model.safetensors"] for files in hub.snapshots.values()}) >= 3
        assert not (tmp_path / "run" / ".pushing").exists()
        assert not (tmp_path / "run" / "export").exists()  # stopped, so there is none to push


TROUBLES = {
    "it answers 500": {"": [500] * 1000},
    "it hangs in an upload": {"PUT /lfs/": ["hang"] * 10},
    "it does not even answer the first question": {"POST /api/repos/create": ["hang"] * 10},
    "it refuses the token": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("trouble", [*TROUBLES, "nobody is there"])
def test_a_hub_in_trouble_takes_nothing_from_a_run(shards, tmp_path, trouble):
    settings = {"shards": shards, "run_dir": tmp_path / "run", **PUSH, "hub_strategy": "every_save"}
    settings["hub_minutes"] = 0.15
    token = "hf_another" + "one" * 5
    with HubServer({}, token=TOKEN, scripted=TROUBLES.get(trouble)) as hub, nobody() as empty:
        there = empty if trouble == "nobody is there" else hub
        done = run(
            at_the_hub(there, tmp_path / "here", token=token if "token" in trouble else TOKEN), **settings
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert not hub.repositories.get("user/toy")
    assert "The export is not on the Hub; `python -m release.push" in done.stdout
    words = {
        "it answers 500": "HTTP 500",
        "it refuses the token": "The Hub refuses this token (HTTP 401)",
        "nobody is there": "cannot be reached",
    }
    assert words.get(trouble, "is given up") in done.stdout
    for secret in (TOKEN, token):
        assert secret not in done.stdout + done.stderr
    export = tmp_path / "run" / "export"
    last = complete_checkpoints(tmp_path / "run")[12]
    weights, kept = load_file(export / "model.safetensors"), load_file(last / "model.safetensors")
    for name, tensor in weights.items():
        assert torch.equal(tensor, kept[name][: len(tensor)])
    assert (export / "README.md").exists() and (tmp_path / "run" / "loss.png").exists()


@pytest.mark.slow
def test_ctrl_c_in_training_does_not_wait_for_a_checkpoint_that_hangs(shards, tmp_path):
    settings = {"shards": shards, "run_dir": tmp_path / "run", **PUSH, "hub_strategy": "every_save"}
    settings |= {"max_steps": 100_000, "save_every_steps": 20, "eval_every_steps": 100_000}
    settings |= {"sample_every_steps": 100_000, "hub_minutes": 0.05}
    with HubServer({}, token=TOKEN, scripted={"PUT /lfs/": ["hang"]}) as hub:
        process = subprocess.Popen(
            train_command(**settings),
            env=at_the_hub(hub, tmp_path / "here"),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert hub.hanging.wait(300)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=300)
        assert not hub.repositories["user/toy"]
    assert process.returncode == 0, said
    assert "a signal asked for it" in said and "was not done after 3 s and is given up" in said
    assert "Traceback" not in said and complete_checkpoints(tmp_path / "run")


@pytest.mark.slow
def test_ctrl_c_while_the_hub_hangs_ends_at_once_with_the_run_complete(shards, tmp_path):
    with HubServer({}, token=TOKEN, scripted={"POST .*/commit/": ["hang"]}) as hub:
        process = subprocess.Popen(
            train_command(shards=shards, run_dir=tmp_path / "run", **PUSH),
            env=at_the_hub(hub, tmp_path / "here"),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # What runs the tests in the background may have had Ctrl-C ignored, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert hub.hanging.wait(300)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "the Hub is not waited for" in said and "Traceback" not in said
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_writer_of_rooms_goes_out_with_its_card(tmp_path):
    tokenizer = train_tokenizer([json.dumps(room(n)) for n in range(40)], 300)
    ends = {"bos_token_id": 299, "eos_token_id": 299}
    GPTScratchForCausalLM(GPTScratchConfig(**SIZES, **ends)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for split, numbers in (("train", range(40)), ("validation", range(40, 48))):
        lines = "".join(json.dumps(room(n)) + "\n" for n in numbers)
        (tmp_path / f"{split}.jsonl").write_text(lines)
    settings = {
        **FINETUNE_TOY,
        **PUSH,
        "data": tmp_path,
        "model": tmp_path / "base",
        "run_dir": tmp_path / "run",
    }
    with HubServer({}, token=TOKEN) as hub:
        done = subprocess.run(
            [sys.executable, str(ROOT / "finetune.py"), *as_flags(settings)],
            env=at_the_hub(hub, tmp_path / "here"),
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        there = hub.repositories["user/toy"]
    card = there["README.md"].decode()
    assert card_problems(card) == []
    for said in (
        "writes descriptions of dungeon rooms",
        "## Prompt format",
        "held-out rooms, bits per byte, after fine-tuning",  # measured after the export, told before the push
        "![Training and validation loss](loss.png)",
        "finetune.py --config training/settings.yaml",
        'model="user/toy"',
    ):
        assert said in card
    assert there["loss.png"].startswith(b"\x89PNG") and str(tmp_path) not in card


@pytest.mark.slow
def test_of_two_processes_one_pushes(shards, tmp_path):
    config = str(ROOT / "accelerate_configs" / "ddp.yaml")
    launch = ["--config_file", config, "--num_processes", "2", "--main_process_port", "0"]
    with HubServer({}, token=TOKEN) as hub:
        done = run(
            at_the_hub(hub, tmp_path / "here"),
            *launch,
            shards=shards,
            run_dir=tmp_path / "run",
            **PUSH,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        commits = [path for method, path, _ in hub.served if "/commit/" in path and method == "POST"]
        created = [path for method, path, _ in hub.served if path.startswith("/api/repos/create")]
    assert len(commits) == 1 and len(created) == 2  # a look at the start, and the push
    assert done.stdout.count("The model is at http") == 1
