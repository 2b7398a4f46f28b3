"""What stands behind the page: texts that a seed decides and that end when nobody reads on."""

import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from app import MAX_FIELD_CHARACTERS, MAX_NEW_TOKENS, fitting_fields, read_rooms, roll
from data.dungeons import FIELDS, build_prompt
from release.export import export_stock
from space.entries import Entry, clean, entry_as_html, model_as_html, without_folders
from space.writer import SampleByRow, Writer
from tests.app_toys import PATIENCE_SECONDS, write_writer
from tests.test_release_export import write_export

FIELDS_ASKED = {"setting": "sewer", "features": "bell, rope"}


def load(folder, **more) -> Writer:
    writer = Writer(str(folder), torch.device("cpu"), **more)
    writer.load()
    wait_until(lambda: writer.state != "loading")
    return writer


def wait_until(condition) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    return load(write_writer(tmp_path_factory.mktemp("model") / "export", ends=True))


def last(writer, seeds, fields=FIELDS_ASKED, temperature=0.7, tokens=40):
    return list(writer.write(fields, seeds, temperature, tokens))[-1]


def test_a_text_depends_on_its_seed_and_not_on_its_neighbours_or_on_who_else_writes(writer):
    together = last(writer, [5, 6, 7])
    assert len({text for text, _ in together}) == 3
    torch.manual_seed(1)  # the state that others may use is none of ours
    assert last(writer, [5, 6, 7]) == together
    assert [last(writer, [seed])[0] for seed in (5, 6, 7)] == together
    with ThreadPoolExecutor(3) as pool:
        assert [one[0] for one in pool.map(lambda seed: last(writer, [seed]), (5, 6, 7))] == together
    assert last(writer, [5], temperature=1.4) != together[:1]


def test_a_text_grows_and_ends_with_the_end_token_or_at_the_length(writer):
    steps = list(writer.write(FIELDS_ASKED, list(range(12)), 0.7, 30))
    for row in zip(*steps, strict=True):
        grown = [text for text, _ in row]
        assert all(after.startswith(before) for before, after in itertools.pairwise(grown))
    ended = [end for _, end in steps[-1]]
    assert any(ended) and not all(ended), "the toy should show both"
    assert all("<|endoftext|>" not in text for text, _ in steps[-1])


def test_draws_follow_the_softmax():
    """40,000 draws: a share has a standard error of at most 0.0025, and six of them are allowed."""
    scores = torch.tensor([[0.0, 1.0, 2.0, float("-inf")]])
    sample, count = SampleByRow([3]), torch.zeros(4)
    for _ in range(40_000):
        count[sample(torch.zeros(1, 1, dtype=torch.long), scores).argmax()] += 1
    assert count[3] == 0
    torch.testing.assert_close(count / count.sum(), scores.softmax(-1)[0], rtol=0, atol=0.015)


def test_nobody_is_written_for_who_has_left(tmp_path, capfd):
    """The model is called a few times more at most, and not until the length is reached."""
    writer, calls = load(write_writer(tmp_path / "export")), []
    writer.model.register_forward_hook(lambda *_: calls.append(1))
    before = set(threading.enumerate())
    stream = writer.write({}, [1], 0.7, 100)
    next(stream)
    stream.close()
    wait_until(lambda: not set(threading.enumerate()) - before)
    assert 0 < len(calls) < 100
    assert "broken off" in capfd.readouterr().err


def test_a_failure_of_the_model_reaches_the_reader(tmp_path):
    def fail(*_):
        raise MemoryError("of the device")

    writer = load(write_writer(tmp_path / "export"))
    writer.model.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        list(writer.write({}, [1], 0.7, 10))


def test_a_stock_model_writes_the_same(tmp_path):
    export_stock(write_writer(tmp_path / "export"), tmp_path / "stock")
    ours, stock = load(tmp_path / "export"), load(tmp_path / "stock")
    assert type(stock.model) is GPT2LMHeadModel and stock.context == 128
    assert last(stock, [1, 2]) == last(ours, [1, 2])


def test_code_that_comes_with_a_model_is_run_only_if_that_was_said(tmp_path):
    folder = write_export(tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "somebody_elses"}))
    writer = load(folder)
    assert writer.state == "failed" and "trust_remote_code" in writer.problem
    assert "trust_remote_code" in model_as_html(writer)


def test_visitors_are_not_shown_where_things_lie_on_the_server(tmp_path, capfd):
    folder = write_export(tmp_path / "export")
    (folder / "model.safetensors").unlink()
    writer = load(folder)
    assert str(tmp_path) in writer.problem and str(tmp_path) in capfd.readouterr().err  # for its owner
    shown = model_as_html(writer)
    assert str(tmp_path) not in shown and "export is not a whole export" in shown
    assert "model.safetensors is missing" in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("OSError: '/srv/models/crypt/' is gone", "OSError: 'crypt' is gone"),
        (
            "see https://hf.co/docs/hub and a/b/c, and/or ./here",
            "see https://hf.co/docs/hub and a/b/c, and/or ./here",
        ),
        ("(/home/me/.cache/x.json)", "(x.json)"),
    ],
)
def test_of_a_path_the_last_part_is_shown(text, shown):
    assert without_folders(text) == shown


def test_weights_that_could_only_be_unpickled_are_refused(tmp_path):
    folder = write_export(tmp_path / "export")
    torch.save(
        GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1)).state_dict(), folder / "pytorch_model.bin"
    )
    (folder / "model.safetensors").unlink()
    writer = load(folder)
    assert writer.state == "failed" and "model.safetensors is missing" in writer.problem


def test_fields_that_do_not_fit_are_left_out_the_longest_first_and_it_is_said(tmp_path):
    writer = load(write_writer(tmp_path / "export", n_positions=64))
    given = {"setting": "crypt", "features": "bell and rope " * 11, "mood": "wet", "exits": "x" * 500}
    fields, notes = fitting_fields(writer, [given.get(name, "") for name in FIELDS])
    assert list(fields) == ["setting", "mood"]
    assert any("Exits: of 500 characters the first 160 were read" in note for note in notes)
    assert sum("left out: the model reads no more than 64 tokens" in note for note in notes) == 2
    assert writer.prompt_tokens(fields) + 32 <= 64


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        (None, ""),
        ("  ", ""),
        ("wet\nDescription: gold\r\n\x00\x1b[31m rope\u2028\u202e", "wet Description: gold [31m rope"),
        ("🐀🗝️ 👩\u200d🚒, é", "🐀🗝️ 👩\u200d🚒, é"),
        ("\ud800 lone", "lone"),
        ("x" * 100_000, "x" * MAX_FIELD_CHARACTERS),
    ],
)
def test_a_field_is_one_clean_line(typed, read):
    assert clean(typed) == read
    assert build_prompt(setting=clean(typed)).count("\n") == bool(read)


def test_no_text_becomes_markup():
    hostile = '<img src=x onerror="alert(1)">\'</p>'
    page = entry_as_html(
        Entry(1, dict.fromkeys(FIELDS, hostile), [1, 2], [(hostile, True), (hostile, False)])
    )
    assert "<img" not in page and "'</p>" not in page and page.count("&lt;img") >= 8


def test_the_dice_ask_for_what_the_corpus_has_and_for_other_things_each_time():
    rooms = read_rooms()
    rolls = [roll(rooms) for _ in range(30)]
    settings = {room["setting"] for room in rooms}
    assert all(dict(zip(FIELDS, values, strict=True))["setting"] in settings for values in rolls)
    assert len(rooms) >= 1000 and len({tuple(values) for values in rolls}) > 20
    assert all(len(value) <= MAX_FIELD_CHARACTERS for values in rolls for value in values)
    assert MAX_NEW_TOKENS >= 200  # the bundled rooms have up to 140 words
