"""`transformers serve` takes the stock folder as it is: asked by OpenAI's client and `transformers chat`."""

import os
import pty
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from modeling_gpt_scratch import GPTScratchForCausalLM
from release.export import export_stock
from tests.gated import Gate, wait_until
from tests.test_chat import read_until
from tests.test_release_export import write_export
from tests.training_toys import environment

pytestmark = pytest.mark.slow
ASKED = "The bell in the crypt"
NEW_TOKENS = 16
LONG = 4000
TRANSFORMERS = Path(sys.executable).parent / "transformers"
ONE_BY_ONE, BATCHING = (), ("--continuous-batching",)


@dataclass
class Server:
    client: Any  # OpenAI's
    model: str
    expected: str  # what our own model writes after ASKED
    gate: Gate
    log: Path


@pytest.fixture(scope="module", params=[ONE_BY_ONE, BATCHING], ids=["one by one", "batching"])
def server(request, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("served"), *request.param) as server:
        yield server


@contextmanager
def serving(tmp_path, *flags):
    """`transformers serve` as it is, on the stock folder, but that the model can be made to wait."""
    openai = pytest.importorskip("openai", reason="the client is not installed: pip install openai")
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason='transformers serve needs pip install "transformers[serving]"')
    folder = writing_letters(write_export(tmp_path / "export", n_positions=4096))
    stock = tmp_path / "stock"
    export_stock(folder, stock)

    gate, log = Gate(tmp_path / "gate"), tmp_path / "serve.log"
    command = [sys.executable, "-m", "tests.gated", str(gate.folder), str(TRANSFORMERS), "serve", str(stock)]
    command += [*flags, "--host", "127.0.0.1", "--port", "0", "--device", "cpu"]  # 0: any that is free
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, env=environment(), stdout=file, stderr=file, start_new_session=True, cwd=tmp_path
        )
    try:
        wait_until(lambda: process.poll() is not None or "Uvicorn running on" in log.read_text())
        address = re.search(r"Uvicorn running on (http://\S+)", log.read_text())
        assert address, log.read_text()[-3000:]
        client = openai.OpenAI(base_url=f"{address[1]}/v1", api_key="none", timeout=300, max_retries=0)
        yield Server(client, str(stock), expected_text(folder), gate, log)
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


def ask(server, client=None, content=ASKED, tokens=NEW_TOKENS, **more):
    messages = [{"role": "user", "content": content}]
    return (client or server.client).chat.completions.create(
        model=server.model, messages=messages, max_tokens=tokens, temperature=0, seed=0, **more
    )


def text_of(answer):
    return answer.choices[0].message.content.strip()


def test_a_server_writes_what_our_model_writes(server):
    expected = server.expected.strip()
    assert text_of(ask(server)) == expected
    pieces = [chunk.choices[0].delta.content for chunk in ask(server, stream=True) if chunk.choices]
    pieces = [piece for piece in pieces if piece]
    assert "".join(pieces).strip() == expected
    assert len(pieces) > 1, "it came in one piece"

    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda _: text_of(ask(server)), range(4)))
    assert set(texts) == {expected}


def test_a_reader_who_goes_away_is_not_written_for(server):
    """Of the tokens that were asked for few are computed, and the next reader is served."""
    before = len(server.gate.forwards)
    with ThreadPoolExecutor(1) as pool, server.gate.closed():
        stream = ask(server, tokens=LONG, stream=True)
        server.gate.let(8)
        next(chunk for chunk in stream if chunk.choices and chunk.choices[0].delta.content)
        stream.close()
        next_reader = pool.submit(ask, server)
        server.gate.let_until(next_reader.done)
        assert text_of(next_reader.result()) == server.expected.strip()
    assert len(server.gate.forwards) - before < LONG // 4


@pytest.mark.parametrize("server", [BATCHING], indirect=True, ids=["batching"])
def test_requests_that_come_while_others_are_written_share_their_forwards(server):
    before = len(server.gate.forwards)
    with ThreadPoolExecutor(4) as pool, server.gate.closed():
        answers = [pool.submit(ask, server, tokens=LONG // 10)]
        server.gate.let(3)
        answers += [pool.submit(ask, server, tokens=LONG // 10) for _ in range(3)]
        server.gate.let_until(lambda: any(one["texts"] == 4 for one in server.gate.forwards[before:]))
        server.gate.open()
        texts = {text_of(answer.result()) for answer in answers}
    assert len(texts) == 1 and texts.pop().startswith(server.expected.strip())


TOO_LONG = "bell " * 20_000


@pytest.mark.parametrize("server", [ONE_BY_ONE], indirect=True, ids=["one by one"])
def test_a_text_longer_than_the_context_fails_alone(server):
    """A stock GPT-2 knows no position past its last; what matters is that the next reader is served."""
    openai = pytest.importorskip("openai")
    logged = len(server.log.read_text())
    with pytest.raises(openai.InternalServerError) as refused:
        ask(server, content=TOO_LONG, tokens=4)
    assert refused.value.status_code == 500
    wait_until(lambda: "IndexError: index out of range" in server.log.read_text()[logged:])
    # The server may have hung up after its error, which the client notices when it tries.
    assert text_of(ask(server, server.client.with_options(max_retries=2))) == server.expected.strip()


def test_with_batching_a_text_longer_than_the_context_ends_the_service(tmp_path):
    """transformers 5.17 to 5.24, as docs/release.md warns. Once this fails, the warning can go."""
    openai = pytest.importorskip("openai")
    with serving(tmp_path, *BATCHING) as server:
        with ThreadPoolExecutor(2) as pool, server.gate.closed():
            other = pool.submit(ask, server, tokens=LONG)
            wait_until(lambda: server.gate.waiting == 1)
            culprit = pool.submit(ask, server, content=TOO_LONG, tokens=4)
            server.gate.let_until(culprit.done)
        for answer in (culprit, other):
            assert isinstance(answer.exception(300), openai.InternalServerError)
        with pytest.raises(openai.InternalServerError) as refused:
            ask(server)
        assert refused.value.status_code == 503


@pytest.mark.parametrize("server", [ONE_BY_ONE], indirect=True, ids=["one by one"])
def test_transformers_chat_talks_to_it_in_a_terminal(server, tmp_path):
    """The documented line, in a real terminal. With HF_HUB_OFFLINE it would not even ask loopback."""
    address = str(server.client.base_url).rstrip("/")
    command = [str(TRANSFORMERS), "chat", server.model, address, f"max_new_tokens={NEW_TOKENS}"]
    variables = {**environment(), "TERM": "dumb", "COLUMNS": "200"}
    del variables["HF_HUB_OFFLINE"]
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*command, "do_sample=False"], stdin=slave, stdout=slave, stderr=slave, env=variables, cwd=tmp_path,
        start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    try:
        read_until(master, b">:", 300)
        os.write(master, ASKED.encode() + b"\n")
        # It ends by asking whether to go on where the limit stopped it.
        shown = read_until(master, b"(y/N)", 300).decode(errors="replace")
        assert squeezed(server.expected) in squeezed(shown) and "tok/s" in shown, shown
        os.write(master, b"n\n")
        read_until(master, b">:", 300)
        os.write(master, b"!exit\n")
        assert process.wait(300) == 0
    finally:
        process.kill()
        os.close(master)


def squeezed(text):
    """Without what a terminal and Markdown add: blanks and marks."""
    return re.sub(r"[^0-9A-Za-z]", "", text)
