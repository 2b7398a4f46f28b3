"""`chat.py`: people without a browser are served, whatever they type, and nothing steers their terminal."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoTokenizer

from chat import Terminal, main
from data.dungeons import build_prompt
from modeling_gpt_scratch import GPTScratchForCausalLM
from tests.test_release_export import write_export
from tests.training_toys import ROOT, environment


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("chat") / "export")


def type_lines(monkeypatch, folder, lines, *flags):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    main(["--model", str(folder), "--max_new_tokens", "8", "--temperature", "0", *flags])


def greedy(folder, text, new_tokens=8):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    written = GPTScratchForCausalLM.from_pretrained(folder).generate(
        ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def test_a_line_is_gone_on_with_and_an_empty_one_goes_on(monkeypatch, capsys, folder):
    type_lines(monkeypatch, folder, ["The bell in the crypt", "", "Water"])
    shown = capsys.readouterr().out
    first = greedy(folder, "The bell in the crypt")
    assert f"> {first}" in shown
    assert f"> {greedy(folder, 'The bell in the crypt' + first)}" in shown
    assert f"> {greedy(folder, 'Water')}" in shown


def test_fields_are_asked_for_one_by_one_and_empty_ones_left_out(monkeypatch, capsys, folder):
    type_lines(
        monkeypatch, folder, ["", "sewer", "bridge", "", "iron grating, a bell", "", "rats"], "--rooms"
    )
    shown = capsys.readouterr().out
    asked = build_prompt(
        setting="sewer", place="bridge", features=["iron grating", "a bell"], inhabitants="rats"
    )
    assert "features: " in shown and greedy(folder, asked) in shown


@pytest.mark.parametrize(
    "line", ["bell " * 20_000, "\x1b[2J\x07\x00 bell", "🔔 Gewölbe \udcff"], ids=["long", "control", "emoji"]
)
def test_long_lines_and_strange_ones_are_answered(monkeypatch, capsys, folder, line):
    type_lines(monkeypatch, folder, [line.replace("\n", " ")])
    shown = capsys.readouterr().out
    assert ("(the model sees the last 120 of these" in shown) == (len(line) > 1000)
    assert "\x1b" not in shown and shown.count(">") >= 2


def test_what_a_model_writes_cannot_steer_the_terminal(capsys, folder):
    terminal = Terminal(AutoTokenizer.from_pretrained(folder))
    terminal.on_finalized_text("a\x1b]0;title\x07b\x9b31m\u202ec\td\n", stream_end=True)
    assert capsys.readouterr().out == "a]0;titleb31mc\td\n\n"


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--model", "no/such-folder"], "cannot load the model 'no/such-folder'"),
        (["--max_new_tokens", "128"], r"max_new_tokens=128 is not in 1\.\.127"),
        (["--seed", "-1"], r"seed=-1 is not in 0\.\.4294967295"),
        (["--seed", str(2**32)], r"is not in 0\.\.4294967295"),
        (["--temperature", "nan"], "temperature=nan is not a number from 0 up"),
        (
            ["--top_p", "0", "--temperature", "-1"],
            "temperature=-1.0 is .*; top_p=0.0 is not above 0 and at most",
        ),
        (["--top_p", "2"], "top_p=2.0 is not above 0 and at most 1"),
    ],
)
def test_what_cannot_work_is_one_line(monkeypatch, folder, flags, reason):
    with pytest.raises(SystemExit, match=reason):
        type_lines(monkeypatch, folder, [], *flags)


def test_code_that_comes_with_a_model_is_run_only_if_that_was_said(tmp_path):
    folder = write_export(tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "somebody_elses"}))
    code = folder / "configuration_gpt_scratch.py"
    code.write_text(code.read_text().replace('model_type = "gpt_scratch"', 'model_type = "somebody_elses"'))
    command = [sys.executable, str(ROOT / "chat.py"), "--model", str(folder), "--max_new_tokens", "8"]
    options = {"input": "The bell\n", "capture_output": True, "text": True, "timeout": 300}
    options["env"] = {**environment(), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    plain = subprocess.run(command, **options)
    assert plain.returncode == 1 and "error: cannot load the model" in plain.stderr
    assert "trust_remote_code" in plain.stderr and not (tmp_path / "modules").exists()
    trusted = subprocess.run([*command, "--trust_remote_code"], **options)
    assert trusted.returncode == 0 and trusted.stdout.count("> ") == 2, trusted.stderr


@pytest.mark.slow
def test_in_a_real_terminal_ctrl_c_stops_the_text_and_ctrl_d_ends(tmp_path):
    """A text of a hundred thousand tokens would take hours to come to its end by itself."""
    torch.manual_seed(0)
    folder = write_export(tmp_path / "export", n_positions=2**17)
    master, slave = pty.openpty()
    command = [sys.executable, str(ROOT / "chat.py"), "--model", str(folder), "--max_new_tokens", "100000"]
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=subprocess.DEVNULL, env=environment(), cwd=tmp_path,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    os.close(slave)
    try:
        read_until(master, b"> ", 300)
        os.write(master, b"The bell\n")
        read_until(master, b"\n", 300)
        assert len(read_until(master, b"", 300)) > 0  # it is writing
        process.send_signal(signal.SIGINT)
        read_until(master, b"\n> ", 300)
        os.write(master, b"\x04")
        assert process.wait(300) == 0
    finally:
        process.kill()
        os.close(master)


def read_until(terminal, wanted, seconds):
    """What the program shows until `wanted` is among it; anything at all, if `wanted` is empty."""
    shown, end = b"", time.monotonic() + seconds
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 65536)
            if wanted in shown.replace(b"\r\n", b"\n"):
                return shown
    raise AssertionError(f"{wanted!r} did not come, but {shown[-500:]!r}")
