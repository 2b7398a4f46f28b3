"""Several dungeon writers side by side: bits per byte, what their texts are like, who a blind judge prefers.

python eval_dungeons.py --models artifacts/runs/dungeons/export openai-community/gpt2
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from accelerate import Accelerator

import modeling_gpt_scratch  # noqa: F401 (lets the Auto classes know our model)
from evaluation.comparison import chart, page, table
from evaluation.diversity import CopyIndex
from evaluation.dungeons import Room, bits_per_byte, describe_texts, read_rooms
from evaluation.endpoint import Endpoint, EndpointError
from evaluation.generation import generate_samples
from evaluation.judge import Rating, judge_texts
from evaluation.loading import identify, load_causal_model
from evaluation.mauve_score import mauve_scores, require_mauve
from evaluation.writers import Written, keep, kept, write_remotely
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
    parser.add_argument("--contestants", nargs="+", default=[], help="models behind --contestant_url")
    parser.add_argument("--contestant_url", help="OpenAI-compatible, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--contestant_api", choices=("chat", "completions"), default="chat")
    parser.add_argument("--judge_url", help="OpenAI-compatible endpoint of a judge")
    parser.add_argument("--judge_model", help="the judge's name there")
    parser.add_argument("--judge_api", choices=("chat", "completions"), default="chat")
    parser.add_argument("--mauve_model", help="whose features MAUVE compares; needs `pip install mauve-text`")
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
    names = Counter([PERSON, *arguments.models, *arguments.contestants])
    if twice := [name for name, times in names.items() if times > 1]:
        parser.error(f"each writer needs a name of its own, and {', '.join(twice)} stands there twice")
    if not start_processes().is_main_process:
        return  # nothing here is shared out; several processes would write the same files
    try:
        compare(arguments)
    except (ValueError, EndpointError) as error:
        raise SystemExit(f"eval_dungeons.py: {error}") from error


def compare(arguments: argparse.Namespace) -> None:
    rooms = read_rooms(arguments.data, limit=arguments.limit)
    training = CopyIndex([room.description for room in read_rooms(arguments.train_data)])
    if arguments.mauve_model:
        require_mauve()  # now, not after an hour of writing
    prompts = [room.prompt for room in rooms]
    sampling = {key: getattr(arguments, key) for key in ("max_new_tokens", "temperature", "top_p", "seed")}

    writers = {PERSON: Written([room.description for room in rooms])}
    for name in arguments.models:
        print(f"{name}: predicting and writing {len(rooms)} descriptions", flush=True)
        writers[name] = write_locally(name, rooms, sampling, arguments)
    for name in arguments.contestants:
        print(f"{name}: writing {len(rooms)} descriptions at {arguments.contestant_url}", flush=True)
        endpoint = Endpoint(arguments.contestant_url, name, chat=arguments.contestant_api == "chat")
        theirs = {"max_tokens" if key == "max_new_tokens" else key: value for key, value in sampling.items()}
        writers[name] = write_remotely(endpoint, prompts, theirs, arguments.output / "texts.jsonl")
    texts = {name: written.texts for name, written in writers.items()}
    results = {
        name: written.numbers | describe_texts(written.texts, rooms, training)
        for name, written in writers.items()
    }
    if arguments.mauve_model:
        options = {"trust_remote_code": arguments.trust_remote_code}
        scores = mauve_scores(texts, PERSON, arguments.mauve_model, start_accelerator(), **options)
        for name, score in scores.items():
            results[name]["mauve"] = score

    report: dict[str, Any] = {"data": str(arguments.data), "rows": len(rooms), "sampling": sampling}
    report["mauve_model"] = arguments.mauve_model
    ratings: dict[str, Rating] = {}
    if arguments.judge_url:
        judge = Endpoint(arguments.judge_url, arguments.judge_model, chat=arguments.judge_api == "chat")
        ratings, judged = judge_texts(judge, prompts, texts)
        report |= judged
    for name, rating in ratings.items():
        results[name] |= {"rating": rating.value, "rating_95": [rating.low, rating.high]}

    print(table(results))
    arguments.output.mkdir(parents=True, exist_ok=True)
    report |= {"results": results, "prompts": prompts, "texts": texts}
    (arguments.output / "results.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    chart(results, arguments.output / "results.png")
    page(prompts, texts, arguments.output / "blind.html", seed=arguments.seed)
    print(f"written: results.json, results.png and blind.html (to read blind) in {arguments.output}")
    if arguments.judge_url and not ratings:
        raise ValueError("the judge gave no verdict, for the reasons above; all else is written")


def start_accelerator() -> Accelerator:
    return Accelerator(cpu=start_processes().device.type == "cpu")


def write_locally(
    name: str, rooms: list[Room], sampling: dict[str, Any], arguments: argparse.Namespace
) -> Written:
    """A local model's texts, and its bits per byte on the held-out ones; kept for the next time."""
    accelerator = start_accelerator()
    best = choose_precision(accelerator.device, "auto").value
    dtype = best if arguments.dtype == "auto" else arguments.dtype
    options = {"device": accelerator.device, "trust_remote_code": arguments.trust_remote_code}
    model, tokenizer = load_causal_model(name, dtype=dtype, **options)
    asked = {"rooms": [[room.prompt, room.description] for room in rooms], **sampling}
    asked |= identify(model, tokenizer)
    written = kept(arguments.output / "texts.jsonl", asked)
    if written is None:
        numbers = {"bits_per_byte": bits_per_byte(model, tokenizer, rooms, accelerator), "dtype": dtype}
        texts = generate_samples(model, tokenizer, [room.prompt for room in rooms], **sampling)
        written = Written([*texts], numbers)
        keep(arguments.output / "texts.jsonl", asked, written)
    return written


if __name__ == "__main__":
    main()
