"""The dungeon writer in a browser, here or as a Space of the Hub: fields become rooms, as they are written.

    python app.py
    python app.py --model user/name --port 7861

The prompt is `data/dungeons.py`'s; the writing, the entries and the looks are in `space/`.
"""

import argparse
import contextlib
import json
import os
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read by gradio when it is imported: nothing phones home

import gradio as gr
import torch

from data.dungeons import FIELDS
from space.entries import COPY, LABELS, MAX_FIELD_CHARACTERS, Entry, clean, entry_as_html, model_as_html
from space.writer import Writer

HERE = Path(__file__).resolve().parent
DEFAULT_MODEL = "artifacts/runs/dungeons/export"
MAX_NEW_TOKENS = 400
MIN_NEW_TOKENS = 32  # fields that leave less than this to write in are left out
MAX_VARIANTS = 4
SEED_DIGITS = 6
MAX_TEMPERATURE = 1.5
MIN_TEMPERATURE = 0.1
MAX_WAITING = 16  # visitors in the queue; more are told to come again
AT_ONCE = 2  # visitors that are written for at the same time
KEPT_ENTRIES = 6  # on a visitor's page
LINES = (("setting", "place"), ("mood", "title"), ("features",), ("exits",), ("inhabitants",))
EXAMPLES = {
    "title": "The Toll Stair",
    "setting": "sewer",
    "place": "bridge",
    "mood": "uneasy",
    "features": "iron grating, a drowned bell",
    "exits": "north, a rusted ladder",
    "inhabitants": "rats",
}
FONTS = ["Iowan Old Style", "Palatino Linotype", "Palatino", "P052", "Georgia", "Liberation Serif", "serif"]
# On a phone the rooms stand below the fields.
TO_THE_KEY = """(...values) => {
  const key = document.getElementById("key");
  if (key.getBoundingClientRect().top > innerHeight / 2) {
    key.style.minHeight = `${innerHeight}px`;
    key.scrollIntoView({behavior: "smooth"});
  }
  return values;
}"""
SPOKEN = 'element.setAttribute("role", "status")'  # screen readers tell what it says
EMPTY = """<div class="empty"><p>Nothing is written yet.</p><p>Fill in what you know of the room, any of
the fields or none, or roll the dice.</p></div>"""
FOOTER = """<p>A small language model writes these rooms: read them before you play them. What you type
goes to the machine that serves this page. It is not logged there, and forgotten within an hour.</p>"""


def read_rooms() -> list[dict[str, Any]]:
    """The bundled rooms, of whose fields the dice are made."""
    files = sorted((HERE / "data" / "corpora" / "dungeons").glob("*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]


def roll(rooms: list[dict[str, Any]]) -> list[str]:
    """In the order of FIELDS: a room's own, with mood, exits and inhabitants of others in its setting."""
    room = random.choice(rooms)
    alike = [other for other in rooms if other["setting"] == room["setting"]]
    fields = dict(room)
    for name in ("mood", "exits", "inhabitants"):
        fields[name] = random.choice([other[name] for other in alike if other.get(name)] or [""])
    values = [fields.get(name) or "" for name in FIELDS]
    return [value if isinstance(value, str) else ", ".join(value) for value in values]


def between(value: Any, low: float, high: float) -> float:
    """What the page's own controls allow, whoever asks."""
    return min(max(float(value), low), high)


def fitting_fields(writer: Writer, given: Sequence[Any]) -> tuple[dict[str, str], list[str]]:
    """The fields that the model will see, and what a visitor has to know about them."""
    fields, notes = {}, []
    for name, value in zip(FIELDS, given, strict=True):
        if (length := len(str(value or ""))) > MAX_FIELD_CHARACTERS:
            read = f"of {length:,} characters the first {MAX_FIELD_CHARACTERS} were read"
            notes.append(f"{LABELS[name]}: {read}.")
        if text := clean(value):
            fields[name] = text
    if not fields:
        notes.append("No field is filled in: the model chooses.")
    while fields and writer.prompt_tokens(fields) + MIN_NEW_TOKENS > writer.context:
        longest = max(fields, key=lambda name: len(fields[name]))
        del fields[longest]
        notes.append(f"{LABELS[longest]} left out: the model reads no more than {writer.context:,} tokens.")
    return fields, notes


def build_page(writer: Writer) -> gr.Blocks:
    """The page; its functions see what visitors type, and neither log nor keep it."""
    rooms = read_rooms()
    stops: dict[str | None, threading.Event] = {}  # of the visitors that are being written for

    def look_at_model():
        return model_as_html(writer), gr.Timer(active=writer.state == "loading")

    def stop_writing(request: gr.Request):
        if asked := stops.get(request.session_hash):
            asked.set()

    def shown(status: str, entries: list[Entry], writing: bool) -> tuple[Any, ...]:
        """For the outputs of writing; the last of `entries` is the one at hand."""
        current = entry_as_html(entries[-1], writing) if entries else EMPTY
        earlier = "".join(entry_as_html(entry) for entry in reversed(entries[:-1]))
        write = gr.Button(interactive=not writing)
        again, stop = gr.Button(visible=bool(entries) and not writing), gr.Button(visible=writing)
        return status, current, earlier, entries, write, again, stop

    def write(again: bool, session: str | None, *values: Any) -> Iterator[tuple[Any, ...]]:
        *given, seed, temperature, length, variants, entries = values
        writer.load()
        while writer.state == "loading":
            yield shown(model_as_html(writer), entries, writing=False)
            time.sleep(0.3)
        if writer.state == "failed":
            yield shown(model_as_html(writer), entries, writing=False)
            return

        again = again and bool(entries)
        if again:  # the order of that entry, whatever the boxes say by now
            given = [entries[-1].fields.get(name, "") for name in FIELDS]
        fields, notes = fitting_fields(writer, given)
        wanted, left = int(between(length, 1, MAX_NEW_TOKENS)), writer.context - writer.prompt_tokens(fields)
        first, chosen = random.randrange(10**SEED_DIGITS - MAX_VARIANTS), str(seed or "").strip()
        if not again and chosen.isdecimal() and len(chosen) <= SEED_DIGITS:
            first = int(chosen)
        elif not again and chosen:
            notes.append(f"The seed is no number of up to {SEED_DIGITS} digits: another was drawn.")
        seeds = [first + number for number in range(int(between(variants, 1, MAX_VARIANTS)))]
        number = entries[-1].number + (not again) if entries else 1
        entry = Entry(number, fields, seeds, [("", False)] * len(seeds))
        before = entries[:-1] if again else entries[1 - KEPT_ENTRIES :]
        told = " ".join(notes)

        stops[session] = asked = threading.Event()
        daring = between(temperature, MIN_TEMPERATURE, MAX_TEMPERATURE)
        writing = writer.write(fields, seeds, daring, min(wanted, left))
        try:
            with contextlib.closing(writing):
                for texts in writing:
                    entry = Entry(number, fields, seeds, texts)
                    yield shown(f"<p>Writing room {number}. {told}</p>", [*before, entry], writing=True)
                    if asked.is_set():
                        break
            if left < wanted and not asked.is_set() and not all(ended for _, ended in entry.rooms):
                told += f" Cut off: of the model's {writer.context:,} tokens {left:,} were left to write in."
            status = f"<p>{'Stopped.' if asked.is_set() else f'Room {number} is written.'} {told}</p>"
        except Exception as error:  # its words might hold the visitor's
            print(f"Writing failed: {type(error).__name__}", file=sys.stderr)
            status = f'<p role="alert">The model failed ({type(error).__name__}). Try once more.</p>'
        finally:
            stops.pop(session, None)
        yield shown(status, [*before, entry], writing=False)

    def write_new(request: gr.Request, *values):
        yield from write(False, request.session_hash, *values)

    def write_again(request: gr.Request, *values):
        yield from write(True, request.session_hash, *values)

    with gr.Blocks(title="The Map Key", fill_width=True) as page:
        entries = gr.State([], time_to_live=3600)
        gr.HTML((HERE / "space" / "header.html").read_text(encoding="utf-8"), elem_id="top")
        with gr.Row(elem_id="desk"):
            with gr.Column(scale=3, min_width=300, elem_id="order"):
                boxes = {}
                for line in LINES:
                    with gr.Row():
                        for name in line:
                            boxes[name] = gr.Textbox(
                                label=LABELS[name],
                                placeholder=EXAMPLES[name],
                                max_length=MAX_FIELD_CHARACTERS,
                                max_lines=1,
                                min_width=120,
                                elem_id=f"field-{name}",
                            )
                with gr.Row(elem_id="verbs"):
                    write_button = gr.Button(
                        "Write the room", variant="primary", min_width=140, elem_id="write"
                    )
                    dice_button = gr.Button("⚄ Roll the dice", min_width=140, elem_id="dice")
                with gr.Accordion("How it is written", open=False, elem_id="how"):
                    variants = gr.Slider(1, MAX_VARIANTS, 3, step=1, label="Variants side by side")
                    temperature = gr.Slider(
                        MIN_TEMPERATURE, MAX_TEMPERATURE, 0.7, step=0.05, label="Temperature (low is sober)"
                    )
                    length = gr.Slider(20, MAX_NEW_TOKENS, 200, step=10, label="Length (tokens at most)")
                    seed = gr.Textbox(  # a gr.Number would turn from empty to 0
                        label="Seed (empty: another each time)", max_length=SEED_DIGITS, max_lines=1
                    )
            with gr.Column(scale=8, min_width=320, elem_id="key"):
                with gr.Row(elem_id="more"):
                    status = gr.HTML(model_as_html(writer), elem_id="status", js_on_load=SPOKEN)
                    again_button = gr.Button("↻ Write it again", visible=False, size="sm", elem_id="again")
                    stop_button = gr.Button(
                        "■ Stop", visible=False, size="sm", variant="stop", elem_id="stop"
                    )
                current = gr.HTML(EMPTY, elem_id="current", js_on_load=COPY)
                earlier = gr.HTML("", elem_id="earlier", js_on_load=COPY)
        gr.HTML(FOOTER, elem_id="colophon")

        fields = [boxes[name] for name in FIELDS]
        shared: dict[str, Any] = {
            "inputs": [*fields, seed, temperature, length, variants, entries],
            "outputs": [status, current, earlier, entries, write_button, again_button, stop_button],
            "js": TO_THE_KEY,
            "concurrency_limit": AT_ONCE,
            "concurrency_id": "model",
            "show_progress": "minimal",
            "show_progress_on": status,
        }
        gr.on([write_button.click, *(box.submit for box in fields)], write_new, api_name="write", **shared)
        again_button.click(write_again, api_visibility="private", **shared)
        at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        stop_button.click(stop_writing, **at_once)
        dice_button.click(lambda: roll(rooms), None, fields, **at_once)
        timer = gr.Timer(1.0)
        gr.on([page.load, timer.tick], look_at_model, None, [status, timer], **at_once)
    return page.queue(max_size=MAX_WAITING)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="app.py"
    )
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="an export's folder, or a name on the Hub [%(default)s]"
    )
    parser.add_argument(
        "--host", help="address to listen on [127.0.0.1]; 0.0.0.0 is every network of this machine"
    )
    parser.add_argument("--port", type=int, help="[the first free one from 7860]")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code that comes with the model"
    )
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    writer = Writer(arguments.model, device, arguments.trust_remote_code)
    writer.load()
    theme = gr.themes.Base(font=FONTS, font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"]).set(
        body_background_fill="#f4ecd9",
        body_background_fill_dark="#171310",  # until style.css arrives
    )
    build_page(writer).launch(
        server_name=arguments.host,
        server_port=arguments.port,
        share=False,
        ssr_mode=False,
        footer_links=[],
        theme=theme,
        css_paths=HERE / "space" / "style.css",
        favicon_path=HERE / "space" / "favicon.svg",
    )


if __name__ == "__main__":
    main()
