"""A run as one HTML page that needs nothing else: no network, no script, all text escaped."""

import shlex
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

from training.charts import draw, in_percent, in_short, with_exponent
from training.figures import (
    chart_of,
    hellaswag_chart,
    is_fitted,
    key_figures,
    loss_chart,
    peak_in_words,
    receipt_rows,
    shown,
    status_of,
    when_in_words,
)
from training.record import RunRecord
from training.style import STYLE
from training.throughput import in_words

# While a run goes on, a browser reads its page again this often.
SECONDS_BETWEEN_RELOADS = 60
MOST_SAMPLED_STEPS = 8


def run_page(run: RunRecord) -> str:
    """The page of one run."""
    last = run.metrics[-1]
    status, sentence = status_of(run)
    reload = f'<meta http-equiv="refresh" content="{SECONDS_BETWEEN_RELOADS}">' if status == "running" else ""
    warnings = "".join(f'<p class="warning">{escape(problem)}</p>' for problem in run.problems)
    if not run.with_number("validation_loss"):
        warnings += (
            '<p class="warning">No validation yet: the run has no validation set, or has not reached it.</p>'
        )
    body = [
        f'<h1>{escape(run.name)}<span class="status {status}">{status}</span></h1>',
        f'<p class="lead">{escape(sentence)}</p>',
        warnings,
        _tiles(key_figures(run)),
        "<h2>Learning</h2>",
        draw(loss_chart([run])),
        '<div class="pair">',
        draw(hellaswag_chart([run])),
        draw(chart_of([run], "bits_per_byte", "Bits per byte", "of validation text", "{:.3f}", dots=True)),
        draw(chart_of([run], "learning_rate", "Learning rate", "", with_exponent)),
        draw(chart_of([run], "gradient_norm", "Gradient norm", "before clipping", in_short, log=True)),
        "</div>",
        "<h2>Speed</h2>" if run.with_number("tokens_per_second") else "",
        '<div class="pair">',
        draw(chart_of([run], "tokens_per_second", "Throughput", "tokens/s", in_short)),
        draw(chart_of([run], "mfu", "Model FLOPs utilisation", peak_in_words(run), in_percent)),
        "</div>",
        _times(run),
        _samples(run),
        _events(run),
        "<h2>Data</h2>",
        _table(receipt_rows(run), "What the run was trained on is not recorded."),
        "<h2>Reproduce</h2>",
        _commands(run),
        _settings(run),
    ]
    return _document(run.name, body, f"Step {last['step']:,} of the run in {run.path}.", reload)


def comparison_page(runs: Sequence[RunRecord]) -> str:
    """Several runs beside one another: key figures, curves, what differs in their settings, last samples."""
    figures = [key_figures(run) for run in runs]
    names = list(dict.fromkeys(name for one in figures for name in one))
    heads = "".join(f'<th class="number">{escape(run.name)}</th>' for run in runs)
    rows = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(f'<td class="number">{escape(one.get(name, ("–", ""))[0])}</td>' for one in figures)
        + "</tr>"
        for name in names
    )
    differing = [
        name
        for name in dict.fromkeys(name for run in runs for name in run.settings)
        if len({repr(run.settings.get(name)) for run in runs}) > 1 and name != "run_dir"
    ]
    different = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(f'<td class="number">{escape(shown(run.settings.get(name)))}</td>' for run in runs)
        + "</tr>"
        for name in differing
    )
    warnings = "".join(
        f'<p class="warning">{escape(run.name)}: {escape(text)}</p>' for run in runs for text in run.problems
    )
    body = [
        f"<h1>{len(runs)} runs side by side</h1>",
        f'<p class="lead">{escape(", ".join(run.name for run in runs))}</p>',
        warnings,
        "<h2>Figures</h2>",
        f'<div class="scroll"><table><thead><tr><th></th>{heads}</tr></thead>{rows}</table></div>',
        "<h2>Learning</h2>",
        draw(loss_chart(runs)),
        '<div class="pair">',
        draw(hellaswag_chart(runs)),
        draw(chart_of(runs, "bits_per_byte", "Bits per byte", "of validation text", "{:.3f}", dots=True)),
        draw(chart_of(runs, "tokens_per_second", "Throughput", "tokens/s", in_short)),
        draw(chart_of(runs, "mfu", "Model FLOPs utilisation", "", in_percent)),
        draw(chart_of(runs, "gradient_norm", "Gradient norm", "before clipping", in_short, log=True)),
        draw(chart_of(runs, "learning_rate", "Learning rate", "", with_exponent)),
        "</div>",
        "<h2>Settings that differ</h2>",
        f'<div class="scroll"><table><thead><tr><th></th>{heads}</tr></thead>{different}</table></div>'
        if differing
        else "<p>None.</p>",
        *(_samples(run, f"Last samples of {run.name}", only_last=True) for run in runs),
    ]
    return _document("Runs side by side", body, "Runs: " + ", ".join(str(run.path) for run in runs) + ".")


def _document(title: str, body: Iterable[str], colophon: str, head: str = "") -> str:
    now = datetime.now(timezone.utc)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # The page may come from a folder that somebody else wrote into: nothing in it may load or run.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"{head}<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(body)}<footer>{escape(colophon)} Written on {now:%d %B %Y at %H:%M} UTC."
        "</footer></main></body></html>\n"
    )


def _times(run: RunRecord) -> str:
    """Where the time of all starts that ended in order went."""
    totals: dict[str, float] = {}
    for event in run.events:
        for activity, seconds in (event.get("seconds") or {}).items():
            totals[activity] = totals.get(activity, 0.0) + seconds
    whole = sum(totals.values())
    if not whole:
        return ""
    parts = sorted(totals.items(), key=lambda item: -item[1])
    bar = "".join(
        f'<i class="c{number % 6}" style="flex:{seconds / whole:.4f}"></i>'
        for number, (_, seconds) in enumerate(parts)
    )
    legend = "".join(
        f'<li class="c{number % 6}">{escape(activity)} {in_words(seconds)}, {seconds / whole:.1%}</li>'
        for number, (activity, seconds) in enumerate(parts)
    )
    memory = max((event.get("peak_memory_bytes") or 0 for event in run.events), default=0)
    at_most = (
        f'<p class="note">Memory of the main process: {memory / 1e9:,.2f} GB at most.</p>' if memory else ""
    )
    return (
        f'<figure><figcaption><b>Where the time went</b></figcaption><div class="times">{bar}</div>'
        f'<ul class="legend">{legend}</ul>{at_most}</figure>'
    )


def _samples(run: RunRecord, title: str = "Samples over time", *, only_last: bool = False) -> str:
    if not run.samples:
        return ""
    parts = [f"<h2>{escape(title)}</h2>"]
    steps = sorted({sample["step"] for sample in run.samples}, reverse=True)
    shown_steps = 1 if only_last else MOST_SAMPLED_STEPS
    if len(steps) > shown_steps:  # the last, the first, and what lies evenly between
        last = len(steps) - 1
        steps = [steps[round(i * last / max(1, shown_steps - 1))] for i in range(shown_steps)]
    for number, step in enumerate(steps):
        written = "".join(
            f"<blockquote><b>{escape(str(sample['prompt']))}</b>{escape(str(sample['text']))}</blockquote>"
            for sample in run.samples
            if sample["step"] == step
        )
        if number == 0:
            parts.append(f'<p class="step">step {step:,}</p>{written}')
        else:
            parts.append(f"<details><summary>step {step:,}</summary>{written}</details>")
    return "".join(parts)


def _events(run: RunRecord) -> str:
    """Starts, interruptions, skipped steps and spikes."""
    skipped = sum(event["event"] == "skipped_step" for event in run.events)
    spikes = sum(event["event"] == "loss_spike" for event in run.events)
    starts = sum(event["event"] in ("started", "resumed") for event in run.events)
    sentence = (
        f"{starts} start{'s' if starts != 1 else ''}, {skipped} skipped step{'s' if skipped != 1 else ''}, "
        f"{spikes} loss spike{'s' if spikes != 1 else ''}."
    )
    if not run.events:
        return "<h2>Events</h2><p>None are recorded.</p>"

    def where(event: dict[str, Any]) -> str:
        processes = event.get("processes", 1)
        many = f"{processes} processes" if processes != 1 else "1 process"
        return f"{many}, {event.get('device', 'device not recorded')}"

    words = {
        "started": lambda e: f"started on {where(e)}",
        "resumed": lambda e: f"went on, on {where(e)}",
        "stopped": lambda e: f"stopped: {e.get('reason', '')}",
        "finished": lambda e: "finished",
        "skipped_step": lambda e: "loss or gradients were not finite; no update was made",
        "loss_spike": lambda e: f"the loss jumped to {e.get('loss', float('nan')):.3f}",
    }
    shown = run.events if len(run.events) <= 40 else [*run.events[:20], *run.events[-20:]]
    rows = "".join(
        f'<tr><td class="number">{event.get("step", 0):,}</td>'
        f"<td>{escape(when_in_words(event['unix_time']))}</td>"
        f"<td>{escape(words.get(event['event'], lambda e: str(e['event']))(event))}</td></tr>"
        for event in shown
    )
    left_out = f"<p>{len(run.events) - 40:,} in the middle are left out.</p>" if len(run.events) > 40 else ""
    return (
        f"<h2>Interruptions and skipped steps</h2><p>{sentence}</p>{left_out}"
        '<div class="scroll"><table><thead><tr>'
        f'<th class="number">step</th><th>when (UTC)</th><th>what</th></tr></thead>{rows}</table></div>'
    )


def _commands(run: RunRecord) -> str:
    started = next((event for event in run.events if event["event"] == "started"), {})
    command = started.get("command") or []
    launch = shlex.join(["accelerate", "launch", *_launcher_flags(started)])
    parts, script = [], "train_accelerate.py"
    if command and str(command[0]).endswith(".py"):
        script = Path(str(command[0])).name
        given = shlex.join([script, *map(str, command[1:])])
        parts.append(f"<p>It was started with</p><pre>{escape(launch)} {escape(given)}</pre>")
    again = [script, "--config", str(run.path / "settings.yaml"), "--run_dir", f"{run.path}-again"]
    if run.settings.get("push_to_hub"):  # the name on the Hub is this run's
        usual = {"push_to_hub": False, "hub_model_id": "", "hub_private": False, "hub_strategy": "end"}
        for name, value in usual.items():
            if run.settings.get(name, value) != value:
                again += [f"--{name}", str(value).lower()]
    parts.append(
        "<p>With all settings as they were, in a new folder:</p>"
        f"<pre>{escape(launch)} {escape(shlex.join(again))}</pre>"
    )
    versions = ", ".join(f"{name} {version}" for name, version in (started.get("versions") or {}).items())
    if versions:
        parts.append(f"<p>{escape(versions)}; {_how_alike(run, started)}</p>")
    return "".join(parts)


def _launcher_flags(started: dict[str, Any]) -> list[str]:
    """Those of `accelerate launch` that start as many processes in the same way."""
    processes, machines = started.get("processes", 1), started.get("machines", 1)
    flags = []
    if started.get("sharding") == "FSDP":
        flags = ["--config_file", "accelerate_configs/fsdp2.yaml"]
    elif processes > 1:  # on the CPU several processes need a file that says so
        flags = ["--config_file", f"accelerate_configs/{'ddp' if machines == 1 else 'multi_node'}.yaml"]
    if flags:
        flags += ["--num_processes", str(processes)]
    if machines > 1:
        flags += ["--num_machines", str(machines), "--machine_rank", "RANK", "--main_process_ip", "ADDRESS"]
    return flags


def _how_alike(run: RunRecord, started: dict[str, Any]) -> str:
    """What another start of the same command would have in common with this one."""
    same = "the same versions, device and processes"
    if is_fitted(run):
        return f"{same} give a run alike, of a length that is fitted to its budget anew."
    if str(started.get("device", "")).startswith("CPU") or run.settings.get("deterministic"):
        return f"{same} give the same bits."
    return (
        f"{same} give the same run but for the rounding of GPU kernels; with --deterministic, the same bits."
    )


def _settings(run: RunRecord) -> str:
    if not run.settings:
        return ""
    table = _table({name: shown(value) for name, value in run.settings.items()}, "")
    return f"<details><summary>All {len(run.settings)} settings</summary>{table}</details>"


def _tiles(figures: dict[str, tuple[str, str]]) -> str:
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(small)}</small></dd></div>"
        for name, (value, small) in figures.items()
    )
    return f'<dl class="tiles">{tiles}</dl>'


def _table(rows: dict[str, str], otherwise: str) -> str:
    if not rows:
        return f"<p>{escape(otherwise)}</p>"
    cells = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items()
    )
    return f'<div class="scroll"><table class="key">{cells}</table></div>'
