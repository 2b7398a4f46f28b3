"""`transformers serve` takes the stock folder as it is: asked by OpenAI's client and `transformers chat`."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from modeling_gpt_scratch import GPTScratchForCausalLM
from release.export import export_stock
from tests.test_chat import read_until
from tests.test_release_export import write_export
from tests.training_toys import environment, free_port

pytestmark = pytest.mark.slow
ASKED = "The bell in the crypt"
NEW_TOKENS = 16
STARTUP_SECONDS = 240
ONE_BY_ONE, BATCHING = (), ("--continuous-batching",)


@pytest.fixture(scope="module", params=[ONE_BY_ONE, BATCHING], ids=["one by one", "batching"])
def server(request, tmp_path_factory):
    """A client, the model's name, and what our own model writes after ASKED."""
    tmp_path = tmp_path_factory.mktemp("served")
    openai = pytest.importorskip("openai", reason="the client is not installed: pip install openai")
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason='transformers serve needs pip install "transformers[serving]"')
    folder = writing_letters(write_export(tmp_path / "export"))
    stock = tmp_path / "stock"
    export_stock(folder, stock)

    port = free_port()
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(stock), *request.param]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(tmp_path / "serve.log", "w") as log:
        process = subprocess.Popen(
            command, env=environment(), stdout=log, stderr=log, start_new_session=True, cwd=tmp_path
        )
    try:
        for _ in range(STARTUP_SECONDS):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "serve.log").read_text()[-3000:]
                time.sleep(1)
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120, max_retries=0
        )
        yield client, str(stock), expected_text(folder)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def writing_letters(folder):
    """The same export, which never writes half a character: a stream ends before one, an answer does not."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = GPTScratchForCausalLM.from_pretrained(folder)
    texts = [tokenizer.decode([id_], skip_special_tokens=True) for id_ in range(len(tokenizer))]
    unwanted = [id_ for id_, text in enumerate(texts) if not (text.isascii() and text.isprintable() and text)]
    with torch.no_grad():
        model.transformer.wte.weight[unwanted] = 0  # tied to the head: their logits are 0, never the largest
    model.save_pretrained(folder)
    return folder


def expected_text(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(ASKED, return_tensors="pt")["input_ids"]
    model = GPTScratchForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        written = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def ask(client, model, **more):
    messages = [{"role": "user", "content": ASKED}]
    return client.chat.completions.create(
        model=model, messages=messages, max_tokens=NEW_TOKENS, temperature=0, seed=0, **more
    )


def test_a_server_writes_what_our_model_writes(server):
    client, model, expected = server
    whole = ask(client, model).choices[0].message.content
    assert whole.strip() == expected.strip()
    pieces = [chunk.choices[0].delta.content for chunk in ask(client, model, stream=True) if chunk.choices]
    pieces = [piece for piece in pieces if piece]
    assert "".join(pieces).strip() == expected.strip()
    assert len(pieces) > 1, "it came in one piece"

    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda _: ask(client, model).choices[0].message.content, range(4)))
    assert {text.strip() for text in texts} == {expected.strip()}

    streams = [ask(client, model, stream=True) for _ in range(3)]
    for stream in streams:
        next(iter(stream))
        stream.close()  # readers who go away
    assert ask(client, model).choices[0].message.content.strip() == expected.strip()


@pytest.mark.parametrize("server", [ONE_BY_ONE], indirect=True, ids=["one by one"])
def test_a_text_longer_than_the_context_fails_alone(server):
    """A stock GPT-2 knows no position past its last; what matters is that the next reader is served.

    Not so with --continuous-batching (transformers 5.23): there everyone gets 503 from then on, as
    docs/release.md says.
    """
    client, model, expected = server
    with pytest.raises(Exception, match=r"(?i)error|index|length|timed out"):
        client.with_options(timeout=30).chat.completions.create(
            model=model, messages=[{"role": "user", "content": "bell " * 20_000}], max_tokens=4
        )
    # The server has hung up after its error, which the client notices when it tries.
    client = client.with_options(max_retries=2)
    assert ask(client, model).choices[0].message.content.strip() == expected.strip()


@pytest.mark.parametrize("server", [ONE_BY_ONE], indirect=True, ids=["one by one"])
def test_transformers_chat_talks_to_it_in_a_terminal(server, tmp_path):
    """The documented line, in a real terminal. With HF_HUB_OFFLINE it would not even ask loopback."""
    client, model, expected = server
    program = str(Path(sys.executable).parent / "transformers")
    command = [program, "chat", model, str(client.base_url).rstrip("/"), f"max_new_tokens={NEW_TOKENS}"]
    variables = {**environment(), "TERM": "dumb", "COLUMNS": "200"}
    del variables["HF_HUB_OFFLINE"]
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*command, "do_sample=False"], stdin=slave, stdout=slave, stderr=slave, env=variables, cwd=tmp_path,
        start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    try:
        read_until(master, b">:", 120)
        os.write(master, ASKED.encode() + b"\n")
        # It ends by asking whether to go on where the limit stopped it.
        shown = read_until(master, b"(y/N)", 120).decode(errors="replace")
        assert squeezed(expected) in squeezed(shown) and "tok/s" in shown, shown
        os.write(master, b"n\n")
        read_until(master, b">:", 30)
        os.write(master, b"!exit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(master)


def squeezed(text):
    """Without what a terminal and Markdown add: blanks and marks."""
    return re.sub(r"[^0-9A-Za-z]", "", text)
