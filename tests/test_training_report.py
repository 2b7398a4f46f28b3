"""The page and picture of a run: from whole and damaged files, safe, looked at in a real browser."""

import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from training.charts import Chart, Series, draw, in_percent, in_short, with_exponent
from training.recipe import TrainSettings
from training.record import read_run
from training.report import draw_losses, main, write_comparison, write_page
from training.settings import parse_settings, settings_as_yaml
from training.throughput import in_words

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def write_run(folder: Path, steps: int = 50, **settings) -> Path:
    """Files as a run leaves them, with text in them that no page must take for its own."""
    folder.mkdir()
    lines: list[dict] = []
    for step in range(1, steps + 1):
        lines.append({"step": step, "tokens": 100 * step, "loss": 8 / step, "learning_rate": 1e-3 / step,
                      "gradient_norm": 1.0 + 1 / step, "tokens_per_second": 5000.0 + step, "mfu": 0.31,
                      "elapsed_seconds": float(step), "spend_usd": 0.01 * step})  # fmt: skip
    lines[2]["loss"] = None  # a step that was skipped because its loss was not finite
    half, last = {"step": steps // 2, "tokens": 50 * steps}, {"step": steps, "tokens": 100 * steps}
    lines.append({**half, "validation_loss": 2.5, "bits_per_byte": 1.4})
    lines.append({**last, "validation_loss": 1.5, "bits_per_byte": 1.0})
    lines += [{**at, "hellaswag_acc_norm": 0.27, "hellaswag_questions": 1000} for at in (half, last)]
    write_lines(folder / "metrics.jsonl", lines)
    events = [
        {"event": "started", "unix_time": 1.7e9, "step": 0, "processes": 2, "parameters": 123_456,
         "device": HOSTILE, "peak_tflops": 989.4, "peak_source": "NVIDIA H100 datasheet, SXM",
         "command": ["train_accelerate.py", "--run_dir", "a b"], "versions": {"torch": "2.13"}},
        {"event": "skipped_step", "unix_time": 1.7e9 + 3, "step": 3},
        {"event": "stopped", "unix_time": 1.7e9 + 9, "step": 25, "reason": "a signal asked for it",
         "seconds": {"training": 20.0, "validation": 4.0}, "peak_memory_bytes": 2e9},
        {"event": "resumed", "unix_time": 1.7e9 + 60, "step": 25, "processes": 2, "device": "NVIDIA H100"},
        {"event": "finished", "unix_time": 1.7e9 + 99, "step": steps, "seconds": {"training": 25.0}},
    ]  # fmt: skip
    write_lines(folder / "events.jsonl", events)
    write_lines(folder / "samples.jsonl", [{"step": s, "prompt": "The", "text": HOSTILE} for s in (25, 50)])
    values = {"max_steps": steps, "price_per_gpu_hour_usd": 2.5, "sample_prompts": ["The"], "shards": HOSTILE}
    (folder / "settings.yaml").write_text(json.dumps({**values, **settings}))
    receipt = {
        "source": HOSTILE,
        "tokenizer": "gpt2",
        "training_tokens": 10_000,
        "data_fingerprint": "ab" * 32,
    }
    (folder / "data.json").write_text(json.dumps(receipt))
    return folder


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


class Tags(HTMLParser):
    """Start tags with their attributes, and the text between."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_the_page_tells_all_that_a_run_left(tmp_path):
    page = write_page(write_run(tmp_path / "a")).read_text()
    text = Tags(page).text
    for told in ("1.5000", "27.0%", "GPT-2 124M, all 10,042 questions", "31.0%", "$0.50", "max_steps",
                 "a signal asked for it", "1 skipped step", "went on", "train_accelerate.py --run_dir 'a b'",
                 "accelerate_configs/ddp.yaml --num_processes 2", "training 45 s", "tokens for training",
                 "123.5 k", "2.00 GB at most"):  # fmt: skip
        assert told in text, told
    assert 'http-equiv="refresh"' not in page


def test_a_run_in_progress_is_read_again_by_the_browser(tmp_path):
    run = write_run(tmp_path / "a")
    write_lines(run / "events.jsonl", [{"event": "started", "unix_time": 1.7e9, "step": 0}])
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        page = write_page(run).read_text()
    assert 'http-equiv="refresh"' in page and "running" in Tags(page).text
    page = write_page(run).read_text()  # its process has gone, and did not say goodbye
    assert 'http-equiv="refresh"' not in page and "Ended without notice after step 50" in Tags(page).text


def test_without_locks_a_run_that_has_written_lately_is_taken_to_go_on(tmp_path, monkeypatch):
    """On some network file systems nobody says if the process is there; the page once said it was not."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    run = write_run(tmp_path / "a")
    write_lines(run / "events.jsonl", [{"event": "started", "unix_time": 1.7e9, "step": 0}])
    (run / ".lock").touch()
    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert 'http-equiv="refresh"' in write_page(run).read_text()
    os.utime(run / "metrics.jsonl", (1.7e9, 1.7e9))
    page = write_page(run).read_text()
    assert 'http-equiv="refresh"' not in page and "Ended without notice after step 50" in Tags(page).text


@pytest.mark.parametrize(
    "settings, length, of",
    [
        ({"max_steps": 1000}, None, " of 1,000"),
        ({"max_steps": 1000, "batch_tokens": 100, "budget_tokens": 9_950}, None, " of 99"),
        (
            {"max_steps": 10**6, "budget_usd": 5.0},
            {"max_steps": 90, "budgets": {"budget_usd": 5.0}},
            " of 90",
        ),
        # Of another budget than today's; or of none: the settings count.
        ({"max_steps": 500, "budget_usd": 5.0}, {"max_steps": 90, "budgets": {"budget_usd": 4.0}}, " of 500"),
        ({"max_steps": 500, "budget_usd": 0.0}, {"max_steps": 90, "budgets": {"budget_usd": 0.0}}, " of 500"),
        ({"max_steps": 50}, None, ""),
    ],
)
def test_a_page_knows_the_length_that_budgets_leave(tmp_path, settings, length, of):
    run = write_run(tmp_path / "a", **settings)
    write_lines(run / "events.jsonl", [{"event": "started", "unix_time": 1.7e9, "step": 0}])
    if length:
        (run / "length.json").write_text(json.dumps(length))
    assert f"Ended without notice after step 50{of};" in Tags(write_page(run).read_text()).text


@pytest.mark.parametrize(
    "started, settings, command, alike",
    [
        ({"device": "CPU (x86_64, 2 threads)"}, {}, "accelerate launch {}", "give the same bits."),
        ({"device": "NVIDIA H100"}, {}, "accelerate launch {}", "but for the rounding of GPU kernels"),
        ({"device": "NVIDIA H100"}, {"deterministic": True}, "accelerate launch {}", "give the same bits."),
        ({"device": "CPU"}, {"budget_usd": 5.0}, "accelerate launch {}", "fitted to its budget anew"),
        ({"processes": 8, "sharding": "FSDP"}, {},
         "accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 8 {}", ""),
        ({"processes": 16, "machines": 2, "sharding": "MULTI_GPU"}, {},
         "accelerate launch --config_file accelerate_configs/multi_node.yaml --num_processes 16 "
         "--num_machines 2 --machine_rank RANK --main_process_ip ADDRESS {}", ""),
    ],
)  # fmt: skip
def test_the_page_says_how_to_start_the_run_again_and_how_alike_it_will_be(
    tmp_path, started, settings, command, alike
):
    """Both commands with the launcher's flags: without them FSDP2 was once plain data parallelism."""
    run = write_run(tmp_path / "a", **settings)
    event = {"event": "started", "unix_time": 1.7e9, "versions": {"torch": "2.13"}}
    event["command"] = ["train_accelerate.py", "--seed", "2"]
    write_lines(run / "events.jsonl", [{**event, **started}])
    text = Tags(write_page(run).read_text()).text
    assert command.format("train_accelerate.py --seed 2") in text and alike in text
    assert command.format(f"train_accelerate.py --config {run}/settings.yaml --run_dir {run}-again") in text


def test_the_run_that_is_started_again_does_not_push_over_the_first(tmp_path, capsys):
    """The command is tried: settings that do not fit together are refused."""
    hub = {"push_to_hub": True, "hub_model_id": "me/model", "hub_private": True, "hub_strategy": "every_save"}
    run = write_run(tmp_path / "a")
    (run / "settings.yaml").write_text(settings_as_yaml(TrainSettings(**hub)))
    text = Tags(write_page(run).read_text()).text
    command = text.partition("in a new folder:")[2].partition("torch 2.13")[0]
    words = shlex.split(command)
    settings = parse_settings(TrainSettings, words[words.index("--config") :])
    assert not settings.push_to_hub and settings.hub_model_id == "" and settings.run_dir == f"{run}-again"


def test_no_text_of_a_run_becomes_markup_and_nothing_is_loaded(tmp_path):
    page = write_page(write_run(tmp_path / "a")).read_text()
    tags = Tags(page)
    assert not {"script", "img", "link", "iframe", "object"} & {tag for tag, _ in tags.found}
    names = {name for _, attributes in tags.found for name in attributes}
    assert not names & {"src", "href", "onerror", "onload", "onclick"}
    assert "url(" not in page and "@import" not in page and "default-src 'none'" in page
    assert tags.text.count("alert(1)") >= 4  # prompt's text, device, shards, source: all as text


def test_published_lines_are_drawn_only_where_they_are_comparable(tmp_path):
    run = write_run(tmp_path / "a")
    assert "llm.c" not in write_page(run).read_text()
    receipt = {"source": "hub:HuggingFaceFW/fineweb", "vocab_size": 50257}
    (run / "data.json").write_text(json.dumps(receipt))
    assert "llm.c, GPT-2 124M, 10 B tokens of FineWeb: 3.272" in write_page(run).read_text()
    (run / "data.json").write_text(json.dumps({**receipt, "source": "fineweb-edu"}))
    page = write_page(run).read_text()
    assert "llm.c" not in page and "GPT-2 124M on FineWeb-Edu, by build-nanogpt: 3.292" in page
    other = write_run(tmp_path / "b")
    assert "build-nanogpt" not in write_comparison([run, other], tmp_path / "both.html").read_text()
    (run / "data.json").write_text(json.dumps({**receipt, "vocab_size": 4096}))
    assert "llm.c" not in write_page(run).read_text()


def test_a_metrics_file_truncated_in_the_middle_of_a_line_is_said_and_left_out(tmp_path):
    run = write_run(tmp_path / "a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 51, "tok')
    (run / "data.json").write_text("{")
    record = read_run(run)
    assert len(record.metrics) == 54 and len(record.problems) == 2
    text = Tags(write_page(run).read_text()).text
    assert "one line of metrics.jsonl could not be read and is left out (line 55)" in text
    assert "data.json could not be read" in text


def test_a_run_without_validation_events_or_samples_has_its_page(tmp_path):
    run = write_run(tmp_path / "a")
    lines = [{"step": step, "tokens": 10 * step, "loss": 3.0} for step in range(1, 4)]
    write_lines(run / "metrics.jsonl", lines)
    for name in ("events.jsonl", "samples.jsonl", "settings.yaml", "data.json"):
        (run / name).unlink()
    text = Tags(write_page(run).read_text()).text
    assert "the run has no validation set" in text and "Training loss3.0000" in text
    assert draw_losses([run], tmp_path / "alone.png").read_bytes().startswith(PNG_SIGNATURE)


def test_runs_are_laid_side_by_side(tmp_path, capsys):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", steps=10, max_steps=12)
    main([str(first), str(second)])
    picture, page = map(Path, capsys.readouterr().out.split())
    assert (picture, page) == (first / "loss.png", first / "comparison.html")
    assert picture.read_bytes().startswith(PNG_SIGNATURE)
    text = Tags(page.read_text()).text
    assert "2 runs side by side" in text and "a, validation" in text and "b, validation" in text
    assert "max_steps5012" in text and "price_per_gpu_hour_usd" not in text  # only what differs
    main([str(first), "--output", str(tmp_path / "alone.png")])
    assert (tmp_path / "alone.png").read_bytes() != picture.read_bytes() and (first / "report.html").exists()


@pytest.mark.parametrize(
    "content, reason", [(None, "has no metrics.jsonl"), ("", "no step"), ("x\n{}\n", "no step")]
)
def test_what_is_no_run_is_refused_with_its_reason(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(SystemExit, match=reason):
        main([str(tmp_path)])


def test_a_chart_leaves_out_what_is_not_finite_and_is_nothing_without_points():
    def chart(points, **more):
        return Chart("Loss", "nats", [Series("a", points)], str, **more)

    assert draw(chart([])) == "" and draw(chart([(1.0, float("nan"))])) == ""
    for points in (
        [(1.0, 2.0)],
        [(0.0, 0.0), (0.0, 0.0)],
        [(float(i), float("nan" if i % 2 else i)) for i in range(99)],
    ):
        html = draw(chart(points)) + draw(chart(points, log=True))
        assert "nan" not in html and "inf" not in html and "<path" in html


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "low, high", [(0.3, 0.305), (0.3, 0.3), (1.3, 1.6), (1.0, 900.0), (9.231e3, 9.233e3)]
)
@pytest.mark.parametrize("form", [in_percent, in_short])
def test_an_axis_has_some_labels_and_no_two_alike(log, low, high, form):
    """MFU was once at 30%, 30% and 31%; a gradient norm between 1.3 and 1.6 had no label at all."""
    points = [(float(x), low + (high - low) * x / 9) for x in range(10)]
    html = draw(Chart("", "", [Series("a", points)], form, log=log))
    labels = re.findall(r'<span class="y"[^>]*>([^<]*)</span>', html)
    assert len(labels) >= 2 and len(set(labels)) == len(labels), labels


def test_numbers_are_short_and_times_are_in_words():
    assert [in_short(n) for n in (0, 999, 1500, 2_500_000, 10**10)] == ["0", "999", "1.5 k", "2.5 M", "10 B"]
    assert [with_exponent(n) for n in (0, 6e-4, 2.5e-5, 0.5)] == ["0", "6e-4", "2.5e-5", "0.5"]
    assert [in_words(s) for s in (45, 720, 12_000, 187_200)] == ["45 s", "12 min", "3 h 20 min", "2 d 4 h"]


CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
LOOK = """
import sys
from playwright.sync_api import sync_playwright
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=sys.argv[1], args=["--no-sandbox"])
    for scheme in ("light", "dark"):
        for width, height in ((390, 844), (1280, 900)):
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            page, said, asked = context.new_page(), [], []
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            page.goto("file://" + sys.argv[2])
            assert said == [] and len(asked) == 1, (said, asked)
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, f"{wide} pixels on a page of {width}"
            plots = page.eval_on_selector_all(".plot", "all => all.map(e => [e.clientWidth, e.clientHeight])")
            assert len(plots) >= 5 and all(w > 200 and h > 100 for w, h in plots), plots
            style = "getComputedStyle(document.body)."
            paper, ink = (page.evaluate(style + name) for name in ("backgroundColor", "color"))
            light = [sum(int(part) for part in c[4:-1].split(",")[:3]) > 384 for c in (paper, ink)]
            assert light == ([True, False] if scheme == "light" else [False, True]), (scheme, paper, ink)
            context.close()
    browser.close()
print("looked")
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("runs", [1, 2])
def test_the_page_in_a_real_browser_on_a_phone_and_a_desktop_light_and_dark(tmp_path, runs):
    """No overflow to the side, no word in the console, no request but for the page itself."""
    pytest.importorskip("playwright")
    names = [write_run(tmp_path / f"run-{'with-a-long-name-' * 6}{number}") for number in range(runs)]
    main([str(name) for name in names])
    page = names[0] / ("report.html" if runs == 1 else "comparison.html")
    # In a process of its own: Playwright leaves an event loop behind.
    done = subprocess.run(
        [sys.executable, "-c", LOOK, CHROMIUM, str(page)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "looked", done.stderr[-2000:]
