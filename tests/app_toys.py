"""A page that is served by a process of its own, a model small enough for it, and a browser to look at it."""

import contextlib
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoTokenizer

from modeling_gpt_scratch import GPTScratchForCausalLM
from tests.gated import Gate
from tests.test_release_export import write_export
from tests.training_toys import environment

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
PATIENCE_SECONDS = 180  # for what takes a second or ten on an idle machine
LETTERS = set("abcdefghijklmnopqrstuvwxyz ")
BUSY = "document.querySelector('#current [aria-busy=true] .boxed')?.innerText.length > 3"  # it is writing
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


def write_writer(folder: Path, *, ends: bool = False, **overrides) -> Path:
    """An export that writes meaningless words of small letters, without end unless it `ends`."""
    write_export(folder, tie_word_embeddings=False, **overrides)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = GPTScratchForCausalLM.from_pretrained(folder)
    texts = [tokenizer.decode([id_]) for id_ in range(len(tokenizer))]
    wanted = [id_ for id_, text in enumerate(texts) if text.strip() and all(c in LETTERS for c in text)]
    wanted += [tokenizer.eos_token_id] * ends
    unwanted = sorted(set(range(len(tokenizer))) - set(wanted))
    head, bias = model.lm_head.weight, model.transformer.ln_f.bias
    with torch.no_grad():
        # The first component of what reaches the head is 5 on average: what weighs it by -4 is never drawn.
        bias[0] = 5.0
        head[:, 0] = 0
        head[wanted] *= 4
        head[unwanted] = 0
        head[unwanted, 0] = -4.0
    model.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def served(
    log: Path,
    *arguments: str,
    command: list[str] | None = None,
    cwd: Path | None = None,
    variables: dict[str, str] | None = None,
) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address of a page, once it answers, and its process; what it prints goes to `log`.

    Without a --port gradio takes the first that is free, also where two start at once, and says which.
    """
    command = command or [str(ROOT / "app.py")]
    env = {**(variables or environment()), "PYTHONUNBUFFERED": "1"}
    env.pop("GRADIO_SERVER_PORT", None)
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command, *arguments],
            env=env,
            stdout=file,
            stderr=file,
            cwd=cwd or log.parent,
        )
    try:
        until = time.monotonic() + PATIENCE_SECONDS
        while not (said := re.search(r"Running on local URL: +(http://\S+)", log.read_text())):
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.1)
        urllib.request.urlopen(said[1], timeout=PATIENCE_SECONDS).close()
        yield said[1], process
    finally:
        process.terminate()
        process.wait()


def gated(gate: Gate, *arguments: str) -> list[str]:
    """A command for `served`: the page, whose model waits at the gate."""
    return ["-m", "tests.gated", str(gate.folder), str(ROOT / "app.py"), *arguments]


@contextlib.contextmanager
def chromium() -> Iterator[Callable]:
    """`see(look, *arguments)` calls look(browser, *arguments) with a real browser.

    All in one thread of its own: Playwright leaves an event loop behind in the thread that it ran in.
    """
    from playwright.sync_api import sync_playwright

    def start():
        playwright = sync_playwright().start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        return playwright, browser

    with ThreadPoolExecutor(1) as thread:
        playwright, browser = thread.submit(start).result()
        try:
            yield lambda look, *arguments: thread.submit(look, browser, *arguments).result()
        finally:
            thread.submit(browser.close).result()
            thread.submit(playwright.stop).result()


def visit(browser, address: str, *, viewport=DESKTOP, ready: str = "parameters", **more):
    """A visitor of one's own on the page, once it says `ready`; `page.outside` are requests to elsewhere."""
    context = browser.new_context(
        viewport=viewport, permissions=["clipboard-read", "clipboard-write"], **more
    )
    context.set_default_timeout(1000 * PATIENCE_SECONDS)
    page = context.new_page()
    page.outside, page.said = [], []
    page.on("request", lambda r: None if r.url.startswith((address, "data:")) else page.outside.append(r.url))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.goto(address)
    page.wait_for_function("words => document.querySelector('#status')?.innerText.includes(words)", arg=ready)
    return page


def fill(page, **fields: str) -> None:
    for name, text in fields.items():
        page.fill(f"#field-{name} input", text)


def set_number(page, label: str, value: int | float) -> None:
    """A slider or a number among the settings, which are opened for it."""
    if not page.locator("#how input").first.is_visible():
        page.click("#how button")
    box = page.locator("#how").get_by_label(label).locator("xpath=self::*[not(@type='range')]").first
    box.fill(str(value))
    box.blur()


def written(page, words: str = "is written") -> list[str]:
    """The rooms' texts, once the page says so."""
    page.wait_for_function("words => document.querySelector('#status').innerText.includes(words)", arg=words)
    return texts(page)


def texts(page) -> list[str]:
    return page.eval_on_selector_all("#current .boxed", "all => all.map(e => e.innerText)")
