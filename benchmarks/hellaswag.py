"""HellaSwag beside the two references, on one machine in one run: speed, log-probabilities, choices.

    python -m benchmarks.hellaswag --data hellaswag_val.jsonl --limit 60 --rounds 3

A GPT-2 of 124M shape with random weights, unless --model names another: the weights do not change the
arithmetic, and are drawn wide enough for endings to differ. lm-evaluation-harness is the installed one.
build-nanogpt's way, four padded rows of one question in a forward with all logits, is written out here after
its hellaswag.py. The contestants take turns, so that a machine's other work falls on all of them. Wall time
and the process's CPU time are medians over the rounds; on a busy machine read the CPU time, with
OMP_NUM_THREADS=1. Ratios are medians of the rounds' ratios.

Each reference scores one style. Ours is compared in each style alone, and both styles in one pass with the
two references one after the other. Choices are by the sum and by the norm of that style; a difference counts
as a tie where the reference itself gives both endings the same number.
"""

import importlib.util
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from benchmarks.harness import Result, benchmark_parser, hardware, reported, table_from_markdown
from data.hellaswag import Question, load_questions
from data.tokenizer import gpt2_tokenizer
from evaluation.hellaswag import score_questions

HARNESS, NANOGPT = "lm-evaluation-harness", "build-nanogpt"
REFERENCE_OF = {"harness": HARNESS, "completion": NANOGPT}


@dataclass(frozen=True)
class Endings:
    """Of one question in one style: four summed log-probabilities, and those divided by the length."""

    sums: list[float]
    norms: list[float]


def harness(model, tokenizer, questions: list[Question], device) -> dict[str, list[Endings]]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag.utils import preprocess

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
    requests, endings = [], []
    for number, q in enumerate(questions):
        context = preprocess(f"{q.activity_label}: {q.ctx_a} {q.ctx_b.capitalize()}")
        endings.append([preprocess(ending) for ending in q.endings])
        requests += [Instance("loglikelihood", {}, (context, " " + e), number) for e in endings[-1]]
    totals = [total for total, _ in wrapped.loglikelihood(requests, disable_tqdm=True)]
    scores = []
    for number, texts in enumerate(endings):
        four = totals[4 * number : 4 * number + 4]
        scores.append(Endings(four, [s / max(1, len(t)) for s, t in zip(four, texts, strict=True)]))
    return {"harness": scores}


@torch.no_grad()
def build_nanogpt(model, tokenizer, questions: list[Question], device) -> dict[str, list[Endings]]:
    scores = []
    for question in questions:
        context = tokenizer(question.ctx)["input_ids"]
        endings = [tokenizer(" " + ending)["input_ids"] for ending in question.endings]
        width = len(context) + max(map(len, endings))
        tokens, mask = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width)
        for row, ending in enumerate(endings):
            tokens[row, : len(context) + len(ending)] = torch.tensor(context + ending)
            mask[row, len(context) : len(context) + len(ending)] = 1
        tokens, mask = tokens.to(device), mask.to(device)[:, 1:]
        logits = model(tokens).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        sums = (losses.view(4, -1) * mask).sum(1)
        scores.append(Endings((-sums).tolist(), (-sums / mask.sum(1)).tolist()))
    return {"completion": scores}


def ours(*styles: str):
    def score(model, tokenizer, questions: list[Question], device) -> dict[str, list[Endings]]:
        accelerator = Accelerator(cpu=device.type == "cpu")
        batches = score_questions(model, tokenizer, questions, accelerator, styles=styles)
        scores = sorted((s for batch in batches for s in batch), key=lambda s: s.index)
        return {
            style: [
                Endings(
                    s.log_probabilities[style],
                    [
                        a / max(1, b)
                        for a, b in zip(s.log_probabilities[style], s.lengths[style], strict=True)
                    ],
                )
                for s in scores
            ]
            for style in styles
        }

    return score


CONTESTANTS = {
    HARNESS: harness,
    NANOGPT: build_nanogpt,
    "ours, harness style": ours("harness"),
    "ours, completion style": ours("completion"),
    "ours, both styles": ours("completion", "harness"),
}


def contestants_here() -> list[str]:
    """Without lm-evaluation-harness installed, those that need it for nothing."""
    if importlib.util.find_spec("lm_eval"):
        return list(CONTESTANTS)
    return [NANOGPT, "ours, completion style"]


def differences(found: list[Endings], reference: list[Endings]) -> dict[str, float]:
    """Choices that differ, by sum and by norm, those of them that are ties there, and the largest gap in
    nats."""
    differing = ties = 0
    for mine, theirs in zip(found, reference, strict=True):
        for a, b in ((mine.sums, theirs.sums), (mine.norms, theirs.norms)):
            chosen = max(range(4), key=a.__getitem__)
            if chosen != max(range(4), key=b.__getitem__):
                differing += 1
                ties += b[chosen] == max(b)
    pairs = [
        (a, b) for m, t in zip(found, reference, strict=True) for a, b in zip(m.sums, t.sums, strict=True)
    ]
    return {
        "choices": 2 * len(found),
        "differing": differing,
        "ties": ties,
        "max_nats": max(abs(a - b) for a, b in pairs),
        "max_relative": max(abs(a - b) / abs(b) for a, b in pairs),
    }


def main() -> None:
    parser = benchmark_parser(str(__doc__))
    parser.add_argument("--data", required=True, help="official .jsonl, or one of the same fields")
    parser.add_argument("--model", help="folder of a model with GPT-2's vocabulary (default: random 124M)")
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--every", type=int, default=1, help="take each so manieth question of the file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], help="of ours; theirs is float32"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.limit, arguments.rounds, arguments.dtypes = 2, 1, ["float32"]
    result = Result(
        "hellaswag",
        "HellaSwag",
        "GPT-2 of 124M shape with random weights, unless --model names one; the references take float32.",
    )
    if HARNESS not in contestants_here():
        result.not_run.append([HARNESS, "pip install lm-eval"])
    with reported(result, arguments.json):
        report = measured(arguments)
        result.tables.append(table_from_markdown(as_markdown(report)))
        result.figures = report["rows"]


def measured(arguments: Any) -> dict:
    """All contestants in turns."""
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    small: dict[str, Any] = {"n_layer": 1, "n_embd": 48, "n_head": 2} if arguments.quick else {}
    model = (
        AutoModelForCausalLM.from_pretrained(arguments.model)
        if arguments.model
        else GPT2LMHeadModel(GPT2Config(initializer_range=0.05, **small))
    )
    # Through bfloat16 once, so that every contestant has the same weights whatever its dtype.
    model = model.eval().to(device, torch.bfloat16).to(torch.float32)
    tokenizer = gpt2_tokenizer()
    questions = load_questions(arguments.data)[:: arguments.every][: arguments.limit]

    contestants = contestants_here()
    runs = [(name, dtype) for dtype in arguments.dtypes for name in contestants]
    runs = [(name, dtype) for name, dtype in runs if dtype == "float32" or name.startswith("ours")]
    references = [name for name in contestants if not name.startswith("ours")]
    runs = [(name, "float32") for name in references if (name, "float32") not in runs] + runs
    wall: dict[tuple[str, str], list[float]] = {run: [] for run in runs}
    cpu: dict[tuple[str, str], list[float]] = {run: [] for run in runs}
    scores = {}
    for number in range(arguments.rounds):
        for name, dtype in runs:
            model.to(getattr(torch, dtype))
            CONTESTANTS[name](model, tokenizer, questions[:2], device)  # warm
            start = time.perf_counter(), time.process_time()
            scores[name, dtype] = CONTESTANTS[name](model, tokenizer, questions, device)
            wall[name, dtype].append(time.perf_counter() - start[0])
            cpu[name, dtype].append(time.process_time() - start[1])
            print(
                f"round {number + 1}, {name}, {dtype}: {wall[name, dtype][-1]:.1f} s, "
                f"{cpu[name, dtype][-1]:.1f} CPU s",
                flush=True,
            )
            model.to(torch.float32)

    return {
        "machine": hardware(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "questions": len(questions),
        "rounds": arguments.rounds,
        "rows": [
            describe(name, dtype, len(questions), {"wall": wall, "cpu": cpu}, scores) for name, dtype in runs
        ],
    }


def describe(name: str, dtype: str, questions: int, clocks: dict, scores: dict) -> dict:
    """One contestant: its rates and times, how often it does the references' work in theirs, its choices."""
    styles = list(scores[name, dtype])
    row: dict = {"name": name, "dtype": dtype}
    for clock, seconds in clocks.items():
        mine = seconds[name, dtype]
        row[f"{clock}_seconds"] = statistics.median(mine)
        row[f"questions_per_{clock}_second"] = questions / statistics.median(mine)
        for reference in (HARNESS, NANOGPT):
            if (reference, "float32") not in seconds:
                continue
            times = seconds[reference, "float32"]
            row[f"{clock}_ratio_{reference}"] = statistics.median(
                a / b for a, b in zip(times, mine, strict=True)
            )
        same_work = zip(*(seconds[REFERENCE_OF[style], "float32"] for style in styles), strict=True)
        row[f"{clock}_ratio_same_work"] = statistics.median(
            sum(times) / b for times, b in zip(same_work, mine, strict=True)
        )
    for style in styles:
        row[style] = differences(scores[name, dtype][style], scores[REFERENCE_OF[style], "float32"][style])
    return row


def as_markdown(report: dict) -> str:
    lines = [
        f"{report['questions']} questions, medians of {report['rounds']} rounds, "
        f"{report['threads']} threads, {report['device']}, torch {report['torch']}",
        "",
        "| | dtype | questions/s | CPU s | harness = 1 | build-nanogpt = 1 | same styles = 1 | in CPU time | "
        "choices that differ (ties) | largest gap, nats |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        found = [row[style] for style in ("harness", "completion") if style in row]
        differing = sum(d["differing"] for d in found)
        ties, choices = sum(d["ties"] for d in found), sum(d["choices"] for d in found)
        cells = [
            row["name"],
            row["dtype"],
            f"{row['questions_per_wall_second']:.2f}",
            f"{row['cpu_seconds']:.1f}",
            *(
                f"{row[key]:.2f}" if (key := f"wall_ratio_{kind}") in row else ""
                for kind in (HARNESS, NANOGPT, "same_work")
            ),
            f"{row['cpu_ratio_same_work']:.2f}",
            f"{differing} of {choices} ({ties})" if row["name"].startswith("ours") else "",
            f"{max(d['max_nats'] for d in found):.1e}" if row["name"].startswith("ours") else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
