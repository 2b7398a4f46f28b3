"""What recipes/bakeoff.sh does besides training: rooms that fit, a teacher's texts, the table.

python benchmarks/bakeoff.py fit --model BASE --output rooms.jsonl
python benchmarks/bakeoff.py write --model TEACHER --count 400 --output written.jsonl
python benchmarks/bakeoff.py table FOLDER
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import modeling_gpt_scratch  # noqa: E402, F401 (lets the Auto classes know our model)
from data.dungeon_files import BUNDLED_DUNGEONS, read_json_lines  # noqa: E402
from data.dungeons import build_prompt, encode_dungeon  # noqa: E402
from data.room_requests import requests  # noqa: E402
from evaluation.generation import generate_samples  # noqa: E402
from evaluation.loading import load_causal_model  # noqa: E402

# Heads of columns, and digits behind the point.
COLUMNS = {
    "bits/byte": 3,
    "things": 2,
    "distinct-2": 3,
    "copied 13-grams": 3,
    "general text": 3,
    "minutes": 1,
    "in all": 1,
    "USD": 3,
}
# Fields whose words a description should hold. Those of a setting, a place or a mood seldom occur even in the
# bundled descriptions: they are shown, not said.
THINGS = ("features", "exits", "inhabitants")


def load(name: str):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_causal_model(name, dtype="float32", device=device)


def fit(arguments: argparse.Namespace) -> None:
    """Test rooms that the base can read together with their whole prompt: no row of the table is cut."""
    model, tokenizer = load(arguments.model)
    context = getattr(model.config, "max_position_embeddings", 1024)
    lines = (BUNDLED_DUNGEONS / "test.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    kept = []
    for line, room in zip(lines, read_json_lines(BUNDLED_DUNGEONS / "test.jsonl"), strict=True):
        row = encode_dungeon(room.fields, room.description, tokenizer, sys.maxsize)
        prompt = row["labels"].count(-100)
        if max(len(row["input_ids"]), prompt + arguments.max_new_tokens) <= context:
            kept.append(line + "\n")
    arguments.output.write_text("".join(kept[: arguments.count]), encoding="utf-8")
    print(f"{len(kept[: arguments.count])} of {len(lines)} test rooms")


def write(arguments: argparse.Namespace) -> None:
    """A local teacher's texts over the grid that `data.synthesize` asks a large one for, as they come."""
    began = time.monotonic()
    model, tokenizer = load(arguments.model)
    rooms = read_json_lines(BUNDLED_DUNGEONS / "train.jsonl")
    wanted = list(requests(rooms, arguments.count, seed=0))
    prompts = [build_prompt(**request.fields) for request in wanted]
    texts = generate_samples(
        model,
        tokenizer,
        prompts,
        max_new_tokens=arguments.max_new_tokens,
        seed=0,
        temperature=0.7,
        top_p=0.95,
        batch_size=64,
    )
    rows = [
        {**request.fields, "description": text.strip(), "teacher": arguments.model}
        for request, text in zip(wanted, texts, strict=True)
        if text.strip()
    ]
    if arguments.metrics:
        took = {"elapsed_seconds": round(time.monotonic() - began, 1)}
        arguments.metrics.write_text(json.dumps(took) + "\n", encoding="utf-8")
    arguments.output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} rooms written by {arguments.model}")


def table(arguments: argparse.Namespace) -> None:
    """Markdown from the runs below a folder and from its evaluation.

    `rows.tsv` has, for each model, its row's name and the metrics of all that it took: its own run first,
    then its teacher's, and the teacher's writing.
    """
    folder = arguments.folder
    report = json.loads((folder / "evaluation" / "results.json").read_text(encoding="utf-8"))
    lines = (folder / "rows.tsv").read_text(encoding="utf-8").split("\n")[:-1]
    rows = {model: (name, metrics.split()) for model, name, metrics in (line.split("\t") for line in lines)}
    forgetting = {run.parent: json.loads(run.read_text()) for run in sorted(folder.glob("*/finetuning.json"))}
    print("| | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for model, numbers in report["results"].items():
        name, metrics = rows.get(model, (model, []))  # the descriptions themselves are no model's
        minutes = [minutes_of(folder / file) for file in metrics]
        general = None
        if metrics:
            general = forgetting[Path(model).parent]["after"].get("general")
        elif model in rows and forgetting:
            general = next(iter(forgetting.values()))["before"].get("general")
        cells: list[Any] = [numbers.get("bits_per_byte"), things(numbers), numbers.get("distinct_2")]
        cells += [numbers.get("copied_13_grams"), general]
        cells += [minutes[0], sum(minutes)] if minutes else [None, None]
        has_price = minutes and arguments.usd_per_hour is not None
        cells.append(sum(minutes) / 60 * arguments.usd_per_hour if has_price else None)
        digits = COLUMNS.values()
        shown = ["" if cell is None else f"{cell:.{n}f}" for cell, n in zip(cells, digits, strict=True)]
        print(f"| {name} | " + " | ".join(shown) + " |")


def things(numbers: dict[str, Any]) -> float | None:
    """The share of the features, exits and inhabitants asked for that the texts mention."""
    shares = [share for name, share in numbers.get("coverage", {}).items() if name in THINGS]
    return fmean(shares) if shares else None


def minutes_of(metrics: Path) -> float:
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return max(line.get("elapsed_seconds", 0.0) for line in lines) / 60


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for name, run in (("fit", fit), ("write", write)):
        command = commands.add_parser(name)
        command.add_argument("--model", required=True)
        command.add_argument("--output", type=Path, required=True)
        command.add_argument("--count", type=int, default=400)
        command.add_argument("--max_new_tokens", type=int, default=150)
        if name == "write":
            command.add_argument("--metrics", type=Path, help="where to write how long it took")
        command.set_defaults(run=run)
    command = commands.add_parser("table")
    command.add_argument("folder", type=Path)
    command.add_argument("--usd_per_hour", type=float, help="of the machine; without it, no money is shown")
    command.set_defaults(run=table)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
