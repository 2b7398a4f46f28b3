"""What recipes/bakeoff.sh does besides training: rooms that fit, a teacher's texts, the table.

python benchmarks/bakeoff.py fit --model BASE --output rooms.jsonl
python benchmarks/bakeoff.py write --model TEACHER --count 400 --output written.jsonl
python benchmarks/bakeoff.py table FOLDER
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import modeling_gpt_scratch  # noqa: E402, F401 (lets the Auto classes know our model)
from data.dungeon_files import BUNDLED_DUNGEONS, read_json_lines  # noqa: E402
from data.dungeons import build_prompt, encode_dungeon  # noqa: E402
from data.room_requests import requests  # noqa: E402
from evaluation.generation import generate_samples  # noqa: E402
from evaluation.loading import load_causal_model  # noqa: E402

NOTHING = "no fine-tuning"
COLUMNS = ("bits/byte", "coverage", "distinct-2", "copied 13-grams", "general text", "minutes", "USD")


def load(name: str):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_causal_model(name, dtype="float32", device=device)


def fit(arguments: argparse.Namespace) -> None:
    """Test rooms that the base can read together with their whole prompt: no row of the table is cut."""
    model, tokenizer = load(arguments.model)
    context = getattr(model.config, "max_position_embeddings", 1024)
    lines = (BUNDLED_DUNGEONS / "test.jsonl").read_text(encoding="utf-8").splitlines()
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
    arguments.output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} rooms written by {arguments.model}")


def table(arguments: argparse.Namespace) -> None:
    """Markdown from the runs below a folder and from its evaluation."""
    folder = arguments.folder
    results = json.loads((folder / "evaluation" / "results.json").read_text(encoding="utf-8"))
    names = json.loads((folder / "names.json").read_text(encoding="utf-8"))  # export or base -> row's name
    print("| | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for model, numbers in results["results"].items():
        cells = [numbers.get("bits_per_byte"), numbers.get("coverage_all"), numbers.get("distinct_2")]
        cells.append(numbers.get("copied_13_grams"))
        run = Path(model).parent
        told = run / "finetuning.json"
        minutes = None
        if model in names and told.exists() and names[model] != NOTHING:
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            minutes = max(line.get("elapsed_seconds", 0) for line in lines) / 60
            cells.append(json.loads(told.read_text())["after"].get("general"))
        else:
            others = list(folder.glob("*/finetuning.json")) if model in names else []
            cells.append(json.loads(others[0].read_text())["before"].get("general") if others else None)
        cells += [minutes, minutes / 60 * arguments.usd_per_hour if minutes is not None else None]
        shown = [
            "" if cell is None else f"{cell:.{digits}f}" for cell, digits in zip(cells, DIGITS, strict=True)
        ]
        print(f"| {names.get(model, model)} | " + " | ".join(shown) + " |")


DIGITS = (3, 2, 3, 3, 3, 1, 2)


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
        command.set_defaults(run=run)
    command = commands.add_parser("table")
    command.add_argument("folder", type=Path)
    command.add_argument("--usd_per_hour", type=float, default=0.0)
    command.set_defaults(run=table)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
