"""Quality for time: validation bits per byte after the same minutes on the same text, machine and model size.

    python -m benchmarks.quality_for_time --peers DIR [--data artifacts/shards/python-docs] [--minutes 4]

Contenders train in processes of their own and take turns of equal length; the clock stands while one waits or
validates. All see the same rows in the same order and are validated by the same code on the same tokens.

ours            the step of train_accelerate.py with the speed recipe of docs/recipes.md at this size
ours, AdamW     the same with AdamW as in recipes/demo.yaml
nanoGPT         its README's settings for small models on a CPU: AdamW 1e-3, betas 0.9 and 0.99, warm-up of
                100 steps, cosine to 1e-4, decay 0.1, 12 rows, float32 (its script has no autocast on CPUs)
HF Trainer      stock GPT-2 under transformers' Trainer with its defaults: AdamW 5e-5, linear to 0, 8 rows

Schedules that end run over the minutes instead of a number of steps; only Trainer has to be told steps, and
gets as many as its own first ones promise.
"""

import argparse
import contextlib
import io
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

import train_accelerate
from benchmarks.contenders import NANOGPT, OURS, Shape, our_training, peer_model, stock_model, why_missing
from benchmarks.harness import ROOT, Result, Table, Worker, benchmark_parser, median, reported, say
from data.loader import build_loader, collate_blocks
from data.shards import TokenBlocks
from data.tokenizer import load_tokenizer, token_byte_lengths
from evaluation.language_modeling import evaluate_loss
from training.schedule import schedule_at

OURS_ADAMW, TRAINER = "ours, AdamW", "HF Trainer"
CONTENDERS = (OURS, OURS_ADAMW, NANOGPT, TRAINER)
SEED = 1337
SPEED = {"optimizer": "muon", "muon_learning_rate": 0.02, "learning_rate": 1e-2, "schedule": "trapezoidal"}
SPEED |= {"cooldown_ratio": 0.6, "final_learning_rate_ratio": 0.02}
ADAMW = {"optimizer": "adamw", "learning_rate": 2e-3, "final_learning_rate_ratio": 0.05}
OUR_ROWS, NANOGPT_ROWS, TRAINER_ROWS = 16, 12, 8
TRAINER_TRIAL_STEPS = 12
# Schedules are asked for a share of this many "steps": the share of the time that has passed.
GRAIN = 100_000


class NanoGPTForEvaluation(nn.Module):
    """nanoGPT's model as `evaluate_loss` calls any other."""

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.config = model, SimpleNamespace(model_type="nanogpt")

    def get_output_embeddings(self) -> nn.Module:
        return self.model.lm_head

    def forward(self, input_ids: torch.Tensor, **ignored: Any) -> Any:
        return SimpleNamespace(logits=self.model(input_ids, input_ids)[0])


class Turns:
    """Counts the seconds of training; after each turn's share of them validates, answers and waits."""

    def __init__(self, arguments: argparse.Namespace, model: nn.Module, accelerator: Accelerator, rows: int):
        self.arguments, self.model, self.accelerator, self.rows = arguments, model, accelerator, rows
        self.total_seconds = 60 * arguments.minutes
        self.steps, self.turns, self.trained_seconds = 0, 0, 0.0
        self._eval_set = TokenBlocks(Path(arguments.data), arguments.block, "validation")
        self._token_bytes = torch.from_numpy(token_byte_lengths(self._eval_set.load_tokenizer()))
        say({"warm": True})
        sys.stdin.readline()
        self._began = time.perf_counter()

    def share(self) -> float:
        """Of the minutes that have passed."""
        return min(1.0, (self.trained_seconds + time.perf_counter() - self._began) / self.total_seconds)

    def step_ends(self) -> bool:
        """Call after every update; whether training is over."""
        self.steps += 1
        if self.share() < (self.turns + 1) / self.arguments.turns:
            return False
        self.trained_seconds += time.perf_counter() - self._began
        self.turns += 1
        loader = build_loader(self._eval_set, collate_blocks, micro_batch_size=8, seed=None)
        batches = max(1, self.arguments.eval_tokens // (8 * self.arguments.block))
        with contextlib.redirect_stdout(io.StringIO()):
            found = evaluate_loss(
                self.model, loader, self.accelerator, token_bytes=self._token_bytes, max_batches=batches
            )
        tokens = self.steps * self.rows * self.arguments.block
        counts = {"seconds": self.trained_seconds, "steps": self.steps, "tokens": tokens}
        say({**counts, "loss": found.loss, "bits_per_byte": found.bits_per_byte})
        is_over = self.turns == self.arguments.turns or not sys.stdin.readline()
        self._began = time.perf_counter()
        return is_over


def rows_of(arguments: argparse.Namespace, rows: int) -> Iterator[torch.Tensor]:
    train_set = TokenBlocks(Path(arguments.data), arguments.block)
    for batch in build_loader(train_set, collate_blocks, micro_batch_size=rows, seed=SEED):
        yield batch["input_ids"]


def shape_of(arguments: argparse.Namespace, rows: int) -> Shape:
    words = len(load_tokenizer(Path(arguments.data) / "tokenizer"))
    multiple = train_accelerate.VOCABULARY_MULTIPLE
    vocabulary = -(-words // multiple) * multiple
    return Shape(
        arguments.layers,
        arguments.heads,
        arguments.width,
        vocabulary,
        arguments.block,
        arguments.rows or rows,
    )


def train_ours(arguments: argparse.Namespace) -> None:
    recipe = SPEED if arguments.contender == OURS else ADAMW
    shape = shape_of(arguments, OUR_ROWS)
    more = {**recipe, "max_steps": GRAIN, "warmup_steps": GRAIN // 20}
    training = our_training(shape, arguments.precision, False, arguments.threads, **more)
    turns = Turns(arguments, training.model, training.accelerator, shape.rows)
    for input_ids in rows_of(arguments, shape.rows):
        part = schedule_at(int(turns.share() * (GRAIN - 1)), training.settings)
        for group in training.optimizer.param_groups:
            group["lr"] = part * group["peak_learning_rate"]
        training.step(input_ids)
        if turns.step_ends():
            return


def train_nanogpt(arguments: argparse.Namespace) -> None:
    highest, lowest, warmup_steps = 1e-3, 1e-4, 100
    shape = shape_of(arguments, NANOGPT_ROWS)
    torch.manual_seed(SEED)
    model = peer_model(NANOGPT, shape, arguments.peers).train()
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = model.configure_optimizers(0.1, highest, (0.9, 0.99), "cpu")
    turns = Turns(arguments, NanoGPTForEvaluation(model), Accelerator(cpu=True), shape.rows)
    for input_ids in rows_of(arguments, shape.rows):
        rate = lowest + 0.5 * (1 + math.cos(math.pi * turns.share())) * (highest - lowest)
        rate *= min(1.0, (turns.steps + 1) / (warmup_steps + 1))
        for group in optimizer.param_groups:
            group["lr"] = rate
        # The row's last position has no target; nanoGPT ignores -1.
        targets = torch.cat([input_ids[:, 1:], input_ids.new_full((len(input_ids), 1), -1)], dim=1)
        model(input_ids, targets)[1].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if turns.step_ends():
            return


def train_with_trainer(arguments: argparse.Namespace) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    shape = shape_of(arguments, TRAINER_ROWS)

    def trainer_for(max_steps: int, callbacks: list[Any]) -> Trainer:
        torch.manual_seed(SEED)
        rows = itertools.islice(rows_of(arguments, 1), max_steps * shape.rows)
        dataset = [{"input_ids": row[0], "labels": row[0]} for row in rows]
        options = TrainingArguments(
            output_dir=arguments.scratch,
            max_steps=max_steps,
            per_device_train_batch_size=shape.rows,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        return Trainer(stock_model(shape), options, train_dataset=dataset, callbacks=callbacks)

    ends: list[float] = []

    class Trial(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            ends.append(time.perf_counter())

    trainer_for(TRAINER_TRIAL_STEPS, [Trial()]).train()
    seconds_per_step = median(after - before for before, after in itertools.pairwise(ends))
    # A tenth more than promised: a rate near zero at the end is better than steps that are missing.
    steps = max(1, round(1.1 * 60 * arguments.minutes / seconds_per_step))

    class InTurns(TrainerCallback):
        turns: Turns

        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.turns = Turns(arguments, more["model"], Accelerator(cpu=True), shape.rows)

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if self.turns.step_ends():
                control.should_training_stop = True

    in_turns = InTurns()
    trainer_for(steps, [in_turns]).train()
    # Steps that were faster than promised end before the minutes do.
    while in_turns.turns.turns < arguments.turns and not in_turns.turns.step_ends():
        in_turns.turns.steps -= 1


TRAIN: dict[str, Callable[[argparse.Namespace], None]] = {
    OURS: train_ours,
    OURS_ADAMW: train_ours,
    NANOGPT: train_nanogpt,
    TRAINER: train_with_trainer,
}


def compare(names: list[str], arguments: argparse.Namespace) -> dict[str, list[dict]]:
    """Of every contender, what it reached at the end of each turn."""
    found: dict[str, list[dict]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        workers = {}
        for name in names:
            flags = ["--contender", name, "--scratch", stack.enter_context(tempfile.TemporaryDirectory())]
            flags += ["--peers", str(arguments.peers)] if arguments.peers else []
            for field in ("data", "minutes", "turns", "block", "layers", "heads", "width", "rows"):
                flags += [f"--{field}", str(getattr(arguments, field))]
            for field in ("eval_tokens", "precision", "threads"):
                flags += [f"--{field}", str(getattr(arguments, field))]
            worker = Worker("benchmarks.quality_for_time", *flags, threads=arguments.threads)
            stack.callback(worker.close)
            assert worker.warm
            workers[name] = worker
        for turn in range(arguments.turns):
            for name in names:
                found[name].append(workers[name].turn())
                print(f"turn {turn + 1}, {name}: {found[name][-1]}", flush=True)
    return found


def table_of(found: dict[str, list[dict]], arguments: argparse.Namespace) -> Table:
    columns = ["minutes", *(f"{name}, bits/byte" for name in found)]
    rows = []
    for turn in range(arguments.turns):
        minutes = arguments.minutes * (turn + 1) / arguments.turns
        rows.append([f"{minutes:.1f}", *(f"{found[name][turn]['bits_per_byte']:.3f}" for name in found)])
    rows.append(["tokens seen", *(f"{found[name][-1]['tokens']:,}" for name in found)])
    return Table("", columns, rows)


def main() -> None:
    parser = benchmark_parser(str(__doc__))
    parser.add_argument("--data", default=str(ROOT / "artifacts" / "shards" / "python-docs"), help="shards")
    parser.add_argument("--minutes", type=float, default=4.0, help="of training, of each contender")
    parser.add_argument("--turns", type=int, default=8, help="validations, evenly spaced")
    parser.add_argument("--block", type=int, default=256, help="tokens of a row")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rows", type=int, default=0, help="of a step for all; 0 leaves each its own number")
    parser.add_argument("--eval_tokens", type=int, default=65_536)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"], help="of ours")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        torch.set_num_threads(arguments.threads)
        return TRAIN[arguments.contender](arguments)
    if arguments.quick:
        arguments.minutes, arguments.turns, arguments.rows, arguments.eval_tokens = 0.02, 2, 2, 512
        arguments.block, arguments.layers, arguments.heads, arguments.width = 32, 1, 2, 32
    result = Result(
        "quality_for_time",
        "Quality for time",
        f"Validation after the same minutes of training: {arguments.layers} layers of {arguments.width}, "
        f"rows of {arguments.block} tokens, {arguments.threads} threads, one seed. Recipes are in "
        "`benchmarks/quality_for_time.py`. Contenders took turns.",
    )
    why = why_missing(NANOGPT, "cpu", arguments.peers)
    if why:
        result.not_run.append([NANOGPT, why])
    if not Path(arguments.data, "manifest.json").exists():
        raise SystemExit(f"no shards in {arguments.data}; `accelerate launch train_accelerate.py` makes them")
    with reported(result, arguments.json):
        names = [name for name in CONTENDERS if not (name == NANOGPT and why)]
        found = compare(names, arguments)
        result.tables.append(table_of(found, arguments))
        result.figures = [{"contender": name, **row} for name in names for row in found[name]]


if __name__ == "__main__":
    main()
