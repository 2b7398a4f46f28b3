"""`transformers serve` takes the stock folder as it is: asked over HTTP with OpenAI's client."""

import os
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
from tests.test_release_export import write_export
from tests.training_toys import environment, free_port

pytestmark = pytest.mark.slow
ASKED = "The bell in the crypt"
NEW_TOKENS = 16
STARTUP_SECONDS = 240


@pytest.fixture(params=[[], ["--continuous-batching"]], ids=["one by one", "continuous batching"])
def server(request, tmp_path):
    """A client, the model's name, and what our own model writes after ASKED."""
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

    stream = ask(client, model, stream=True)
    next(iter(stream))
    stream.close()  # a reader who goes away
    assert ask(client, model).choices[0].message.content.strip() == expected.strip()
