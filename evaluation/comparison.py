"""Writers side by side: a table in the terminal, a bar chart, a page on which a person reads blind."""

import html
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = {
    "bits_per_byte": "bits/byte",
    "coverage_all": "coverage",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
    "repetition": "repetition",
    "words": "words",
    "longest_copied_words": "copied words",
    "copied_13_grams": "copied 13-grams",
    "mauve": "MAUVE",
    "rating": "rating",
    "empty": "empty texts",
    "failed": "no answer",
}
# Shown only where there were any.
TROUBLES = ("empty", "failed")

STYLE = """
:root { color-scheme: light dark; --ground: #faf8f3; --ink: #23201b; --card: #fff; --line: #d9d2c4;
  --soft: #6d665a; --mark: #8a4b1f; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #17161a; --ink: #e6e1d8; --card: #211f25; --line: #3a3740; --soft: #a39c90;
    --mark: #e0a36b; } }
* { box-sizing: border-box; }
body { font: 17px/1.6 Georgia, "Iowan Old Style", serif; background: var(--ground); color: var(--ink);
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; overflow-wrap: anywhere; }
h1 { line-height: 1.2; margin: 0; }
.lead, h2, summary { color: var(--soft); }
h2, h3, pre, summary { font-family: system-ui, sans-serif; }
h2 { font-size: .85rem; font-weight: 600; margin: 2.5rem 0 .4rem; }
pre { white-space: pre-wrap; font-size: .9rem; margin: 0 0 1rem; padding: .6rem .9rem;
  border-left: 3px solid var(--mark); background: var(--card); }
div { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
article { display: flex; flex-direction: column; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; padding: .9rem 1.1rem; }
h3 { margin: 0; font-size: .85rem; color: var(--mark); }
p { white-space: pre-wrap; margin: .4rem 0 1rem; }
details { margin-top: auto; border-top: 1px solid var(--line); padding-top: .5rem; font-weight: 600; }
summary { cursor: pointer; font-size: .85rem; font-weight: 400; padding: .3rem 0; }
"""


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each writer, a column for each number that any of them has, with a rating its interval."""
    shown = _shown_columns(results)
    lines = [["", *(COLUMNS[name] for name in shown)]]
    for writer, row in results.items():
        cells = {name: _as_text(row.get(name)) for name in shown}
        if (interval := row.get("rating_95")) is not None:
            cells["rating"] = f"{row['rating']:+.0f} [{interval[0]:+.0f}, {interval[1]:+.0f}]"
        lines.append([writer, *cells.values()])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        line[0] = line[0].ljust(widths[0])
        line[1:] = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
    return "\n".join("  ".join(line) for line in lines)


def _shown_columns(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    def is_told(value: Any, name: str) -> bool:
        return bool(value) if name in TROUBLES else value is not None

    return [name for name in COLUMNS if any(is_told(row.get(name), name) for row in results.values())]


def _as_text(value: float | int | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if isinstance(value, int) or abs(value) >= 10 else f"{value:.3f}"


def chart(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A picture of `draw`."""
    draw(results).savefig(path, dpi=120)


def draw(results: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """A small bar chart for each number, the writers in the same order and colours in all of them.

    A writer without that number has no bar, for 0 is a number, and of some the best.
    """
    from matplotlib.figure import Figure  # slow to import, and only needed here

    shown = _shown_columns(results)
    rows = (len(shown) + 3) // 4
    figure = Figure(figsize=(14, 0.9 + rows * (1.1 + 0.3 * len(results))), layout="constrained")
    for number, name in enumerate(shown, start=1):
        axes = figure.add_subplot(rows, 4, number)
        values = {place: row[name] for place, row in enumerate(results.values()) if row.get(name) is not None}
        axes.barh(list(values), list(values.values()), color=[f"C{place % 10}" for place in values])
        names = [writer[-28:] for writer in results]
        labels = [name if place in values else f"{name} (none)" for place, name in enumerate(names)]
        axes.set_yticks(range(len(results)), labels, fontsize=8)
        axes.set_ylim(len(results) - 0.5, -0.5)  # the first on top, and room for those without a bar
        axes.set_title(COLUMNS[name], fontsize=10)
    return figure


def page(
    requests: Sequence[str], texts: Mapping[str, Sequence[str | None]], path: Path, *, seed: int = 0
) -> None:
    """One HTML file without outside parts: under each request the texts in an order of its own, names hidden.

    The order depends on `seed` and the request's number alone; the names show on a click. A text is None
    where its writer could not be reached.
    """
    generator = random.Random(seed)
    sections = []
    for number, request in enumerate(requests, start=1):
        order = generator.sample(list(texts), len(texts))
        cards = "".join(
            f"<article><h3>{chr(64 + place) if place <= 26 else place}</h3>"
            f"<p>{_as_html(texts[writer][number - 1])}</p><details>"
            f"<summary>who wrote this?</summary>{html.escape(writer)}</details></article>"
            for place, writer in enumerate(order, start=1)
        )
        sections.append(
            f"<section><h2>Request {number} of {len(requests)}</h2>"
            f"<pre>{html.escape(request)}</pre><div>{cards}</div></section>"
        )
    path.write_text(
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<title>Dungeon descriptions, read blind</title>"
        f"<style>{STYLE}</style></head><body><h1>Dungeon descriptions, read blind</h1>"
        "<p class='lead'>Each request has several texts in an order of its own. Choose the one "
        "that you would use at your table, then look who wrote it.</p>"
        f"{''.join(sections)}</body></html>\n",
        encoding="utf-8",
    )


def _as_html(text: str | None) -> str:
    return "<em>no answer</em>" if text is None else html.escape(text.strip()) or "<em>no text</em>"
