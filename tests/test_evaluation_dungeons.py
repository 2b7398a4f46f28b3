"""Writers side by side: the numbers of their texts, what people look at, the whole script."""

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel

import eval_dungeons
from data.tokenizer import gpt2_tokenizer, train_tokenizer
from evaluation.comparison import chart, draw, page, table
from evaluation.diversity import CopyIndex, distinct, field_coverage, mentions, repetition
from evaluation.dungeons import bits_per_byte, describe_texts, read_rooms
from tests.endpoint_server import Server, prefers_long
from tests.processes import ROOT, end, environment, run, run_script

SCRIPT = ROOT / "eval_dungeons.py"
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


def test_a_request_of_function_words_can_be_met():
    """The exits "up" and "out" once counted as never mentioned."""
    assert mentions("Stairs lead up into the dark.", "up") and not mentions("A flat hall.", "up")
    assert field_coverage("A ladder goes up.", {"exits": ["up", "out"]}) == {"exits": 0.5}
    assert not mentions("It is up to you.", "up the broken ladder")  # where there is more, that is asked for


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


def test_a_writer_that_returns_nan_is_an_error(rooms):
    """Its bits per byte were once NaN, and results.json no JSON."""
    tokenizer = train_tokenizer([row["description"] for row in ROWS] * 4, 290)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=290, n_positions=256))
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity on 2 of 2 descriptions"):
        bits_per_byte(model, tokenizer, rooms, Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: Expecting property name"),
        ("[1]", "line 1: a list, not an object"),
        ('{"place": "crypt"}', "line 1: description is None"),
        ('{"place": "crypt", "description": 5}', "line 1: description is 5"),
        ('{"description": "x"}', "line 1: none of title"),
        ('{"place": 5, "description": "x"}', "line 1: place is 5; a text"),
        ('{"features": ["bell", 1], "description": "x"}', r"line 1: features is \['bell', 1\]"),
        ('{"features": {"a": "b"}, "description": "x"}', "line 1: features is {"),
        ('{"prompt": 5, "description": "x"}', "line 1: prompt is 5"),
        ("", "holds no rows"),
    ],
)
def test_rows_that_ask_for_nothing_or_show_nothing_are_named(tmp_path, line, message):
    path = tmp_path / "rooms.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_rooms(path)


def test_a_line_ends_where_json_lines_end_and_a_limit_leaves_something(tmp_path):
    """A raw U+2028, which JSON allows in a text, once cut the line in two."""
    path = tmp_path / "rooms.jsonl"
    row = {"place": "well", "description": "Black\u2028water\u0085 here."}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    (room,) = read_rooms(path)
    assert room.description == row["description"]
    with pytest.raises(ValueError, match="limit of -1 rows leaves none"):
        read_rooms(path, limit=-1)


def test_rooms_without_an_answer_are_left_out_of_every_number(rooms):
    numbers = describe_texts([None, "A dry cistern."], rooms, CopyIndex([]))
    assert (numbers["failed"], numbers["empty"], numbers["words"]) == (1, 0, 3)
    assert numbers["coverage"] == {"place": 1.0}  # the first room's fields do not count


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
    done = run([sys.executable, "-c", code], tmp_path)
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
    texts = {"ours": ["<b>bold</b>"] * 12, "theirs": ["plain & simple"] * 12, "dumb": [None] * 11 + [""]}
    page([f"request {n}" for n in range(12)], texts, tmp_path / "blind.html")
    content = (tmp_path / "blind.html").read_text()
    assert "<b>bold" not in content and "&lt;b&gt;bold" in content and "plain &amp; simple" in content
    assert content.count("<details><summary>who wrote this?</summary>ours</details>") == 12
    assert content.count("<em>no answer</em>") == 11 and content.count("<em>no text</em>") == 1
    sections = content.split("<section>")[1:]
    assert 0 < sum(section.index("bold") < section.index("plain") for section in sections) < 12


def test_the_table_and_the_chart_show_every_number_that_anyone_has(tmp_path, rooms):
    person = describe_texts([room.description for room in rooms], rooms, None)
    rating = {"rating": 12.3, "rating_95": [-40.0, 61.0]}
    results = {"person": person, "model": {"bits_per_byte": 1.234, "failed": 2, **rating}}
    shown = table(results)
    assert "1.234" in shown and "distinct-2" in shown and "MAUVE" not in shown
    assert "+12 [-40, +61]" in shown and "no answer" in shown and "empty texts" not in shown

    by_title = {axes.get_title(): axes for axes in draw(results).axes}
    (bar,) = by_title["bits/byte"].patches  # the person's would be 0, the best of all
    assert bar.get_width() == pytest.approx(1.234) and round(bar.get_y() + bar.get_height() / 2) == 1
    labels = [label.get_text() for label in by_title["bits/byte"].get_yticklabels()]
    assert labels == ["person (none)", "model"]
    assert [bar.get_width() for bar in by_title["distinct-2"].patches] == [person["distinct_2"]]
    chart(results, tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to compare"),
        (["--contestants", "a"], "belong together"),
        (["--models", "m", "--judge_url", "http://x"], "belong together"),
        (["--models", "m", "m"], "m stands there twice"),
        (["--models", "m", "--contestants", "m", "--contestant_url", "http://x"], "m stands there twice"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_is_loaded(
    monkeypatch, capsys, arguments, message
):
    """Of two writers of one name the second once replaced the first, silently."""
    monkeypatch.setattr(sys, "argv", ["eval_dungeons.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        eval_dungeons.main()
    assert message in capsys.readouterr().err


def writer_or_judge(body):
    prompt = body["messages"][0]["content"]
    return prefers_long(body) if "Text 2:" in prompt else "A dry well."


@pytest.fixture
def writers(tmp_path):
    """Arguments that compare two local models on the two rows, in `tmp_path`."""
    for seed, name in enumerate(("first", "second")):
        tiny_gpt2(tmp_path / name, seed)
    (tmp_path / "rooms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    arguments = ["--models", "first", "second", "--data", "rooms.jsonl", "--train_data", "rooms.jsonl"]
    return [*arguments, "--max_new_tokens", "12", "--dtype", "float32", "--output", "out"]


@pytest.mark.slow
def test_the_script_compares_two_models_a_contestant_and_a_judge(tmp_path, writers):
    with Server(writer_or_judge) as server:
        others = ["--contestants", "big", "--contestant_url", server.url]
        others += ["--judge_url", server.url, "--judge_model", "j"]
        run_script(SCRIPT, *writers, *others, cwd=tmp_path)
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(report["results"]) == {"held-out descriptions", "first", "second", "big"}
    assert report["results"]["first"]["bits_per_byte"] > 0 and report["results"]["big"]["failed"] == 0
    assert (
        report["results"]["held-out descriptions"]["copied_13_grams"] == 1.0
    )  # it is its own training set here
    assert report["texts"]["big"] == ["A dry well."] * 2
    asked = [body for _, body in server.asked if "Text 2:" not in body["messages"][0]["content"]]
    assert {(body["temperature"], body["top_p"], body["max_tokens"]) for body in asked} == {(0.9, 0.95, 12)}
    assert len(report["verdicts"]) == 2 * 4 * 3 and report["judge"]["unusable"] == {}
    assert (tmp_path / "out" / "results.png").exists() and (tmp_path / "out" / "blind.html").exists()


@pytest.mark.slow
def test_texts_are_there_before_the_judge_is_asked_and_are_not_written_again(tmp_path, writers):
    """A judge that failed once took every text with it."""
    with Server((401, {})) as server:
        judge = ["--judge_url", server.url, "--judge_model", "j"]
        done = run([sys.executable, str(SCRIPT), *writers, *judge], tmp_path)
    assert done.returncode == 1 and "the judge gave no verdict" in done.stderr
    assert "without a verdict: status 401" in done.stdout
    assert (tmp_path / "out" / "results.json").exists()
    path = tmp_path / "out" / "texts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    assert len(rows) == 2
    rows[0]["texts"][0] = "planted"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_gpt2(tmp_path / "second", seed=7)  # the same name, other weights
    run_script(SCRIPT, *writers, cwd=tmp_path)
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["texts"]["first"] == ["planted", rows[0]["texts"][1]]
    assert report["texts"]["second"] != rows[1]["texts"]


@pytest.mark.slow
def test_of_several_processes_one_does_the_work_and_writes_the_files(tmp_path, writers):
    """All once did everything, and wrote the same files at the same time."""
    printed = run_script(SCRIPT, *writers, cwd=tmp_path, processes=2)
    assert printed.count("written: results.json") == 1
    lines = (tmp_path / "out" / "texts.jsonl").read_text().split()
    assert len([line for line in lines if line.startswith('{"asked"')]) == 2


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
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--host", "127.0.0.1"]
    command += ["--port", "0", "--device", "cpu", "--log-level", "info"]  # on a port that it finds itself
    said = tmp_path / "serve.log"
    with said.open("w") as log:
        server = subprocess.Popen(
            command, cwd=tmp_path, env=environment(), stdout=log, stderr=log, start_new_session=True
        )
    try:
        address = None
        while address is None:
            assert server.poll() is None, said.read_text()
            address = re.search(r"running on (http://127\.0\.0\.1:\d+)", said.read_text())
            time.sleep(0.2)
        url = f"{address.group(1)}/v1"
        assert urllib.request.urlopen(f"{address.group(1)}/health", timeout=60).status == 200
        arguments = ["--data", "rooms.jsonl", "--train_data", "rooms.jsonl", "--max_new_tokens", "12"]
        arguments += ["--contestants", str(tmp_path / "writer"), "--contestant_url", url, "--output", "out"]
        arguments += ["--contestant_api", "completions", "--judge_url", url]
        arguments += ["--judge_model", str(tmp_path / "judge"), "--judge_api", "completions"]
        done = run([sys.executable, str(SCRIPT), *arguments], tmp_path)
    finally:
        end(server)
    assert done.returncode == 0, done.stderr + said.read_text()
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["results"][str(tmp_path / "writer")]["failed"] == 0
    assert all(report["texts"][str(tmp_path / "writer")])
    assert [verdict["score"] for verdict in report["verdicts"]] == [1.0] * 4
    assert report["judge"]["unusable"] == {}
