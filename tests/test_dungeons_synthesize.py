"""Asking a large model for rooms: real requests to servers on this machine, most of them badly behaved."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from training_toys import ROOT, environment, free_port
from transformers import GPT2Config, GPT2LMHeadModel

from data.corpora.dungeons.check import HELD_OUT_SETTINGS, split_of
from data.dungeon_files import read_json_lines, read_splits
from data.dungeons import Dungeon
from data.room_requests import Seen, requests, split_answer, what_is_wrong
from data.synthesize import main
from data.tokenizer import train_tokenizer

PLACES = ["stair", "well", "hall", "loft", "mill", "gate"]


class Server:
    """Answers request n with `answer(n, body)`: a text, a (status, headers), bytes, or seconds to wait."""

    def __init__(self, answer):
        self.asked, self.headers, self.at_once, self.most_at_once = [], [], 0, 0
        server, lock = self, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.asked.append(body)
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                    number = len(server.asked)
                reply = answer(number, body)
                status, headers, payload = 200, {}, b""
                if isinstance(reply, float):
                    time.sleep(reply)
                elif isinstance(reply, tuple):
                    status, headers = reply
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
                except BrokenPipeError:  # who asked has hung up
                    pass

            def log_message(self, *arguments):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
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
    flags += ["--rooms", str(rooms), "--count", "8", "--pause_seconds", "0.02", "--timeout_seconds", "1.5"]
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
    assert rows[0]["sampling"] == {"temperature": 1.0, "top_p": 0.95, "max_tokens": 320, "seed": 0}
    assert rows[0]["teacher_prompt"] in [body["messages"][0]["content"] for body in server.asked]
    assert rows[0]["title"].startswith("A Room") and rows[0]["features"]
    splits = read_splits([str(rooms.with_name("more.jsonl")), str(rooms)], {})
    assert sum(len(split) for split in splits.values()) == 8 + len(read_json_lines(rooms))
    text = capsys.readouterr().out
    assert "8 of 8 rooms to ask teacher-1 for" in text
    assert "800 tokens of prompts and 400 of answers, $1.60" in text  # 0.8 k x $1 + 0.4 k x $2
    assert all(headers["authorization"] == "Bearer sk-secret" for headers in server.headers)
    assert "sk-secret" not in text + rooms.with_name("more.jsonl").read_text()


def test_without_a_key_of_its_own_an_address_gets_none(rooms, monkeypatch):
    """The Hub's saved token would otherwise be sent to it."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with Server(good_answer) as server:
        assert run(server.url, rooms, "--count", "1") == 0
    assert "hf_secret" not in str(server.headers)


def test_an_overrun_slow_and_confused_endpoint_is_asked_again_and_all_is_counted(rooms, capsys):
    bad = {
        1: (429, {"Retry-After": "0.05"}),
        2: (503, {}),
        3: 2.5,
        4: b"<html>oops",
        5: b'{"choices": []}',
        6: "  ",
    }
    with Server(lambda number, body: bad.get(number) or good_answer(number, body)) as server:
        assert run(server.url, rooms, "--concurrency", "1", "--attempts", "7") == 0
    assert len(rows_of(rooms)) == 8 and len(server.asked) == 14
    text = capsys.readouterr().out
    for counted in (
        "1 status 429",
        "1 status 503",
        "1 no answer within 1.5 s",
        "2 malformed",
        "1 empty answer",
    ):
        assert counted in text


@pytest.mark.parametrize("failure", [(401, {}), (500, {})])
def test_an_endpoint_that_fails_half_way_keeps_what_is_there_and_goes_on_with_the_rest(
    rooms, capsys, failure
):
    with Server(lambda number, body: good_answer(number, body) if number <= 3 else failure) as server:
        assert run(server.url, rooms, "--concurrency", "1", "--attempts", "2") == 1
    said = capsys.readouterr().err
    assert f"status {failure[0]}" in said and "3 answers of this run are kept in" in said
    assert "5 are missing. The same command goes on with those." in said
    before = rows_of(rooms)
    assert len(before) == 3 and len(server.asked) == (4 if failure[0] == 401 else 3 + 5 * 2)
    with open(rooms.with_name("more.jsonl"), "a") as file:
        file.write('{"id": "0-7", "descr')  # as a kill in the middle of a write leaves it
    with Server(lambda number, body: good_answer(number + 100, body)) as server:
        assert run(server.url, rooms) == 0
    after = rows_of(rooms)
    assert after[:3] == before and len(after) == 8 and len(server.asked) == 5
    assert run("http://127.0.0.1:9/v1", rooms) == 0  # nothing is missing: nobody is asked


def test_nobody_listening_is_said(rooms, capsys):
    assert run(f"http://127.0.0.1:{free_port()}/v1", rooms, "--attempts", "1") == 1
    assert "no connection (ConnectError)" in capsys.readouterr().err


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
        assert run(server.url, rooms, "--retry_dropped") == 0 and len(rows_of(rooms)) == 8


def test_a_plan_asks_nothing(rooms, capsys):
    with Server(good_answer) as server:
        assert run(server.url, rooms, "--plan", "--usd_per_million_out", "1000") == 0
    assert not server.asked and not rooms.with_name("more.jsonl").exists()
    assert "at most 2,560 of answers, about $2.56" in capsys.readouterr().out


def test_the_grid_is_the_seeds_and_never_asks_for_what_is_held_out(rooms):
    wanted = list(requests(read_json_lines(rooms), 40, seed=3))
    assert wanted == list(requests(read_json_lines(rooms), 40, seed=3))
    assert wanted[:10] == list(requests(read_json_lines(rooms), 10, seed=3))
    assert wanted != list(requests(read_json_lines(rooms), 40, seed=4))
    assert {split_of(r.fields["setting"], r.fields["place"]) for r in wanted} == {"train"}
    with pytest.raises(ValueError, match="no room has a setting, a place and features"):
        list(requests([Dungeon({"mood": "calm"}, "x")], 1, seed=0))


def test_answers_are_taken_apart_and_judged():
    text = "Rope hangs from the bell. " * 10
    assert split_answer(f"Title: The Loft\n\nDescription: {text}\nMore.") == (
        "The Loft",
        text.strip() + " More.",
    )
    assert split_answer(text) == ("", text.strip())
    assert what_is_wrong(text.strip(), {"features": ["a bell rope"]}) == ""
    assert what_is_wrong(text.strip() + " and then", {}) == "cut off"
    assert what_is_wrong("**Loft** " + text.strip(), {}) == "refusal or talk about the task"
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
    port = free_port()
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(tmp_path / "gpt2")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(tmp_path / "serve.log", "w") as log:
        server = subprocess.Popen(command, env=environment(), stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "serve.log").read_text()
                time.sleep(0.2)
        more = ["--max_tokens", "30", "--concurrency", "2", "--timeout_seconds", "60", "--count", "2"]
        flags = [
            "--url",
            f"http://127.0.0.1:{port}/v1",
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
