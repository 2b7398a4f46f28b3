"""HellaSwag accuracy of a causal language model, in both published ways, with intervals. Resumable.

accelerate launch eval_hellaswag.py --model artifacts/runs/demo/export --output results.json
"""

import argparse
import dataclasses
import json
from pathlib import Path

from accelerate import Accelerator

import modeling_gpt_scratch  # noqa: F401 (lets the Auto classes know our model)
from data.hellaswag import HUB_ID, Question, load_questions, origin
from evaluation.hellaswag import QuestionScores, compare, summarize
from evaluation.loading import load_causal_model
from evaluation.records import default_output, model_index, read_scores, score_and_keep, summary
from training.device import choose_precision, start_processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of any causal language model")
    parser.add_argument("--questions", default=HUB_ID, help="Hub id, or official .jsonl (%(default)s)")
    parser.add_argument("--split", default="validation", help="split of a Hub dataset (%(default)s)")
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--output", type=Path, help="a .json (artifacts/hellaswag/, named after the model)")
    parser.add_argument("--baseline", help="a second model, or the .jsonl that scoring it left")
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, …; auto: what the device is fast at"
    )
    parser.add_argument("--batch_tokens", type=int, help="tokens of one forward, padding included")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    arguments = parser.parse_args()
    arguments.output = arguments.output or default_output(arguments.model)
    if arguments.output.suffix == ".jsonl" or arguments.output.is_dir():
        parser.error(f"--output {arguments.output}: name a .json; the scores go beside it in a .jsonl")
    accelerator = Accelerator(cpu=start_processes().device.type == "cpu")
    try:
        evaluate(arguments, accelerator)
    except ValueError as error:
        raise SystemExit(f"eval_hellaswag.py: {error}") from error
    accelerator.end_training()


def evaluate(arguments: argparse.Namespace, accelerator: Accelerator) -> None:
    questions = load_questions(arguments.questions, split=arguments.split, limit=arguments.limit)
    scored, scores = score(arguments.model, arguments.output, questions, arguments, accelerator)
    baseline = None
    if arguments.baseline and Path(arguments.baseline).is_file():
        other, baseline = read_scores(Path(arguments.baseline))
    elif arguments.baseline:
        name = f"{arguments.output.stem}-baseline-{default_output(arguments.baseline).name}"
        beside = arguments.output.with_name(name)
        other, baseline = score(arguments.baseline, beside, questions, arguments, accelerator)
    if not accelerator.is_main_process:
        return

    result = summarize(scores)
    report = {"model": arguments.model, "dataset": origin(arguments.questions, arguments.split), **scored}
    report |= dataclasses.asdict(result)
    print(summary(arguments.model, scored["dtype"], result))
    if baseline is not None:
        compared = compare(scores, baseline)
        report["baseline"] = {"model": arguments.baseline, **other} | {
            metric: dataclasses.asdict(paired) for metric, paired in compared.items()
        }
        note = "" if other["dtype"] == scored["dtype"] else f" in another dtype, {other['dtype']}"
        print(f"against {arguments.baseline}{note}:")
        for metric, paired in compared.items():
            interval = f"95% [{paired.low:+.2%}, {paired.high:+.2%}]"
            print(f"  {metric:<20}{paired.difference:+7.2%}  {interval}  McNemar p = {paired.p_value:.2g}")
    report["model-index"] = model_index(arguments.model, result, report["dataset"])
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"written: {arguments.output}, and each question in {arguments.output.with_suffix('.jsonl')}")


def score(
    name: str,
    output: Path,
    questions: list[Question],
    arguments: argparse.Namespace,
    accelerator: Accelerator,
) -> tuple[dict[str, str], list[QuestionScores]]:
    """What was scored and its scores; what the .jsonl beside `output` holds already is not scored again."""
    dtype = arguments.dtype
    if dtype == "auto":
        dtype = choose_precision(accelerator.device, "auto").value
    trust = arguments.trust_remote_code
    model, tokenizer = load_causal_model(
        name, dtype=dtype, device=accelerator.device, trust_remote_code=trust
    )
    path, tokens = output.with_suffix(".jsonl"), arguments.batch_tokens
    return score_and_keep(path, model, tokenizer, questions, accelerator, batch_tokens=tokens)


if __name__ == "__main__":
    main()
