"""What the page shows, as HTML: numbered entries of a map key, and the state of the model."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from space.writer import Writer

MAX_FIELD_CHARACTERS = 160
LABELS = {
    "title": "Title",
    "setting": "Setting",
    "place": "Place",
    "mood": "Mood",
    "features": "Features",
    "exits": "Exits",
    "inhabitants": "Inhabitants",
}
BELOW = ("features", "exits", "inhabitants")  # stand below the rooms, the rest above
COMMANDS = ("accelerate launch train_accelerate.py", "accelerate launch finetune.py", "python app.py")
PROBLEM_CHARACTERS = 1500
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~-])/(?:[^/\s'\"]+/)*([^/\s'\"]+)/?")

# For the element that holds entries; the buttons come and go with its content.
COPY = """
element.addEventListener("click", async (event) => {
  const button = event.target.closest("button.copy");
  if (!button) return;
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
  } catch {  // there is none over plain http from another machine
    const area = document.body.appendChild(document.createElement("textarea"));
    area.value = button.dataset.copy;
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
});
"""


@dataclass(frozen=True)
class Entry:
    """One numbered room of the key: what was asked for, and what was written for each seed.

    `rooms` holds, for each of `seeds`, the text and whether it came to its end.
    """

    number: int
    fields: Mapping[str, str]
    seeds: Sequence[int]
    rooms: Sequence[tuple[str, bool]]


def clean(value: Any) -> str:
    """A field as one line of at most MAX_FIELD_CHARACTERS, without control characters; emoji stay."""
    text = str(value or "")[:MAX_FIELD_CHARACTERS]
    text = "".join(c if c.isprintable() or c == "\u200d" else " " for c in text)  # U+200D joins emoji
    return re.sub(r"\s+", " ", text).strip(" ,")


def heading(fields: Mapping[str, str]) -> str:
    """What a map key would call this room."""
    parts = [fields[name] for name in ("place", "setting") if name in fields]
    name = fields.get("title") or ", ".join(parts) or "A room without a name"
    return name[0].upper() + name[1:]


def entry_as_html(entry: Entry, writing: bool = False) -> str:
    """Heading, the rooms side by side, what was asked for; `writing` says that the rooms still grow."""
    title = heading(entry.fields)
    above = [name for name in ("place", "setting") if "title" in entry.fields] + ["mood"]
    subtitle = " · ".join(entry.fields[name] for name in above if name in entry.fields)
    asked = {LABELS[name]: entry.fields[name] for name in BELOW if name in entry.fields}
    rooms = []
    for letter, seed, (text, ended) in zip("abcdefgh", entry.seeds, entry.rooms, strict=False):
        label = f"{entry.number}{letter}"
        tail = ""
        if not writing:
            lines = [f"{label}. {title}", "", text, *([""] if asked else [])]
            plain = "\n".join([*lines, *(f"{name}: {value}" for name, value in asked.items())])
            tail = (
                f"<span>{len(text.split())}{'' if ended else '+'} words</span>"
                f'<button type="button" class="copy" aria-label="Copy room {label}" '
                f'data-copy="{html.escape(plain)}">Copy</button>'
            )
        rooms.append(
            f'<article class="room" aria-label="Room {label}"><p class="boxed">{html.escape(text)}</p>'
            f"<footer><b>{label}</b><span>seed {seed}</span>{tail}</footer></article>"
        )
    facts = "".join(
        f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in asked.items()
    )
    return (
        f'<section class="entry" aria-busy="{"true" if writing else "false"}">'
        f'<header><span class="number">{entry.number}</span><div><h2>{html.escape(title)}</h2>'
        f"<p>{html.escape(subtitle)}</p></div></header>"
        f'<div class="rooms">{"".join(rooms)}</div>{f"<dl>{facts}</dl>" if facts else ""}</section>'
    )


def without_folders(text: str) -> str:
    """Of absolute paths the last part: how the server's disk is laid out is for its log, not for visitors."""
    return ABSOLUTE_PATH.sub(r"\1", text)


def model_as_html(writer: Writer) -> str:
    """One line about the model, or all that a person needs where there is none."""
    if writer.state == "ready":
        path = Path(writer.name)
        name = "/".join(path.parts[-2:]) if path.is_absolute() else writer.name  # visitors see it
        size = f"{writer.parameters / 1e6:,.1f} M parameters"
        return f"<p><b>{html.escape(name)}</b> · {size} · reads {writer.context:,} tokens</p>"
    if writer.state == "loading":
        return '<p class="waiting">The model is being loaded. Fill in the fields meanwhile.</p>'
    return (
        '<div class="failed" role="alert"><h2>There is no model to write with</h2>'
        f"<pre>{html.escape(without_folders(writer.problem)[:PROBLEM_CHARACTERS])}</pre>"
        "<p>These commands make one, in about eight minutes on two CPU cores. <code>--model</code> takes "
        f"another folder, or the name of a model on the Hub.</p><pre>{chr(10).join(COMMANDS)}</pre>"
        "<p>Once it is there, just write again.</p></div>"
    )
