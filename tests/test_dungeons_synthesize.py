"""Asking a large model for rooms: real requests to servers on this machine, most of them badly behaved."""

import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.hf_api import InferenceProviderMapping
from huggingface_hub.inference._providers import _common
from training_toys import ROOT, environment
from transformers import GPT2Config, GPT2LMHeadModel

from data.corpora.dungeons.check import HELD_OUT_SETTINGS, split_of
from data.dungeon_files import BUNDLED_DUNGEONS, read_json_lines, read_splits
from data.dungeons import Dungeon
from data.room_requests import Seen, requests, split_answer, what_is_wrong
from data.synthesize import main
from data.tokenizer import train_tokenizer

HANG = object()
PLACES = ["stair", "well", "hall", "loft", "mill", "gate"]


class Server:
    """Answers request n with `answer(n, body)`: a text, a (status, headers[, body]), bytes, or HANG.

    What hangs is answered when the server is left.
    """

    def __init__(self, answer):
        self.asked, self.headers, self.paths, self.at_once, self.most_at_once = [], [], [], 0, 0
        self.left = threading.Event()
        server, lock = self, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.asked.append(body)
                    server.paths.append(self.path)
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                    number = len(server.asked)
                reply = answer(number, body)
                status, headers, payload = 200, {}, b""
                if reply is HANG:
                    server.left.wait()
                elif isinstance(reply, tuple):
                    status, headers, *rest = reply
                    payload = rest[0] if rest else b""
                elif isinstance(reply, bytes):
                    payload = reply
                else:
                    choice = {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": reply},
                    }
                    usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
                    payload = json.dumps(
                        {"choices": [choice], "usage": usage, "id": "x", "model": "m"}
                    ).encode()
                with lock:
                    server.at_once -= 1
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Type", "application/json")
                    self.end_headers()
                    self.wfile.write(payload)
                except ConnectionError:  # who asked has hung up
                    pass

            def log_message(self, *arguments):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.left.set()
        self.http.shutdown()
        self.http.server_close()


def in_letters(number) -> str:
    return "".join(chr(ord("a") + int(digit)) for digit in str(number))


def good_answer(number, body) -> str:
    """A room that mentions all it is asked for, in words of its own."""
    asked = body["messages"][-1]["content"].split("nothing else.\n\n")[1].replace("\n", ". ")
    own = " ".join(in_letters(1000 * number + place) for place in range(50))
    return f"A Room, No. {number}\n\nHere you find this: {asked}. {own}."


@pytest.fixture
def rooms(tmp_path) -> Path:
    path = tmp_path / "rooms.jsonl"
    lines = [
        {"setting": s, "place": p, "mood": "calm", "features": [f"{p} bell", "wet rope"], "exits": ["a door"],
         "description": f"A {p} bell in a {s} and wet rope."}
        for s in ("crypt", "sewer", *HELD_OUT_SETTINGS) for p in PLACES
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(server_url, rooms, *more) -> int:
    output = rooms.with_name("more.jsonl")
    flags = ["--url", server_url, "--model", "teacher-1", "--license", "cc0-1.0", "--output", str(output)]
    flags += ["--rooms", str(rooms), "--count", "8", "--pause_seconds", "0.02"]
    return main([*flags, *more])


def rows_of(rooms) -> list[dict]:
    return [json.loads(line) for line in rooms.with_name("more.jsonl").read_text().splitlines()]


def test_rooms_go_straight_into_fine_tuning_with_where_they_come_from(rooms, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    prices = ["--usd_per_million_in", "1000", "--usd_per_million_out", "2000"]
    with Server(good_answer) as server:
        assert run(server.url, rooms, "--concurrency", "3", *prices) == 0
    rows = rows_of(rooms)
    assert len(rows) == len({row["id"] for row in rows}) == 8 == len(server.asked)
    assert server.most_at_once <= 3
    assert {row["teacher"] for row in rows} == {"teacher-1"} and rows[0]["license"] == "cc0-1.0"
    sent = {body["messages"][0]["content"]: body["seed"] for body in server.asked}
    assert {row["teacher_prompt"]: row["sampling"]["seed"] for row in rows} == sent
    assert rows[0]["sampling"].items() >= {"temperature": 1.0, "top_p": 0.95, "max_tokens": 320}.items()
    assert rows[0]["title"].startswith("A Room") and rows[0]["features"]
    splits = read_splits([str(rooms.with_name("more.jsonl")), str(rooms)], {})
    assert sum(len(split) for split in splits.values()) == 8 + len(read_json_lines(rooms))
    text = capsys.readouterr().out
    assert "8 of 8 rooms to ask teacher-1 for" in text
    # 0.8 k x $1 + 0.4 k x $2
    assert "8 times asked in this run" in text and "800 tokens of prompts and 400 of answers, $1.60" in text
    assert all(headers["authorization"] == "Bearer sk-secret" for headers in server.headers)
    assert "sk-secret" not in text + rooms.with_name("more.jsonl").read_text()


def test_without_a_key_of_its_own_an_address_gets_none(rooms, monkeypatch):
    """The Hub's saved token would otherwise be sent to it."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with Server(good_answer) as server:
        assert run(server.url, rooms, "--count", "1") == 0
    assert "hf_secret" not in str(server.headers)


def test_an_overrun_and_confused_endpoint_is_asked_again_with_another_seed_and_all_is_counted(rooms, capsys):
    bad = {
        1: (429, {"Retry-After": "0.05"}),
        2: (503, {}),
        3: b"<html>oops",
        4: b'{"choices": []}',
        5: b"\xff",
        6: "  ",
    }
    with Server(lambda number, body: bad.get(number) or good_answer(number, body)) as server:
        assert run(server.url, rooms, "--concurrency", "1", "--attempts", "7") == 0
    assert len(rows_of(rooms)) == 8 and len(server.asked) == 14
    assert len({body["seed"] for body in server.asked}) == 14
    assert rows_of(rooms)[0]["sampling"]["seed"] == server.asked[6]["seed"]
    text = capsys.readouterr().out
    for counted in ("14 times asked", "1 status 429", "1 status 503", "3 malformed", "1 empty answer"):
        assert counted in text


def test_an_endpoint_that_hangs_is_asked_again(rooms, capsys):
    with Server(lambda number, body: HANG if number == 1 else good_answer(number, body)) as server:
        # On a slow machine other answers may be late as well.
        assert run(server.url, rooms, "--count", "2", "--timeout_seconds", "3") == 0
    assert len(rows_of(rooms)) == 2 and len(server.asked) > 2
    assert re.search(r"asked again: \d+ no answer within 3 s", capsys.readouterr().out)


@pytest.mark.parametrize(
    "failure",
    [
        (401, {}, b'{"error": {"message": "Incorrect key provided: sk-secret", "code": "invalid_api_key"}}'),
        (404, {}, b'{"error": "no model teacher-1 here"}'),
        (500, {}, b"CUDA out of memory"),
    ],
)
def test_an_endpoint_that_fails_half_way_keeps_what_is_there_and_goes_on_with_the_rest(
    rooms, capsys, monkeypatch, failure
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with Server(lambda number, body: good_answer(number, body) if number <= 3 else failure) as server:
        assert run(server.url, rooms, "--concurrency", "1", "--attempts", "2") == 1
    said = capsys.readouterr().err
    reason = {401: "Incorrect key provided: …", 404: "no model teacher-1 here", 500: "CUDA out of memory"}
    assert f"status {failure[0]}" in said and reason[failure[0]] in said and "sk-secret" not in said
    assert "3 answers of this run are kept in" in said
    assert "5 are missing. The same command goes on with those." in said
    before = rows_of(rooms)
    assert len(before) == 3 and len(server.asked) == (3 + 5 * 2 if failure[0] == 500 else 4)
    with open(rooms.with_name("more.jsonl"), "a") as file:
        file.write('{"id": "0-7", "descr')  # as a kill in the middle of a write leaves it
    with Server(lambda number, body: good_answer(number + 100, body)) as server:
        assert run(server.url, rooms) == 0
    after = rows_of(rooms)
    assert after[:3] == before and len(after) == 8 and len(server.asked) == 5
    assert run("http://127.0.0.1:9/v1", rooms) == 0  # nothing is missing: nobody is asked


def test_nobody_listening_is_said(rooms, capsys):
    with socket.socket() as silent:  # bound, so that nobody else listens there, and not listening
        silent.bind(("127.0.0.1", 0))
        assert run(f"http://127.0.0.1:{silent.getsockname()[1]}/v1", rooms, "--attempts", "1") == 1
    assert "no connection (ConnectError)" in capsys.readouterr().err


def ask_provider(rooms, provider, *more) -> int:
    flags = ["--provider", provider, "--model", "owner/teacher", "--license", "cc0-1.0", "--count", "2"]
    flags += ["--output", str(rooms.with_name("more.jsonl")), "--rooms", str(rooms), "--attempts", "3"]
    return main([*flags, *more])


def test_an_inference_provider_of_the_hub_is_asked_with_the_hubs_token(rooms, monkeypatch, tmp_path):
    """The Hub's router is this machine, and its list of models the table that the client keeps for trials."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    names = {"provider": "together", "hf_model_id": "owner/teacher", "providerId": "teacher-9"}
    known = InferenceProviderMapping(**names, task="conversational", status="live")
    monkeypatch.setitem(_common.HARDCODED_MODEL_INFERENCE_MAPPING["together"], "owner/teacher", known)
    with Server(good_answer) as server:
        router = server.url.removesuffix("/v1") + "/{provider}"
        monkeypatch.setattr(constants, "INFERENCE_PROXY_TEMPLATE", router)
        assert ask_provider(rooms, "together") == 0
    assert len(rows_of(rooms)) == 2 and {row["teacher"] for row in rows_of(rooms)} == {"owner/teacher"}
    assert set(server.paths) == {"/together/v1/chat/completions"}
    assert {body["model"] for body in server.asked} == {"teacher-9"}
    assert all(headers["authorization"] == "Bearer hf_secret" for headers in server.headers)


@pytest.mark.parametrize(
    ("provider", "reason"),
    [
        ("nosuch", "Provider 'nosuch' not supported"),
        ("together", "You must provide an api_key to work with together API or log in with `hf auth login`"),
    ],
)
def test_a_provider_that_cannot_be_asked_is_said_once_and_not_tried_again(
    rooms, capsys, monkeypatch, tmp_path, provider, reason
):
    """Once this counted as a malformed answer: six tries for each request, and the reason was lost."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    # A second try would wait for longer than the test may take.
    assert ask_provider(rooms, provider, "--pause_seconds", "3600") == 1
    assert reason in capsys.readouterr().err


def test_refusals_talk_and_echoes_are_dropped_and_not_asked_for_again(rooms, capsys):
    def answer(number, body):
        kinds = {
            1: "I'm sorry, but as an AI language model I cannot write this. " + "word " * 60,
            2: "Too short.",
            3: "A room. " + "dust and more dust " * 20 + ".",
            4: good_answer(99, body),
            5: good_answer(99, body),
        }
        return kinds.get(number) or good_answer(number, body)

    with Server(answer) as server:
        assert run(server.url, rooms, "--concurrency", "1") == 0
        assert len(rows_of(rooms)) == 4
        text = capsys.readouterr().out
        for counted in ("1 refusal or talk", "1 too short", "1 features not mentioned", "1 said before"):
            assert counted in text
        assert run(server.url, rooms) == 0 and len(server.asked) == 8


def test_what_was_dropped_is_asked_for_with_other_seeds_when_asked_again(rooms):
    """An endpoint that heeds the seed would write the same text again."""
    by_seed = {}

    def answer(number, body):
        text = "Too short." if number <= 3 or number == 9 else good_answer(number, body)
        return by_seed.setdefault((body["messages"][0]["content"], body["seed"]), text)

    with Server(answer) as server:
        assert run(server.url, rooms, "--concurrency", "1") == 0 and len(rows_of(rooms)) == 5
        for there in (7, 8):  # the ninth answer is dropped too, and asked for once more
            assert run(server.url, rooms, "--concurrency", "1", "--retry_dropped") == 0
            assert len(rows_of(rooms)) == there
    assert len(by_seed) == len(server.asked) == 12


def test_any_character_in_an_answer_survives_a_rerun(rooms):
    """Unicode's other line ends once cut a kept line in two, and no rerun could read the file."""

    def answer(number, body):
        odd = f" {in_letters(number)} \u2028 \u2029 \x85 \x0b and half a pair \ud83d."
        return "Too\u2028short." if number == 1 else good_answer(number, body) + odd

    with Server(answer) as server:
        assert run(server.url, rooms, "--count", "4", "--concurrency", "1") == 0
        assert run(server.url, rooms, "--concurrency", "1") == 0 and len(server.asked) == 8
    lines = rooms.with_name("more.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(lines) == 7 and "\u2028" in rooms.with_name("more.dropped.jsonl").read_text(encoding="utf-8")


def test_a_plan_asks_nothing(rooms, capsys):
    with Server(good_answer) as server:
        prices = ["--usd_per_million_in", "0", "--usd_per_million_out", "1000"]
        assert run(server.url, rooms, "--plan", *prices) == 0
        assert "at most 2,560 of answers, $2.56" in capsys.readouterr().out
        assert run(server.url, rooms, "--plan") == 0
        assert "2,560 of answers, cost unknown without prices" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            run(server.url, rooms, "--plan", "--usd_per_million_out", "1000")
        assert "belong together" in capsys.readouterr().err
    assert not server.asked and not rooms.with_name("more.jsonl").exists()


def test_the_grid_is_the_seeds_and_never_asks_for_what_is_held_out(rooms):
    wanted = list(requests(read_json_lines(rooms), 40, seed=3))
    assert wanted == list(requests(read_json_lines(rooms), 40, seed=3))
    assert wanted[:10] == list(requests(read_json_lines(rooms), 10, seed=3))
    assert wanted != list(requests(read_json_lines(rooms), 40, seed=4))
    assert {split_of(r.fields["setting"], r.fields["place"]) for r in wanted} == {"train"}
    with pytest.raises(ValueError, match="no room has a setting, a place and features"):
        list(requests([Dungeon({"mood": "calm"}, "x")], 1, seed=0))


def test_every_bundled_room_would_do_as_an_answer():
    """Talk about the task was once looked for so widely that twelve of them would have been dropped."""
    for split in sorted(BUNDLED_DUNGEONS.glob("*.jsonl")):
        for room in read_json_lines(split):
            title = str(room.fields["title"])
            assert what_is_wrong(room.description, room.fields, title) == "", (split.name, room.where)


def test_answers_are_taken_apart_and_judged():
    text = "Rope hangs from the bell. " * 10
    assert split_answer(f"Title: The Loft\n\nDescription: {text}\nMore.") == (
        "The Loft",
        text.strip() + " More.",
    )
    assert split_answer(text) == ("", text.strip())
    asked = {"features": ["a bell rope"], "exits": ["ropes"], "inhabitants": ["the hanging bell of old"]}
    assert what_is_wrong(text.strip(), asked) == ""
    assert what_is_wrong(text.strip(), {"features": ["iron bell"]}) == "features not mentioned"
    assert what_is_wrong(text.strip(), {"exits": ["a low door"]}) == "exits not mentioned"
    assert what_is_wrong(text.strip(), {"inhabitants": ["three old bell ringers"]}) == (
        "inhabitants not mentioned"
    )
    assert what_is_wrong(text.strip() + " and then", {}) == "cut off"
    for talk in (
        "**Loft** ",
        "Certainly! ",
        "Here is a dungeon room for you: ",
        "I can’t create this. ",
        "Unfortunately, I cannot. ",
    ):
        assert what_is_wrong(talk + text.strip(), {}) == "refusal or talk about the task"
    assert what_is_wrong(text.strip(), {}, title="Here is your room") == "refusal or talk about the task"
    seen = Seen(["one two three four five six seven eight nine ten eleven"])
    assert seen.has("zero one two three four five six seven eight nine ten") and not seen.has("one two three")


@pytest.mark.slow
def test_a_real_local_server_is_asked(rooms, tmp_path):
    """`transformers serve` with a small stock GPT-2; what it writes is nonsense, and is dropped as such."""
    pytest.importorskip("fastapi", reason="transformers serve needs fastapi and uvicorn")
    pytest.importorskip("uvicorn", reason="transformers serve needs fastapi and uvicorn")
    tokenizer = train_tokenizer([rooms.read_text()] * 4, 300)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=300, n_positions=1024)
    config.bos_token_id = config.eos_token_id = 299
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(tmp_path / "gpt2")]
    command += ["--host", "127.0.0.1", "--port", "0", "--device", "cpu"]  # a port that is free, which it says
    with open(tmp_path / "serve.log", "w") as log:
        server = subprocess.Popen(command, env=environment(), stdout=log, stderr=log, start_new_session=True)
    try:
        url = None
        while url is None:  # until the test's own limit
            said = (tmp_path / "serve.log").read_text()
            assert server.poll() is None, said
            url = re.search(r"running on (http://127\.0\.0\.1:\d+)", said)
            time.sleep(0.2)
        more = ["--max_tokens", "30", "--concurrency", "2", "--timeout_seconds", "60", "--count", "2"]
        flags = [
            "--url",
            f"{url[1]}/v1",
            "--model",
            str(tmp_path / "gpt2"),
            "--license",
            "cc0-1.0",
        ]
        flags += ["--output", str(tmp_path / "more.jsonl"), "--rooms", str(rooms), *more]
        command = [sys.executable, "-m", "data.synthesize", *flags]
        done = subprocess.run(
            command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=200
        )
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    assert done.returncode == 0, done.stderr + (tmp_path / "serve.log").read_text()[-3000:]
    dropped = (tmp_path / "more.dropped.jsonl").read_text().splitlines()
    assert len(dropped) == 2 and all(json.loads(line)["answer"] for line in dropped)
    assert "asked again: none" in done.stdout
