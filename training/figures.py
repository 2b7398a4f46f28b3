"""The numbers of a run that a page shows, as text and as charts; the published lines beside them."""

import math
import statistics
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import Any

from training.charts import Chart, Reference, Series, in_percent, in_short
from training.record import RunRecord
from training.throughput import in_words

# lm-evaluation-harness 0.4, acc_norm on all 10,042 questions of HellaSwag's validation split.
HELLASWAG_GPT2 = Reference("GPT-2 124M, all 10,042 questions: 31.14%", 0.3114)
HELLASWAG_CHANCE = Reference("chance", 0.25)
# By corpus: llm.c's GPT-2 124M after 10 billion tokens, as modded-nanogpt's first record quotes it; OpenAI's
# weights on build-nanogpt's validation tokens, the baseline of its plots (play.ipynb).
PUBLISHED_LOSSES = {
    "fineweb": Reference("llm.c, GPT-2 124M, 10 B tokens of FineWeb: 3.272", 3.272),
    "fineweb-edu": Reference("OpenAI's GPT-2 124M on FineWeb-Edu, by build-nanogpt: 3.292", 3.2924),
}
GPT2_WORDS = 50_257


def status_of(run: RunRecord) -> tuple[str, str]:
    """One word and a sentence."""
    step, length = run.metrics[-1]["step"], planned_steps(run)
    of = f" of {length:,}" if length > step else ""
    ends = [event for event in run.events if event["event"] in ("finished", "stopped", "started", "resumed")]
    last = ends[-1] if ends else {}
    when = f" on {when_in_words(last['unix_time'])}" if last else ""
    if last.get("event") == "finished":
        return "finished", f"{step:,} steps, finished{when}."
    if last.get("event") == "stopped":
        return "stopped", f"Stopped after step {step:,}{of}{when}: {last.get('reason', '')}."
    if not run.is_running:
        return "interrupted", f"Ended without notice after step {step:,}{of}; the same command goes on."
    return "running", f"Step {step:,}{of}; {last.get('event', 'started')}{when}."


def planned_steps(run: RunRecord) -> int:
    """How long the run is to be, by its settings and its budgets; 0 where nothing says so."""
    settings = run.settings
    length = settings.get("max_steps")
    if not isinstance(length, int):
        return 0
    tokens, batch = settings.get("budget_tokens"), settings.get("batch_tokens")
    if isinstance(tokens, int) and isinstance(batch, int) and tokens and batch:
        length = min(length, tokens // batch)
    fitted, budgets = run.length.get("max_steps"), run.length.get("budgets")
    is_of_these = isinstance(budgets, dict) and all(settings.get(n) == value for n, value in budgets.items())
    return fitted if is_fitted(run) and is_of_these and isinstance(fitted, int) else length


def is_fitted(run: RunRecord) -> bool:
    """Whether money or minutes decide how long it is."""
    settings = run.settings
    return bool(settings.get("budget_usd") or (settings.get("fit_schedule") and settings.get("max_minutes")))


def key_figures(run: RunRecord) -> dict[str, tuple[str, str]]:
    """Name -> value, small print."""
    figures: dict[str, tuple[str, str]] = {}
    trained = run.with_number("loss")
    validated, scored = run.with_number("validation_loss"), run.with_number("hellaswag_acc_norm")
    if validated:
        best = min(validated, key=lambda line: line["validation_loss"])
        is_last = best is validated[-1]
        small = "the lowest" if is_last else f"lowest {best['validation_loss']:.4f} at step {best['step']:,}"
        figures["Validation loss"] = (f"{validated[-1]['validation_loss']:.4f}", f"nats/token, {small}")
        if isinstance(validated[-1].get("bits_per_byte"), float):
            figures["Bits per byte"] = (f"{validated[-1]['bits_per_byte']:.4f}", "of validation text")
    elif trained:
        figures["Training loss"] = (f"{trained[-1]['loss']:.4f}", "nats/token, last step")
    averaged = run.with_number("averaged_validation_loss")
    if averaged:
        figures["With averaged weights"] = (f"{averaged[-1]['averaged_validation_loss']:.4f}", "nats/token")
    if scored:
        share, asked = scored[-1]["hellaswag_acc_norm"], scored[-1].get("hellaswag_questions", 0)
        margin = 1.96 * math.sqrt(share * (1 - share) / asked) if asked else 0.0
        figures["HellaSwag"] = (f"{share:.1%}", f"± {100 * margin:.1f} points, {asked:,} questions")
    figures["Tokens"] = (in_short(run.metrics[-1].get("tokens", 0)), f"{run.metrics[-1]['step']:,} steps")
    started = next((event for event in run.events if "parameters" in event), {})
    if started:
        figures["Parameters"] = (in_short(started["parameters"]), "")
    timed = run.with_number("elapsed_seconds")
    if timed:
        figures["Time"] = (in_words(timed[-1]["elapsed_seconds"]), "start-up not counted")
    speeds = [line["tokens_per_second"] for line in run.with_number("tokens_per_second")]
    if speeds:
        figures["Speed"] = (in_short(statistics.median(speeds)), "tokens/s, median")
    used = [line["mfu"] for line in run.with_number("mfu")]
    if used:
        figures["MFU"] = (f"{statistics.median(used):.1%}", started.get("device", ""))
    spent = run.with_number("spend_usd")
    if spent:
        price = run.settings.get("price_per_gpu_hour_usd", 0)
        figures["Spend"] = (f"${spent[-1]['spend_usd']:,.2f}", f"at ${price:,.2f} a device-hour")
    return figures


def receipt_rows(run: RunRecord) -> dict[str, str]:
    names = {
        "source": "source",
        "config": "part of it",
        "tokenizer": "tokenizer",
        "vocab_size": "vocabulary",
        "training_tokens": "tokens for training",
        "validation_tokens": "tokens for validation",
        "documents": "documents",
        "duplicates_dropped": "duplicates left out",
        "data_fingerprint": "fingerprint (SHA-256)",
        "manifest_sha256": "manifest (SHA-256)",
    }
    rows = {
        title: shown(run.receipt[name]) for name, title in names.items() if run.receipt.get(name) is not None
    }
    measured = run.receipt.get("contamination")
    if isinstance(measured, dict):
        rows["evaluation questions in it"] = (
            f"{measured.get('questions_in_corpus')} of {measured.get('questions')}"
        )
    read = run.metrics[-1].get("tokens", 0)
    if run.receipt.get("training_tokens"):
        rows["read by this run"] = (
            f"{read:,} tokens, {read / run.receipt['training_tokens']:.3g} times the training tokens"
        )
    return rows


def loss_chart(runs: Sequence[RunRecord]) -> Chart:
    series = []
    for number, run in enumerate(runs):
        name = f"{run.name}, " if len(runs) > 1 else ""
        colour = number if len(runs) > 1 else 0
        series.append(Series(f"{name}training", _points(run, "loss"), colour, faint=True))
        dots = _points(run, "validation_loss")
        series.append(Series(f"{name}validation", dots, colour if len(runs) > 1 else 1, dots=True))
        averaged = _points(run, "averaged_validation_loss")
        series.append(Series(f"{name}averaged weights", averaged, colour if len(runs) > 1 else 2, dots=True))
    published = {_published_loss(run) for run in runs}
    if len(published) == 1 and (line := published.pop()):
        note = (
            "The dashed line is a published validation loss on the same corpus and vocabulary, measured on "
            "its authors' validation tokens, not on these."
        )
        return Chart("Loss", "nats/token", series, "{:.2f}".format, (line,), note=note)
    note = (
        "Published GPT-2 losses are on FineWeb or FineWeb-Edu with GPT-2's vocabulary; this is other text or "
        "another vocabulary, so no line of theirs is drawn."
    )
    return Chart("Loss", "nats/token", series, "{:.2f}".format, note=note)


def _published_loss(run: RunRecord) -> Reference | None:
    """A loss of a GPT-2 on the corpus and the vocabulary of this run."""
    corpus = str(run.receipt.get("source", "")).lower().rpartition("/")[2]
    return PUBLISHED_LOSSES.get(corpus) if run.receipt.get("vocab_size") == GPT2_WORDS else None


def hellaswag_chart(runs: Sequence[RunRecord]) -> Chart:
    series = [
        Series(run.name, _points(run, "hellaswag_acc_norm"), number, dots=True)
        for number, run in enumerate(runs)
    ]
    return Chart(
        "HellaSwag",
        "acc_norm of lm-evaluation-harness",
        series,
        in_percent,
        (HELLASWAG_GPT2, HELLASWAG_CHANCE),
        note="Asked while training, a part of the questions; the published line is of all of them.",
    )


def chart_of(
    runs: Sequence[RunRecord],
    number: str,
    title: str,
    unit: str,
    form: str | Callable[[float], str],
    *,
    dots: bool = False,
    log: bool = False,
) -> Chart:
    series = [Series(run.name, _points(run, number), n, dots=dots) for n, run in enumerate(runs)]
    return Chart(title, unit, series, form if callable(form) else form.format, log=log)


def _points(run: RunRecord, number: str) -> list[tuple[float, float]]:
    return [(line.get("tokens", line["step"]), line[number]) for line in run.with_number(number)]


def peak_in_words(run: RunRecord) -> str:
    started = next((event for event in run.events if "peak_tflops" in event), None)
    return f"of {started['peak_tflops']:,.4g} TFLOP/s, {started['peak_source']}" if started else ""


def shown(value: Any) -> str:
    if isinstance(value, list):
        return " · ".join(map(str, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:,}" if isinstance(value, int) else str(value) or "none"


def when_in_words(unix_time: float) -> str:
    return f"{datetime.fromtimestamp(unix_time, timezone.utc):%d %b %Y, %H:%M:%S}"
