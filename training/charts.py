"""Line charts as HTML and inline SVG: lines stretch with the page, text keeps its size, CSS colours."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

# More points than that are not seen: a mean is drawn, and the range around it in a lighter tone.
MOST_POINTS = 240
MOST_DOTS = 50
COLOURS = 6


@dataclass(frozen=True)
class Series:
    """A line of a chart, or its dots: (x, y) in the chart's units, x rising. `colour` counts from 0."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dots: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Reference:
    """A horizontal line with what it is, from elsewhere."""

    name: str
    y: float


@dataclass(frozen=True)
class Chart:
    """What to draw. `form` writes a value of the y axis; `log` is for values that span decades."""

    title: str
    unit: str
    series: Sequence[Series]
    form: Callable[[float], str]
    references: Sequence[Reference] = field(default_factory=tuple)
    log: bool = False
    note: str = ""


def draw(chart: Chart) -> str:
    """HTML of the chart; nothing where it has no points."""
    series = [Series(s.name, _finite(s), s.colour, s.dots, s.faint) for s in chart.series]
    series = [s for s in series if s.points]
    if not series:
        return ""
    xs = [x for s in series for x, _ in s.points]
    low, high = _range([[y for _, y in s.points] for s in series], [r.y for r in chart.references], chart.log)
    left, right = min(0.0, *xs), max(xs) or 1.0
    scale = math.log10 if chart.log else float

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left)
        up = (scale(max(y, low)) - scale(low)) / (scale(high) - scale(low))
        return round(1000 * across, 1), round(1000 * (1 - min(max(up, 0.0), 2.0)), 1)

    marks, labels = [], []
    for tick in _log_ticks(low, high) if chart.log else _ticks(low, high, 5):
        _, y = place(left, tick)
        marks.append(f'<path class="grid" d="M0 {y}H1000"/>')
        labels.append(f'<span class="y" style="top:{y / 10:.1f}%">{escape(chart.form(tick))}</span>')
    for tick in _ticks(left, right, 4):
        x, _ = place(tick, low)
        labels.append(f'<span class="x" style="left:{x / 10:.1f}%">{escape(in_short(tick))}</span>')
    for reference in chart.references:
        _, y = place(left, reference.y)
        marks.append(f'<path class="reference" d="M0 {y}H1000"/>')
        labels.append(f'<span class="reference" style="top:{y / 10:.1f}%">{escape(reference.name)}</span>')
    for one in series:
        marks += _marks(one, place)
    legend = (
        ""
        if len(series) == 1
        else "".join(
            f'<li class="c{s.colour % COLOURS}{" dots" if s.dots else ""}">{escape(s.name)}</li>'
            for s in series
        )
    )
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    return (
        f'<figure><figcaption><b>{escape(chart.title)}</b> <span class="unit">{escape(chart.unit)}</span>'
        f'<ul class="legend">{legend}</ul></figcaption><div class="plot"><svg viewBox="0 0 1000 1000" '
        f'preserveAspectRatio="none" role="img" aria-label="{escape(chart.title, quote=True)}">'
        f"{''.join(marks)}"
        f'</svg>{"".join(labels)}</div><p class="axis">tokens</p>{note}</figure>'
    )


def _marks(series: Series, place: Callable[[float, float], tuple[float, float]]) -> list[str]:
    colour = f"c{series.colour % COLOURS}"
    if series.dots:
        placed = [place(x, y) for x, y in series.points]
        line = f'<path class="line {colour}" d="M{" ".join(f"{x} {y}" for x, y in placed)}"/>'
        if len(placed) > MOST_DOTS:
            return [line]
        # A line without length and with round ends is a dot that does not stretch.
        return [line, f'<path class="dot {colour}" d="{"".join(f"M{x} {y}h0" for x, y in placed)}"/>']
    size = -(-len(series.points) // MOST_POINTS)
    groups = [series.points[i : i + size] for i in range(0, len(series.points), size)]
    middle = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    path = " ".join(f"{x} {y}" for x, y in (place(*point) for point in middle))
    line = f'<path class="line {"faint " if series.faint else ""}{colour}" d="M{path}"/>'
    if size == 1:
        return [line]
    above = [place(x, max(y for _, y in g)) for (x, _), g in zip(middle, groups, strict=True)]
    below = [place(x, min(y for _, y in g)) for (x, _), g in zip(middle, groups, strict=True)]
    area = " ".join(f"{x} {y}" for x, y in [*above, *reversed(below)])
    return [f'<path class="range {colour}" d="M{area}z"/>', line]


def _finite(series: Series) -> list[tuple[float, float]]:
    return [(x, y) for x, y in series.points if y is not None and math.isfinite(y)]


def _range(lines: list[list[float]], references: list[float], log: bool) -> tuple[float, float]:
    ys = [y for line in lines for y in line]
    if log:
        ys = [y for y in ys if y > 0] or [1.0]
        return min(ys) / 1.2, max(ys) * 1.2
    # The first steps of a long line are far above the rest and would flatten it: they leave at the top.
    highest = [sorted(line)[int(0.985 * (len(line) - 1))] if len(line) > 40 else max(line) for line in lines]
    low, high = min([*ys, *references]), max([*highest, *references])
    # Values that hardly differ get room, or their labels would need more digits than they have.
    gap = max((high - low) * 0.06, abs(high) * 0.02) or 1.0
    return (low - gap if low - gap > 0 or low < 0 else 0.0), high + gap


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from `low` to `high`."""
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if math.log10(high / low) > 2.5 else (1, 2, 5)
    ticks = [tick for power in powers for factor in factors if low <= (tick := factor * 10.0**power) <= high]
    return ticks if len(ticks) > 2 else _ticks(low, high, 4)


def in_percent(number: float) -> str:
    """0.305 as "30.5%"."""
    return f"{100 * number:.4g}%"


def with_exponent(number: float) -> str:
    """0.0006 as "6e-4"."""
    power = math.floor(math.log10(abs(number))) if number else 0
    return f"{number / 10**power:.3g}e{power}" if power < -1 else f"{number:.3g}"


def in_short(number: float) -> str:
    """1,500,000 as "1.5 M"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.4g}"
