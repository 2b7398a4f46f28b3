"""Several dungeon writers side by side: bits per byte, what their texts are like, who a blind judge prefers.

python eval_dungeons.py --models artifacts/runs/dungeons/export openai-community/gpt2
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

import modeling_gpt_scratch  # noqa: F401 (lets the Auto classes know our model)
from evaluation.comparison import chart, page, table
from evaluation.diversity import CopyIndex
from evaluation.dungeons import Room, bits_per_byte, describe_texts, read_rooms
from evaluation.endpoint import Endpoint, EndpointError
from evaluation.generation import generate_samples
from evaluation.judge import compare_blind, rate
from evaluation.loading import load_causal_model
from evaluation.mauve_score import mauve_scores, require_mauve
from training.device import choose_precision, start_processes

PERSON = "held-out descriptions"
BUNDLED = Path(__file__).parent / "data" / "corpora" / "dungeons"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[], help="folders or Hub ids")
    parser.add_argument(
        "--data", type=Path, default=BUNDLED / "test.jsonl", help="rooms (default: the bundled held-out ones)"
    )
    parser.add_argument(
        "--train_data", type=Path, default=BUNDLED / "train.jsonl", help="copies from it are reported"
    )
    parser.add_argument("--limit", type=int, default=100, help="rows to evaluate on (%(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.9, help="0: greedy (%(default)s)")
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--contestants", nargs="+", default=[], help="names of models behind --contestant_url"
    )
    parser.add_argument(
        "--contestant_url", help="OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1"
    )
    parser.add_argument("--contestant_api", choices=("chat", "completions"), default="chat")
    parser.add_argument("--judge_url", help="OpenAI-compatible endpoint of a judge")
    parser.add_argument("--judge_model", help="the judge's name there")
    parser.add_argument("--judge_api", choices=("chat", "completions"), default="chat")
    parser.add_argument(
        "--mauve_model", help="model whose features MAUVE compares; needs `pip install mauve-text`"
    )
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model")
    parser.add_argument("--output", type=Path, default=Path("artifacts/eval_dungeons"), help="a folder")
    arguments = parser.parse_args()
    if not arguments.models and not arguments.contestants:
        parser.error("nothing to compare: give --models, or --contestants with --contestant_url")
    if bool(arguments.contestants) != bool(arguments.contestant_url):
        parser.error("--contestants and --contestant_url belong together")
    if bool(arguments.judge_url) != bool(arguments.judge_model):
        parser.error("--judge_url and --judge_model belong together")
    try:
        compare(arguments)
    except (ValueError, EndpointError) as error:
        raise SystemExit(f"eval_dungeons.py: {error}") from error


def compare(arguments: argparse.Namespace) -> None:
    rooms = read_rooms(arguments.data, limit=arguments.limit)
    training = CopyIndex([room.description for room in read_rooms(arguments.train_data)])
    if arguments.mauve_model:
        require_mauve()  # now, not after an hour of writing

    results: dict[str, dict[str, Any]] = {PERSON: {}}
    texts = {PERSON: [room.description for room in rooms]}
    for name in arguments.models:
        print(f"{name}: predicting and writing {len(rooms)} descriptions", flush=True)
        texts[name], results[name] = write_locally(name, rooms, arguments)
    for name in arguments.contestants:
        print(f"{name}: writing {len(rooms)} descriptions at {arguments.contestant_url}", flush=True)
        endpoint = Endpoint(arguments.contestant_url, name, chat=arguments.contestant_api == "chat")
        sampling = {"max_tokens": arguments.max_new_tokens, "temperature": arguments.temperature}
        prompts = [room.prompt for room in rooms]
        texts[name], results[name] = endpoint.write(prompts, seed=arguments.seed, **sampling)
    for name, numbers in results.items():
        numbers |= describe_texts(texts[name], rooms, training)
    if arguments.mauve_model:
        options = {"trust_remote_code": arguments.trust_remote_code}
        scores = mauve_scores(texts, PERSON, arguments.mauve_model, start_accelerator(), **options)
        for name, score in scores.items():
            results[name]["mauve"] = score

    report: dict[str, Any] = {
        "data": str(arguments.data),
        "rows": len(rooms),
        "mauve_model": arguments.mauve_model,
        "sampling": {
            key: getattr(arguments, key) for key in ("max_new_tokens", "temperature", "top_p", "seed")
        },
    }
    if arguments.judge_url:
        judge = Endpoint(arguments.judge_url, arguments.judge_model, chat=arguments.judge_api == "chat")
        verdicts = compare_blind(judge, [room.prompt for room in rooms], texts)
        unusable = sum(verdict.score is None for verdict in verdicts)
        print(
            f"judge: {len(verdicts)} verdicts, {unusable} unusable; asked again: {judge.retries or 'never'}"
        )
        ratings = rate(verdicts) if unusable < len(verdicts) else {}  # the other numbers still stand
        for name, rating in ratings.items():
            results[name] |= {"rating": rating.value, "rating_95": [rating.low, rating.high]}
            print(f"  {name}: {rating.value:+.0f}, 95% [{rating.low:+.0f}, {rating.high:+.0f}]")
        report["judge"] = {"model": judge.model, "unusable": unusable, "retries": judge.retries}
        report["verdicts"] = [dataclasses.asdict(verdict) for verdict in verdicts]

    print(table(results))
    arguments.output.mkdir(parents=True, exist_ok=True)
    report |= {"results": results, "prompts": [room.prompt for room in rooms], "texts": texts}
    (arguments.output / "results.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    chart(results, arguments.output / "results.png")
    page([room.prompt for room in rooms], texts, arguments.output / "blind.html", seed=arguments.seed)
    print(f"written: results.json, results.png and blind.html (to read blind) in {arguments.output}")


def start_accelerator() -> Accelerator:
    return Accelerator(cpu=start_processes().device.type == "cpu")


def write_locally(
    name: str, rooms: list[Room], arguments: argparse.Namespace
) -> tuple[list[str], dict[str, Any]]:
    """A local model's texts, and its bits per byte on the held-out ones."""
    accelerator = start_accelerator()
    best = choose_precision(accelerator.device, "auto").value
    dtype = best if arguments.dtype == "auto" else arguments.dtype
    options = {"device": accelerator.device, "trust_remote_code": arguments.trust_remote_code}
    model, tokenizer = load_causal_model(name, dtype=dtype, **options)
    numbers = {"bits_per_byte": bits_per_byte(model, tokenizer, rooms, accelerator), "dtype": dtype}
    sampling = {key: getattr(arguments, key) for key in ("max_new_tokens", "temperature", "top_p", "seed")}
    return generate_samples(model, tokenizer, [room.prompt for room in rooms], **sampling), numbers


if __name__ == "__main__":
    main()
