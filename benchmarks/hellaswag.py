"""HellaSwag speed beside the two references, on one machine in one run: questions per second.

    python -m benchmarks.hellaswag --data hellaswag_val.jsonl --limit 60 --rounds 2

A GPT-2 of 124M shape with random weights, unless --model names another; what the weights are does not
change the arithmetic. lm-evaluation-harness is the installed one. build-nanogpt's way, four padded rows of
one question in a forward with all logits, is written out here after its hellaswag.py. The contestants take
turns, so that a machine's other work falls on all of them; the best round of each counts.
"""

import argparse
import platform
import sys
import time

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.hellaswag.utils import preprocess
from transformers import GPT2Config, GPT2LMHeadModel

from data.hellaswag import load_questions
from data.tokenizer import gpt2_tokenizer
from evaluation.hellaswag import score_questions


def harness(model, tokenizer, questions, device):
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
    requests = []
    for q in questions:
        context = preprocess(f"{q.activity_label}: {q.ctx_a} {q.ctx_b.capitalize()}")
        requests += [
            Instance("loglikelihood", {}, (context, " " + preprocess(e)), n) for n, e in enumerate(q.endings)
        ]
    sums = torch.tensor([total for total, _ in wrapped.loglikelihood(requests, disable_tqdm=True)]).view(
        -1, 4
    )
    return sums.argmax(1).tolist()


@torch.no_grad()
def build_nanogpt(model, tokenizer, questions, device):
    chosen = []
    for question in questions:
        context = tokenizer(question.ctx)["input_ids"]
        endings = [tokenizer(" " + ending)["input_ids"] for ending in question.endings]
        width = len(context) + max(map(len, endings))
        tokens, mask = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width)
        for row, ending in enumerate(endings):
            tokens[row, : len(context) + len(ending)] = torch.tensor(context + ending)
            mask[row, len(context) : len(context) + len(ending)] = 1
        tokens, mask = tokens.to(device), mask.to(device)
        logits = model(tokens).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        chosen.append((losses.view(4, -1) * mask[:, 1:]).sum(1).argmin().item())
    return chosen


def ours(style):
    def score(model, tokenizer, questions, device):
        accelerator = Accelerator(cpu=device.type == "cpu")
        batches = score_questions(model, tokenizer, questions, accelerator, styles=style)
        scores = sorted((s for batch in batches for s in batch), key=lambda s: s.index)
        return [s.predictions()[f"{style[-1]}_acc"] for s in scores]

    return score


CONTESTANTS = {
    "lm-evaluation-harness": harness,
    "build-nanogpt": build_nanogpt,
    "ours, harness style": ours(["harness"]),
    "ours, completion style": ours(["completion"]),
    "ours, both styles": ours(["completion", "harness"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="official .jsonl, or one of the same fields")
    parser.add_argument("--model", help="folder of a stock GPT-2 (default: 124M, random weights)")
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], help="of ours; theirs is float32"
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    model = (
        GPT2LMHeadModel.from_pretrained(arguments.model)
        if arguments.model
        else GPT2LMHeadModel(GPT2Config(initializer_range=0.03))
    )
    # Through bfloat16 once, so that every contestant has the same weights whatever its dtype.
    model = model.eval().to(device, torch.bfloat16).to(torch.float32)
    tokenizer = gpt2_tokenizer()
    questions = load_questions(arguments.data, limit=arguments.limit)
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {device}, ", end=""
    )
    print(f"torch {torch.__version__}, {len(questions)} questions, best of {arguments.rounds} rounds")

    runs = [(name, dtype) for dtype in arguments.dtypes for name in CONTESTANTS]
    runs = [(name, dtype) for name, dtype in runs if dtype == "float32" or name.startswith("ours")]
    seconds, chosen = dict.fromkeys(runs, float("inf")), {}
    for _ in range(arguments.rounds):
        for name, dtype in runs:
            model.to(getattr(torch, dtype))
            CONTESTANTS[name](model, tokenizer, questions[:2], device)  # warm
            start = time.perf_counter()
            chosen[name, dtype] = CONTESTANTS[name](model, tokenizer, questions, device)
            seconds[name, dtype] = min(seconds[name, dtype], time.perf_counter() - start)
            print(f"{name}, {dtype}: {seconds[name, dtype]:.1f} s", file=sys.stderr, flush=True)
            model.to(torch.float32)

    print(f"\n| {'':<24} | {'dtype':<9} | questions/s | harness = 1 | build-nanogpt = 1 | same choices |")
    print("|---|---|---|---|---|---|")
    theirs = [seconds[name, "float32"] for name in ("lm-evaluation-harness", "build-nanogpt")]
    for name, dtype in runs:
        reference = "build-nanogpt" if "completion style" in name else "lm-evaluation-harness"
        same = sum(a == b for a, b in zip(chosen[name, dtype], chosen[reference, "float32"], strict=True))
        shown = "" if name in ("lm-evaluation-harness", "build-nanogpt") else f"{same}/{len(questions)}"
        ratios = [f"{reference / seconds[name, dtype]:.2f}" for reference in theirs]
        rate = len(questions) / seconds[name, dtype]
        print(f"| {name:<24} | {dtype:<9} | {rate:.2f} | {ratios[0]} | {ratios[1]} | {shown} |")


if __name__ == "__main__":
    main()
