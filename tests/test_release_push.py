"""An export on its way to the Hub and back with the real client; the loopback Hub is not always well."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from data.tokenizer import train_tokenizer
from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from release.background import HELD_FOLDER, HubPushes, hold, push_in_background
from release.folder import ReleaseError
from release.push import push as push_here
from tests.hub_server import HubServer

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "hf_" + "secret" * 5
TEXTS = ["The bell in the crypt is cracked and the rope is wet.", "Water slides over the sluice wheel."] * 20

LOAD_ELSEWHERE = """
import hashlib, json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from huggingface_hub import hf_hub_download
name = "user/crypt"
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
generate = pipeline("text-generation", model=name, trust_remote_code=True)
text = generate("The bell", max_new_tokens=4, do_sample=False)[0]["generated_text"]
weights = open(hf_hub_download(name, "model.safetensors"), "rb").read()
assert "modeling_gpt_scratch" not in sys.modules, "the class came from the repository, not from the Hub"
sha256 = hashlib.sha256(weights).hexdigest()
print(json.dumps({"class": type(model).__name__, "text": text, "sha256": sha256}))
"""


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run directory with an export, as training leaves it."""
    run = tmp_path_factory.mktemp("runs") / "crypt"
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, 300)
    config = GPTScratchConfig.preset(
        "tiny", vocab_size=len(tokenizer), bos_token_id=299, eos_token_id=299, pad_token_id=299
    )
    GPTScratchForCausalLM(config).save_pretrained(run / "export")
    tokenizer.save_pretrained(run / "export")
    (run / "settings.yaml").write_text("seed: 1\nmax_steps: 2\n")
    lines = [{"step": 1, "loss": 5.0, "tokens": 10}, {"step": 2, "validation_loss": 4.5, "tokens": 20}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "report.html").write_text("<html></html>")
    (run / "loss.png").write_bytes(b"\x89PNG\r\n")
    return run


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(finished_run, tmp_path / "crypt"))


def environment(hub, tmp_path, token=TOKEN):
    """Of a process on another machine: its own empty cache, our repository not on its path."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
    there = {
        "HF_ENDPOINT": hub if isinstance(hub, str) else hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "NO_PROXY": "*",
        "OMP_NUM_THREADS": "1",
    }
    return {**kept, **there, **({"HF_TOKEN": token} if token else {})}


def push_command(folder, *flags, name="user/crypt"):
    return [sys.executable, "-m", "release.push", str(folder), name, *flags]


def push(folder, env, *flags, name="user/crypt"):
    return subprocess.run(
        push_command(folder, *flags, name=name),
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def contents_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


BAD_DAY = {
    "POST /api/repos/create": [503, "drop"],
    "POST .*/preupload/": [429],
    "POST .*/objects/batch": [502],
    "PUT /lfs/": [500, "drop"],
    "POST .*/commit/": ["drop", "lose"],
    "GET /lfs/": ["cut"],
}


@pytest.mark.parametrize(
    "script",
    [{"POST .*/commit/": ["lose"]}, pytest.param(BAD_DAY, marks=pytest.mark.slow)],
    ids=["the answer is lost", "a bad day"],
)
def test_a_pushed_export_loads_in_another_process_whatever_the_hub_goes_through(run, tmp_path, script):
    before = contents_of(run)
    with HubServer({}, token=TOKEN, scripted=script) as hub:
        pushed = push(run / "export", environment(hub, tmp_path), "--private")
        assert pushed.returncode == 0, pushed.stderr + "\n".join(map(str, hub.served))
        there = hub.repositories["user/crypt"]
        assert "user/crypt" in hub.private
        for name, content in contents_of(run / "export").items():
            assert there[name] == content, name
        for name in ("settings.yaml", "metrics.jsonl", "report.html", "loss.png"):
            assert there[f"training/{name}"] == before[name]
        assert b'model="user/crypt"' in there["README.md"]
        assert hub.uploads.count(hashlib.sha256(before["export/model.safetensors"]).hexdigest()) == 1

        elsewhere = environment(hub, tmp_path / "elsewhere")
        loaded = subprocess.run(
            [sys.executable, "-c", LOAD_ELSEWHERE],
            cwd=tmp_path,
            env=elsewhere,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert loaded.returncode == 0, loaded.stderr + "\n".join(map(str, hub.served[-20:]))
        assert not any(hub.scripted.values()), "the Hub was meant to be in more trouble"
        if "GET /lfs/" in script:
            answers = [status for method, path, status in hub.served if f"{method} {path}"[:9] == "GET /lfs/"]
            # In whole again, with no Range: the client keeps pieces of 10 MB, and this is less.
            assert answers == ["cut", 200]
    found = json.loads(loaded.stdout.splitlines()[-1])
    assert found["class"] == "GPTScratchForCausalLM"
    assert found["text"].startswith("The bell")
    assert found["sha256"] == hashlib.sha256(before["export/model.safetensors"]).hexdigest()
    assert contents_of(run) == before  # the card was made on the way, not here
    assert TOKEN not in pushed.stdout + pushed.stderr


@pytest.mark.slow
def test_a_large_file_that_the_storage_refuses_again_and_again_is_tried_again(run, tmp_path):
    """After six tries the client gives up, and names the file and no reason: one error around another."""
    digest = hashlib.sha256((run / "export" / "model.safetensors").read_bytes()).hexdigest()
    with HubServer({}, token=TOKEN, scripted={f"PUT /lfs/{digest}": [500] * 7}) as hub:
        pushed = push(run / "export", environment(hub, tmp_path), "--retries", "2")
        assert pushed.returncode == 0, pushed.stderr
        assert digest in hub.uploads and not any(hub.scripted.values())
    assert pushed.stdout.count("The Hub is not well (HTTP 500); trying again in 1 s.") == 1


def test_a_large_file_that_the_storage_refuses_for_good_is_named_with_the_reason(run, tmp_path):
    with HubServer({}, token=TOKEN, scripted={"PUT /lfs/": [403] * 2}) as hub:
        pushed = push(run / "export", environment(hub, tmp_path))
        assert hub.repositories["user/crypt"] == {}
    assert pushed.returncode == 1 and "trying again" not in pushed.stdout
    said = pushed.stderr.rpartition("error: ")[2]
    assert re.match(
        r"The Hub did not take user/crypt: Error while uploading '\S+' to the Hub. HTTP 403: ", said
    )
    assert "this token" not in said  # the storage knows signatures, no tokens


def test_the_hub_says_how_long_it_wants_to_be_left_alone(run, tmp_path):
    limits = [(429, {"Retry-After": "2"}), (429, {"RateLimit": '"api";r=0;t=2'}), 429]
    with HubServer({}, token=TOKEN, scripted={"POST /api/repos/create": limits}) as hub:
        pushed = push(run / "export", environment(hub, tmp_path))
    assert pushed.returncode == 0, pushed.stderr
    # Of the last one's zero seconds the usual pause is left, which has doubled twice.
    assert re.findall(r"\(HTTP 429\); trying again in (\d+) s", pushed.stdout) == ["2", "3", "4"]


OURS = "<!-- written by release.card"


def test_a_card_that_a_person_wrote_on_the_hub_stays(run, tmp_path):
    mine = b"---\nlicense: mit\n---\n\n# Mine\n"
    with HubServer({"user/crypt": {"README.md": mine}}, token=TOKEN) as hub:
        pushed = push(run / "export", environment(hub, tmp_path))
        assert pushed.returncode == 0, pushed.stderr
        there = hub.repositories["user/crypt"]
        assert there["README.md"] == mine and "model.safetensors" in there
        assert "The card of user/crypt was written by a person, and stays." in pushed.stdout

        (run / "export" / "README.md").write_text("# Mine, and newer\n")
        again = push(run / "export", environment(hub, tmp_path))
        assert again.returncode == 0, again.stderr
        assert hub.repositories["user/crypt"]["README.md"] == b"# Mine, and newer\n"


def test_what_the_owner_says_on_the_hub_about_licence_and_language_is_kept(run, tmp_path):
    """The page of a new model asks for a licence, and makes a card of nothing else."""
    with HubServer({"user/crypt": {"README.md": b"---\nlicense: mit\n---\n"}}, token=TOKEN) as hub:
        cards = []
        for language in ("", "language: en\n", ""):
            pushed = push(run / "export", environment(hub, tmp_path))
            assert pushed.returncode == 0, pushed.stderr
            there = hub.repositories["user/crypt"]
            cards.append(there["README.md"].decode())
            there["README.md"] = cards[-1].replace("---\n", f"---\n{language}", 1).encode()
    assert all(OURS in card and "\nlicense: mit\n" in card for card in cards)
    assert ["language: en\n" in card for card in cards] == [False, False, True]
    assert "under the licence `mit`" in cards[0]


@pytest.mark.slow
def test_a_killed_push_leaves_the_old_model_and_completes_when_it_is_repeated(run, tmp_path):
    old = {"README.md": b"an older card", "notes.txt": b"mine", "model.safetensors": b"old"}
    with HubServer({"user/crypt": dict(old)}, token=TOKEN, scripted={"POST .*/commit/": ["hang"]}) as hub:
        env = environment(hub, tmp_path)
        process = subprocess.Popen(push_command(run / "export"), cwd=ROOT, env=env)
        assert hub.hanging.wait(300)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert hub.repositories["user/crypt"] == old
        hub.released.set()
        again = push(run / "export", env)
        assert again.returncode == 0, again.stderr
        there = hub.repositories["user/crypt"]
        assert there["model.safetensors"] == (run / "export" / "model.safetensors").read_bytes()
        assert there["notes.txt"] == b"mine"  # updated, not emptied
        assert len(hub.uploads) == len(set(hub.uploads))  # what had arrived was not sent again


def test_weights_under_an_older_name_do_not_stay_beside_the_new_ones(run, tmp_path):
    """from_pretrained would go by an index that nobody meant any more."""
    old = {
        "model.safetensors.index.json": b'{"weight_map": {"x": "model-00001-of-00001.safetensors"}}',
        "model-00001-of-00001.safetensors": b"old",
        "notes.txt": b"mine",
    }
    with HubServer({"user/crypt": old}, token=TOKEN) as hub:
        pushed = push(run / "export", environment(hub, tmp_path), "--revision", "trial")
        assert pushed.returncode == 0, pushed.stderr
        branch = hub.branches["user/crypt", "trial"]
        assert "model-00001-of-00001.safetensors" in hub.repositories["user/crypt"]  # main is as it was
    assert {"model.safetensors", "notes.txt", "training/metrics.jsonl"} <= set(branch)
    assert not {"model.safetensors.index.json", "model-00001-of-00001.safetensors"} & set(branch)
    assert "removed there: model-00001-of-00001.safetensors, model.safetensors.index.json" in pushed.stdout


def test_only_the_models_own_files_go_out(run, tmp_path):
    """A checkpoint's optimizer, and whatever else lies in the folder, stay."""
    for name in (".env", "optimizer.safetensors", "random_states.safetensors", "old.bin", "id_rsa"):
        (run / "export" / name).write_bytes(b"private")
    with HubServer({}, token=TOKEN) as hub:
        pushed = push(run / "export", environment(hub, tmp_path))
        assert pushed.returncode == 0, pushed.stderr
        assert not any(content == b"private" for content in hub.repositories["user/crypt"].values())
    assert "Stays here: .env, id_rsa, old.bin\n" in pushed.stdout


def refusal(folder, capture, name="user/crypt", **settings):
    """What `push` says, in this process: nothing here may reach the network."""
    with pytest.raises(ReleaseError) as caught:
        push_here(folder, name, say=capture.append, **settings)
    return str(caught.value)


def test_an_export_that_is_not_whole_is_refused_with_all_that_is_wrong(run):
    export = run / "export"
    (export / "configuration_gpt_scratch.py").unlink()
    (export / "kernels_gpt_scratch.py").unlink()  # which only the model's file names
    (export / "tokenizer.json").unlink()
    (export / "generation_config.json").write_text("{")
    weights = (export / "model.safetensors").read_bytes()
    (export / "model.safetensors").write_bytes(weights[:-10])
    message = refusal(export, [], token=TOKEN)
    assert "configuration_gpt_scratch.py is missing" in message
    assert "kernels_gpt_scratch.py is missing" in message
    assert "tokenizer.json is missing" in message
    assert "generation_config.json cannot be read" in message
    assert f"model.safetensors has {len(weights) - 10:,} bytes, its header says {len(weights):,}" in message
    assert "not a folder" in refusal(run / "nothing", [], token=TOKEN)


@pytest.mark.parametrize("name", ["crypt", "user/a/b", "user/--", "user/a b", "user/x.git", "../etc"])
def test_a_name_the_hub_refuses_is_refused_before_anything_is_sent(run, name):
    message = refusal(run / "export", [], name=name, token=TOKEN)
    assert f"takes no repository named {name!r}" in message and "user/name" in message


def test_an_adapter_whose_base_lies_here_goes_out_with_a_word_about_it(run):
    export = run / "export"
    (export / "model.safetensors").rename(export / "adapter_model.safetensors")
    for base, is_said in ((str(run / "base"), True), ("openai-community/gpt2", False)):
        (export / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        told = []
        refusal(export, told, token=TOKEN, retries=0)  # there is no network here
        assert any(f"base is {base}, which is not on the Hub" in line for line in told) == is_said


def test_without_a_token_it_says_how_to_get_one(run, tmp_path):
    with HubServer({}, token=TOKEN) as hub:
        pushed = push(run / "export", environment(hub, tmp_path, token=None))
        assert not hub.served
    assert pushed.returncode == 1
    assert "hf auth login" in pushed.stderr and "Traceback" not in pushed.stderr


def test_what_the_hub_refuses_is_said_without_the_token(run, tmp_path):
    with HubServer({"user/public": {}}, token=TOKEN) as hub:
        wrong = push(run / "export", environment(hub, tmp_path, token="hf_wrong" * 4))
        foreign = push(run / "export", environment(hub, tmp_path), name="someone/crypt")
        public = push(run / "export", environment(hub, tmp_path), "--private", name="user/public")
        assert hub.repositories == {"user/public": {}}
    assert "refuses this token (HTTP 401)" in wrong.stderr
    assert "refuses this token (HTTP 403)" in foreign.stderr and "namespace" in foreign.stderr
    assert "exists and is public, so nothing was uploaded" in public.stderr
    for done, secret in ((wrong, "hf_wrong"), (foreign, TOKEN), (public, TOKEN)):
        assert done.returncode == 1
        assert secret not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_without_a_network_it_says_so_and_changes_nothing_here(run, tmp_path):
    before = contents_of(run)
    with socket.socket() as deaf:  # bound, so that nobody else gets the port; it listens to nobody
        deaf.bind(("127.0.0.1", 0))
        gone = environment(f"http://127.0.0.1:{deaf.getsockname()[1]}", tmp_path)
        pushed = push(run / "export", gone, "--retries", "1")
    assert pushed.returncode == 1
    assert "trying again in 1 s" in pushed.stdout
    assert "cannot be reached" in pushed.stderr and "Nothing on this machine was changed" in pushed.stderr
    offline = push(run / "export", {**gone, "HF_HUB_OFFLINE": "1"})
    assert "HF_HUB_OFFLINE is set" in offline.stderr
    assert TOKEN not in pushed.stderr + offline.stderr and "Traceback" not in pushed.stderr + offline.stderr
    assert contents_of(run) == before


def test_a_push_in_the_background_never_stops_its_caller(run):
    """Here the environment is offline, a folder missing, a name impossible: only words come back."""
    told = []
    pushes = [
        push_in_background(run / "export", "user/crypt", token=TOKEN, retries=0, warn=told.append),
        push_in_background(run / "nothing", "user/crypt", token=TOKEN, warn=told.append),
        push_in_background(run / "export", "no name", token=TOKEN, warn=told.append),
    ]
    assert [one.finish(timeout_seconds=300) for one in pushes] == [None, None, None]
    assert len(told) == 3 and all(text.startswith("Not pushed to the Hub: ") for text in told)
    assert not any(one.is_running for one in pushes)


def test_a_push_in_the_background_tells_what_the_command_would_and_nothing_else(run, tmp_path, monkeypatch):
    """Bars of the uploads before the failure once stood in front of the words."""
    with HubServer({}, token=TOKEN, scripted={"POST .*/commit/": [403] * 2}) as hub:
        env = environment(hub, tmp_path)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        told = []
        assert push_in_background(run / "export", "user/crypt", warn=told.append).finish(300) is None
        assert len(hub.uploads) == 2  # so there was something to draw bars of
        command = push(run / "export", {**env, "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    assert command.stderr.startswith("error: The Hub refuses this token (HTTP 403)")
    assert told == [f"Not pushed to the Hub: {command.stderr.removeprefix('error: ').strip()}"]


IN_THE_BACKGROUND = """
import sys
from release.background import push_in_background
push = push_in_background(sys.argv[1], "user/crypt")
print(push.is_running, flush=True)
input()
print(push.finish(timeout_seconds=float(sys.argv[2])))
"""


@pytest.mark.slow
def test_a_push_in_the_background_arrives_and_a_hub_that_hangs_keeps_nobody(run, tmp_path):
    def finish(hub, seconds, happens):
        """What the program says that pushes; it is told to wait no longer than `seconds` after `happens`."""
        process = subprocess.Popen(
            [sys.executable, "-c", IN_THE_BACKGROUND, str(run / "export"), str(seconds)],
            cwd=ROOT,
            env=environment(hub, tmp_path),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "True\n"
        assert happens(300)
        said, _ = process.communicate("\n", timeout=300)
        assert process.returncode == 0
        return said

    # Two large files: the client uploads them from threads of its own, which keep a process from ending.
    with HubServer({}, token=TOKEN, scripted={"PUT /lfs/": ["hang"] * 2}) as hub:
        hanging = finish(hub, 1, hub.hanging.wait)
        hub.released.set()
        arrived = finish(hub, 300, lambda _: True)
        head = hub.heads["user/crypt", "main"]
    assert "was not done after 1 s" in hanging and hanging.endswith("\nNone\n")
    assert arrived == f"{hub.url}/user/crypt/commit/{head}\n"


@pytest.mark.slow
def test_a_checkpoint_that_hangs_leaves_time_for_the_export(run, tmp_path, monkeypatch):
    """A share of what there is, and here a small one: how long a push takes decides nothing."""
    monkeypatch.setattr("release.background.CHECKPOINTS_SHARE", 0.01)
    checkpoint = Path(shutil.copytree(run / "export", run / "checkpoints" / "step-0000002"))
    (checkpoint / "tokenizer_config.json").write_text("{}")
    with HubServer({}, token=TOKEN, scripted={"POST .*/commit/": ["hang"]}) as hub:
        for name, value in environment(hub, tmp_path).items():
            monkeypatch.setenv(name, value)
        told = []
        pushes = HubPushes("user/crypt", warn=told.append)
        assert pushes.checkpoint(checkpoint) and hub.hanging.wait(300)
        address = pushes.finish(run / "export", timeout_seconds=300)
        there = hub.repositories["user/crypt"]
        assert address and address.endswith(hub.heads["user/crypt", "main"]), told
    assert there["tokenizer_config.json"] == (run / "export" / "tokenizer_config.json").read_bytes()
    assert told == ["The push to the Hub was not done after 3 s and is given up."]


OF_A_RUN = """
import json, shutil, sys
from release.background import HubPushes
told = []
pushes = HubPushes("user/crypt", private=True, warn=told.append)
began = [pushes.checkpoint(sys.argv[1]) for _ in range(3)]
shutil.rmtree(sys.argv[1])  # as a run drops its old checkpoints
address = pushes.finish(sys.argv[2])
print(json.dumps({"began": began, "address": address, "told": told}))
"""


@pytest.mark.slow
def test_a_runs_checkpoints_go_up_one_at_a_time_and_the_export_last(run, tmp_path):
    checkpoint = run / "checkpoints" / "step-0000002"
    shutil.copytree(run / "export", checkpoint)
    (run / "settings.yaml").write_text("seed: 1\npush_to_hub: true\nhub_model_id: user/crypt\nplan: false\n")
    (checkpoint / "optimizer.safetensors").write_bytes(b"private")
    (checkpoint / "tokenizer_config.json").write_text("{}")
    with HubServer({}, token=TOKEN) as hub:
        done = subprocess.run(
            [sys.executable, "-c", OF_A_RUN, str(checkpoint), str(run / "export")],
            cwd=ROOT,
            env=environment(hub, tmp_path),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["began"] == [True, False, False]
        assert found["address"].endswith(hub.heads["user/crypt", "main"]), found
        first, last = hub.snapshots.values()
    assert first["tokenizer_config.json"] == b"{}" and "optimizer.safetensors" not in first
    assert last["tokenizer_config.json"] == (run / "export" / "tokenizer_config.json").read_bytes()
    assert "training/metrics.jsonl" in first and "training/metrics.jsonl" in last
    # Who repeats the run from its settings is not made to push to somebody else's model.
    assert last["training/settings.yaml"] == b"seed: 1\nplan: false\n"
    assert found["told"] == [] and not (run / ".pushing").exists()


def test_a_run_without_a_network_ends_as_if_it_had_one(run):
    told = []
    pushes = HubPushes("user/crypt", warn=told.append, retries=0)
    pushes.checkpoint(run / "export")
    assert pushes.finish(run / "export", timeout_seconds=300) is None
    assert told and all(text.startswith("Not pushed to the Hub: ") for text in told)


def test_a_checkpoint_that_is_deleted_while_it_is_held_is_held_whole_or_not_at_all(tmp_path):
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    for step in range(400):
        folder = tmp_path / "checkpoints" / f"step-{step:07}"
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_text(name)

        def delete(folder=folder, steps_of_waiting=step % 200):
            for _ in range(steps_of_waiting):
                os.stat(tmp_path)
            leaving = folder.with_name(f".deleting-{folder.name}")
            folder.rename(leaving)
            shutil.rmtree(leaving)

        deleting = threading.Thread(target=delete)
        deleting.start()
        held = None
        with suppress(FileNotFoundError):
            held = hold(folder)
        deleting.join()
        assert sorted(path.name for path in (tmp_path / HELD_FOLDER).glob("*/*")) == (names if held else [])


def test_a_checkpoint_that_has_gone_is_left_for_a_newer_one_in_silence(tmp_path):
    told = []
    pushes = HubPushes("user/crypt", warn=told.append)
    assert not pushes.checkpoint(tmp_path / "checkpoints" / "step-0000002")
    assert told == [] and not (tmp_path / HELD_FOLDER).exists()
