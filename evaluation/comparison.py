"""Writers side by side: a table in the terminal, a bar chart, a page on which a person reads blind."""

import html
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each writer, a column for each number that any of them has."""
    shown = [name for name in COLUMNS if any(row.get(name) is not None for row in results.values())]
    lines = [["", *(COLUMNS[name] for name in shown)]]
    for writer, row in results.items():
        values = [row.get(name) for name in shown]
        lines.append([writer, *(_shown(value) for value in values)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        line[0] = line[0].ljust(widths[0])
        line[1:] = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
    return "\n".join("  ".join(line) for line in lines)


def _shown(value: float | int | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if isinstance(value, int) or abs(value) >= 10 else f"{value:.3f}"


def chart(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A small bar chart for each number, the writers in the same order and colours in all of them."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    shown = [name for name in COLUMNS if any(row.get(name) is not None for row in results.values())]
    rows = (len(shown) + 3) // 4
    figure = Figure(figsize=(14, 0.9 + rows * (1.1 + 0.3 * len(results))), layout="constrained")
    for number, name in enumerate(shown, start=1):
        axes = figure.add_subplot(rows, 4, number)
        values = [row.get(name) or 0.0 for row in results.values()]
        colors = [f"C{index % 10}" for index in range(len(values))]
        axes.barh(range(len(values)), values, color=colors)
        axes.set_yticks(range(len(values)), [writer[-28:] for writer in results], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(COLUMNS[name], fontsize=10)
    figure.savefig(path, dpi=120)


def page(requests: Sequence[str], texts: Mapping[str, Sequence[str]], path: Path, *, seed: int = 0) -> None:
    """One HTML file without outside parts: under each request the texts in an order of its own, names hidden.

    The order depends on `seed` and the request's number alone; the names show on a click.
    """
    generator = random.Random(seed)
    sections = []
    for number, request in enumerate(requests):
        order = generator.sample(list(texts), len(texts))
        cards = "".join(
            f"<article><h3>{place}</h3><p>{html.escape(texts[writer][number].strip())}</p><details>"
            f"<summary>who wrote this?</summary>{html.escape(writer)}</details></article>"
            for place, writer in enumerate(order, start=1)
        )
        sections.append(f"<section><pre>{html.escape(request)}</pre><div>{cards}</div></section>")
    path.write_text(
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Dungeon descriptions, read blind</title>"
        "<style>body{font:16px/1.5 serif;margin:2rem auto;max-width:75rem}"
        "div{display:grid;grid-template-columns:repeat(auto-fit,minmax(18rem,1fr));gap:1rem}"
        "article{border:1px solid #999;border-radius:6px;padding:0 1rem 1rem}p{white-space:pre-wrap}"
        "pre{white-space:pre-wrap;background:#8882;padding:.6rem}summary{color:#666;cursor:pointer}</style>"
        f"<h1>Dungeon descriptions, read blind</h1>{''.join(sections)}</html>\n",
        encoding="utf-8",
    )
