"""Writers side by side: the numbers of their texts, the endpoints, the judge, the whole script."""

import http.server
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel

from data.tokenizer import gpt2_tokenizer, train_tokenizer
from evaluation.comparison import chart, page, table
from evaluation.diversity import CopyIndex, distinct, field_coverage, mentions, repetition
from evaluation.dungeons import bits_per_byte, describe_texts, read_rooms
from evaluation.endpoint import Endpoint, EndpointError
from evaluation.judge import Verdict, bradley_terry, compare_blind, parse_verdict, rate

ROOT = Path(__file__).parent.parent
ROWS = [
    {
        "title": "The Salt Stair",
        "place": "stairwell",
        "mood": "uneasy",
        "features": ["a rusted bell", "white crust on the walls"],
        "description": "White crust flakes from the stairwell's walls. A rusted bell hangs over the drop.",
    },
    {
        "place": "cistern",
        "description": "Black water, and the sound of one drop falling. The cistern has no far wall.",
    },
]


@pytest.fixture
def rooms(tmp_path):
    path = tmp_path / "rooms.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return read_rooms(path)


# Numbers about texts


def test_distinct_counts_ngrams_over_all_texts_together():
    texts = ["a cold hall", "a cold well"]
    assert distinct(texts, 1) == 4 / 6 and distinct(texts, 2) == 3 / 4 and distinct(texts, 3) == 1.0
    assert distinct([""], 2) == 0.0


def test_repetition_is_the_share_of_ngrams_said_before():
    assert repetition("the torch burns low and the rats wait in the dark") == 0.0
    assert repetition("drip " * 13) == pytest.approx(9 / 10)  # ten 4-grams, one of them new


def test_a_request_is_found_whatever_its_words_endings():
    assert mentions("Two torches gutter beside rusting bells.", "a rusted bell")
    assert not mentions("The bellows are cold.", "a rusted bell")
    row = {name: value for name, value in ROWS[0].items() if name != "description"}
    assert field_coverage(ROWS[0]["description"], row) == {
        "title": 0.0,  # neither salt nor a stair: "stairwell" is another word
        "place": 1.0,
        "mood": 0.0,
        "features": 1.0,
    }
    assert field_coverage("anything", {"exits": [], "mood": ""}) == {}  # nothing was asked


def test_copied_spans_and_13_grams_are_found_wherever_they_start():
    training = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    index = CopyIndex(["something else entirely, with more words in it", training])
    copied = "now " + " ".join(training.split()[1:15]) + " then"
    assert index.longest_span(copied) == 14
    assert index.overlap(copied) == pytest.approx(2 / 4)  # of sixteen words' four 13-grams
    assert index.longest_span("four three two one") == 0 and index.overlap("too short") == 0.0


def test_bits_per_byte_counts_the_description_alone(rooms):
    tokenizer = train_tokenizer([row["description"] for row in ROWS] * 4, 290)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=290, n_positions=256, initializer_range=0.2)
    ).eval()
    nats = 0.0
    for room in rooms:
        prompt = tokenizer(room.prompt)["input_ids"]
        row = prompt + tokenizer(" " + room.description)["input_ids"]
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        nats -= sum(logs[i - 1, row[i]].item() for i in range(len(prompt), len(row)))
    size = sum(len(row["description"].encode()) for row in ROWS)
    ours = bits_per_byte(model, tokenizer, rooms, Accelerator(cpu=True))
    assert ours == pytest.approx(nats / 0.6931471805599453 / size, rel=1e-5)  # float32 sums


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"place": "crypt"}', "line 1: description is None"),
        ('{"description": "x"}', "line 1: none of title"),
        ("", "holds no rows"),
    ],
)
def test_rows_that_ask_for_nothing_or_show_nothing_are_named(tmp_path, line, message):
    path = tmp_path / "rooms.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_rooms(path)


# Endpoints: a real server on the loopback, with moods


class Server:
    """Answers each request with the next of `answers` (the last one again and again); keeps what it was
    asked.

    An answer is a text, a status with headers, raw bytes, or seconds to stay silent.
    """

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append((self.path, body))
                answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
                answer = answer(body) if callable(answer) else answer
                status, headers, payload = 200, {}, b""
                if isinstance(answer, float):
                    time.sleep(answer)
                elif isinstance(answer, tuple):
                    status, headers = answer
                elif isinstance(answer, bytes):
                    payload = answer
                else:
                    payload = json.dumps(
                        {"choices": [{"message": {"content": answer}, "text": answer}]}
                    ).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(payload)

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


def test_an_endpoint_that_is_slow_overrun_and_confused_is_asked_again_and_all_is_counted():
    busy, nonsense = (429, {"Retry-After": "0.05"}), b"<html>oops"
    with Server(busy, 1.0, nonsense, b'{"choices": []}', (503, {}), "   ", "a vaulted hall") as server:
        endpoint = Endpoint(server.url, "m", timeout_seconds=0.4, attempts=7, first_pause_seconds=0.01)
        assert endpoint.complete("Describe it.", max_tokens=20) == "a vaulted hall"
    assert endpoint.retries == {
        "status 429": 1,
        "no answer within 0.4 s": 1,
        "malformed answer": 2,
        "status 503": 1,
        "empty answer": 1,
    }
    path, body = server.asked[-1]
    assert path == "/v1/chat/completions" and body["messages"][0]["content"] == "Describe it."


def test_what_fails_for_good_stands_in_its_place_and_a_refusal_is_not_repeated():
    with Server(lambda body: (401, {}) if "secret" in body["prompt"] else "fine") as server:
        endpoint = Endpoint(server.url, "m", chat=False, first_pause_seconds=0.01)
        first, second = endpoint.complete_all(["hello", "secret"], max_tokens=5)
    assert first == "fine" and isinstance(second, EndpointError) and "401" in str(second)
    assert len(server.asked) == 2 and server.asked[0][0] == "/v1/completions"


def test_nobody_listening_is_an_error_that_says_so():
    with Server("x") as server:
        url = server.url
    with pytest.raises(EndpointError, match="no connection"):
        Endpoint(url, "m", attempts=2, first_pause_seconds=0.01).complete("x", max_tokens=1)


# The judge


@pytest.mark.parametrize(
    ("answer", "score"),
    [("1", 1.0), ("Text 2.", 0.0), ("Tie!", 0.5), ("1 or 2", None), ("the first", None), ("12", None)],
)
def test_a_verdict_is_one_word_or_none(answer, score):
    assert parse_verdict(answer) == score


def prefers_long(body):
    """A judge with a mind of its own: the longer text wins, wherever it stands."""
    prompt = body["messages"][0]["content"]
    first, rest = prompt.split("Text 1:\n")[1].split("\n\nText 2:\n")
    second = rest.split("\n\nWhich text")[0]
    return "1" if len(first) > len(second) else "2" if len(second) > len(first) else "tie"


def test_every_pair_is_read_in_both_orders_and_the_better_writer_is_rated_higher():
    texts = {"short": ["a", "b"], "long": ["a long text", "another one"], "longest": ["x" * 40, "y" * 40]}
    with Server(prefers_long) as server:
        verdicts = compare_blind(Endpoint(server.url, "judge"), ["q1", "q2"], texts)
    assert len(verdicts) == len(server.asked) == 2 * 3 * 2
    assert {(v.first, v.second) for v in verdicts} >= {("short", "long"), ("long", "short")}
    asked = [body["messages"][0]["content"] for _, body in server.asked]
    assert not any("longest" in prompt for prompt in asked)  # blind: no writer's name reaches the judge
    ratings = rate(verdicts)
    assert ratings["short"].value < ratings["long"].value < ratings["longest"].value
    assert all(rating.low <= rating.value <= rating.high for rating in ratings.values())


def test_a_judge_that_always_says_1_rates_all_alike():
    with Server("1") as server:
        verdicts = compare_blind(Endpoint(server.url, "judge"), ["q"] * 3, {"a": ["x"] * 3, "b": ["y"] * 3})
    for rating in rate(verdicts).values():
        assert rating.value == pytest.approx(0.0, abs=1e-9)


def test_nonsense_is_asked_again_and_stays_visible_as_unusable():
    with Server("Both are lovely.") as server:
        verdicts = compare_blind(Endpoint(server.url, "judge"), ["q"], {"a": ["x"], "b": ["y"]}, attempts=2)
    assert [verdict.score for verdict in verdicts] == [None, None] and len(server.asked) == 4
    with pytest.raises(ValueError, match="none of the judge's 2 answers"):
        rate(verdicts)


def test_ratings_recover_the_odds_that_made_the_games():
    """Ten to one is 400 points; one virtual tie a pair pulls that in by under 1% at 1,100 games."""
    games = [Verdict(n, "a", "b", 1.0) for n in range(1000)] + [Verdict(n, "b", "a", 1.0) for n in range(100)]
    ratings = bradley_terry(["a", "b"], games)
    assert ratings["a"] - ratings["b"] == pytest.approx(400, rel=0.01)


# MAUVE


def tiny_gpt2(folder: Path, seed: int = 0, **settings) -> GPT2LMHeadModel:
    """A stock GPT-2 folder with a tokenizer trained on the rows."""
    tokenizer = train_tokenizer([row["description"] for row in ROWS] * 4, 290)
    torch.manual_seed(seed)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=290, n_positions=256, **settings)
    config.eos_token_id = config.bos_token_id = 289
    model = GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.skipif(importlib.util.find_spec("mauve") is None, reason="mauve-text is not installed")
def test_mauve_tells_texts_of_the_same_kind_from_noise(tmp_path):
    """With the real package, and features of a model of our own."""
    from evaluation.mauve_score import mauve_scores

    tiny_gpt2(tmp_path / "features", initializer_range=0.3)
    halls = [f"White crust flakes from the stairwell's walls, {n} steps down." for n in range(60)]
    texts = {"person": halls[::2], "alike": halls[1::2], "noise": ["drip drip"] * 29 + [""]}
    scores = mauve_scores(texts, "person", str(tmp_path / "features"), Accelerator(cpu=True))
    assert set(scores) == {"alike", "noise"} and scores["noise"] < 0.2 < 0.5 < scores["alike"] <= 1
    with pytest.raises(ValueError, match="texts of 'person' to compare with"):
        mauve_scores({"person": [""]}, "person", str(tmp_path / "features"), Accelerator(cpu=True))


def test_mauve_without_its_package_is_an_error_before_anything_is_written(tmp_path):
    """In a process that cannot see the package, as on a machine without it."""
    (tmp_path / "rooms.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'mauve' else find(name, *rest)\n"
        f"sys.argv = ['eval_dungeons.py', '--models', 'none', '--mauve_model', 'none', '--data', "
        f"{str(tmp_path / 'rooms.jsonl')!r}, '--train_data', {str(tmp_path / 'rooms.jsonl')!r}]\n"
        "import eval_dungeons; eval_dungeons.main()"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "pip install mauve-text" in done.stderr
    assert "writing" not in done.stdout


# What people look at


def test_the_page_on_a_phone_shows_who_wrote_what_on_a_click_and_nothing_overflows(tmp_path):
    """In a real browser, light and dark."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if (browser_path := shutil.which("chromium")) is None:
        pytest.skip("no chromium on this machine")
    texts = {"ours": ["A dry well. " * 30] * 2, "far/larger-model-with-a-long-name-70b": ["x" * 300, ""]}
    page(["Place: well\nDescription:"] * 2, texts, tmp_path / "blind.html")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        grounds = set()
        for scheme in ("light", "dark"):
            view = browser.new_page(viewport={"width": 360, "height": 700}, color_scheme=scheme)
            view.goto((tmp_path / "blind.html").as_uri())
            assert view.evaluate("document.documentElement.scrollWidth") <= 360
            grounds.add(view.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert "ours" not in view.inner_text("body") and "larger-model" not in view.inner_text("body")
            for summary in view.query_selector_all("summary"):
                summary.click()
            shown = view.inner_text("body")
            assert shown.count("ours") == 2 and shown.count("larger-model") == 2
            assert view.evaluate("document.documentElement.scrollWidth") <= 360
        assert len(grounds) == 2
        browser.close()


def test_the_page_hides_names_escapes_texts_and_shuffles_for_each_request(tmp_path):
    texts = {"ours": ["<b>bold</b>"] * 12, "theirs": ["plain & simple"] * 12}
    page([f"request {n}" for n in range(12)], texts, tmp_path / "blind.html")
    content = (tmp_path / "blind.html").read_text()
    assert "<b>bold" not in content and "&lt;b&gt;bold" in content and "plain &amp; simple" in content
    assert content.count("<details><summary>who wrote this?</summary>ours</details>") == 12
    sections = content.split("<section>")[1:]
    assert 0 < sum(section.index("bold") < section.index("plain") for section in sections) < 12


def test_the_table_and_the_chart_show_every_number_that_anyone_has(tmp_path, rooms):
    person = describe_texts([room.description for room in rooms], rooms, None)
    results = {"person": person, "model": {"bits_per_byte": 1.234}}
    shown = table(results)
    assert "1.234" in shown and "distinct-2" in shown and "MAUVE" not in shown
    chart(results, tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_script_compares_two_models_a_contestant_and_a_judge(tmp_path):
    for seed, name in enumerate(("first", "second")):
        tiny_gpt2(tmp_path / name, seed)
    (tmp_path / "rooms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with Server(
        lambda b: prefers_long(b) if "Text 2:" in b["messages"][0]["content"] else "A dry well."
    ) as server:
        command = [sys.executable, str(ROOT / "eval_dungeons.py"), "--models", "first", "second"]
        command += ["--data", "rooms.jsonl", "--train_data", "rooms.jsonl", "--output", "out"]
        command += ["--max_new_tokens", "12", "--dtype", "float32"]
        command += ["--contestants", "big", "--contestant_url", server.url]
        command += ["--judge_url", server.url, "--judge_model", "j"]
        env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(report["results"]) == {"held-out descriptions", "first", "second", "big"}
    assert report["results"]["first"]["bits_per_byte"] > 0 and report["results"]["big"]["failed"] == 0
    assert (
        report["results"]["held-out descriptions"]["copied_13_grams"] == 1.0
    )  # it is its own training set here
    assert report["texts"]["big"] == ["A dry well."] * 2
    assert len(report["verdicts"]) == 2 * 4 * 3 and report["judge"]["unusable"] == 0
    assert (tmp_path / "out" / "results.png").exists() and (tmp_path / "out" / "blind.html").exists()


@pytest.mark.slow
def test_the_script_works_with_transformers_serve_as_contestant_and_judge(tmp_path):
    """The real server and small stock GPT-2 folders; the judge's weights make it say "1" to everything."""
    pytest.importorskip("uvicorn", reason="transformers serve needs uvicorn")
    pytest.importorskip("fastapi", reason="transformers serve needs fastapi")
    tiny_gpt2(tmp_path / "writer", initializer_range=0.3)
    tokenizer = gpt2_tokenizer()
    judge = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=1024))
    with torch.no_grad():
        judge.transformer.ln_f.weight.zero_()
        judge.transformer.ln_f.bias.fill_(1.0)
        judge.transformer.wte.weight[tokenizer(" tie")["input_ids"]] = 5.0
        judge.transformer.wte.weight[tokenizer(" 1")["input_ids"]] = 9.0
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    (tmp_path / "rooms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--host", "127.0.0.1"]
    with (tmp_path / "serve.log").open("w") as log:
        command += ["--port", str(port), "--device", "cpu"]
        server = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "serve.log").read_text()
                time.sleep(0.5)
        url = f"http://127.0.0.1:{port}/v1"
        command = [sys.executable, str(ROOT / "eval_dungeons.py"), "--data", "rooms.jsonl"]
        command += ["--train_data", "rooms.jsonl", "--max_new_tokens", "12", "--output", "out"]
        command += ["--contestants", str(tmp_path / "writer"), "--contestant_url", url]
        command += ["--contestant_api", "completions", "--judge_url", url]
        command += ["--judge_model", str(tmp_path / "judge"), "--judge_api", "completions"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    finally:
        server.terminate()
        server.wait(timeout=30)
    assert done.returncode == 0, done.stderr + (tmp_path / "serve.log").read_text()
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["results"][str(tmp_path / "writer")]["failed"] == 0
    assert all(report["texts"][str(tmp_path / "writer")])
    assert [verdict["score"] for verdict in report["verdicts"]] == [1.0] * 4
    assert report["judge"]["unusable"] == 0
