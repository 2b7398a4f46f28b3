"""What a person sees of a run: a bar on a terminal, lines elsewhere, with the numbers of metrics.jsonl."""

import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
import threading

import pytest
from training_toys import train_here, write_toy_shards

NUMBERS = re.compile(
    r"loss (?P<loss>[\d.]+), learning rate (?P<learning_rate>[\d.e-]+), "
    r"gradient norm (?P<gradient_norm>[\d.]+), (?P<tokens_per_second>[\d,]+) tokens/s, "
    r"MFU (?P<mfu>[\d.]+)%, (?P<left>[\d hmins]+) left, (?P<spend_usd>[\d.,]+) USD"
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_toy_shards(tmp_path_factory.mktemp("toy"))


def assert_are_the_numbers_of(shown: re.Match, line: dict) -> None:
    """As many digits as are shown."""
    found = {name: float(text.replace(",", "")) for name, text in shown.groupdict().items() if name != "left"}
    assert found["loss"] == pytest.approx(line["loss"], abs=5e-5)
    assert found["learning_rate"] == pytest.approx(line["learning_rate"], rel=5e-3)
    assert found["gradient_norm"] == pytest.approx(line["gradient_norm"], abs=6e-3)
    assert found["tokens_per_second"] == pytest.approx(line["tokens_per_second"], abs=1)
    assert found["mfu"] == pytest.approx(100 * line["mfu"], abs=0.06)
    assert found["spend_usd"] == pytest.approx(line["spend_usd"], abs=6e-3)


def steps_of(run) -> dict[int, dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}


def test_without_a_terminal_a_line_says_how_it_goes(shards, tmp_path, capsys):
    train_here(shards=shards, run_dir=tmp_path / "run", price_per_gpu_hour_usd=3600)
    (first,) = re.findall(r"step 3 of 12: .*", capsys.readouterr().out)
    assert_are_the_numbers_of(NUMBERS.search(first), steps_of(tmp_path / "run")[3])


def test_on_a_terminal_a_bar_does_and_what_is_said_stays_above_it(shards, tmp_path, monkeypatch, capsys):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 240, 0, 0))
    shown: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(ours, 4096):
                shown.append(part)
        except OSError:  # so a terminal ends whose other side was closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        train_here(shards=shards, run_dir=tmp_path / "run", price_per_gpu_hour_usd=3600)
        monkeypatch.undo()
    reader.join(60)
    os.close(ours)
    bars = re.split(r"[\r\n]+", b"".join(shown).decode())
    (last,) = [bar for bar in bars if bar.startswith("100%|")][-1:]
    assert "| 12/12, loss" in last
    assert_are_the_numbers_of(NUMBERS.search(last), steps_of(tmp_path / "run")[12])
    said = capsys.readouterr().out
    assert "step 12: validation loss" in said and "tokens/s" not in said
