"""What the training loop costs beside a bare loop on the same model: forward, backward, clip, step.

    python -m benchmarks.loop_overhead

One process trains with `train_accelerate`, and between its steps takes as many of a bare loop, turn about in
short blocks, so that whatever else happens on the machine disturbs both alike. Every other block of the real
loop holds a checkpoint. Then the run is started again, and timed until its first step. Prints a Markdown
table of medians with their quartiles. Further flags go to the training, such as `--cpu_threads 1`.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from training_toys import write_toy_shards  # noqa: E402

import train_accelerate  # noqa: E402
from benchmarks.harness import Result, benchmark_parser, reported, table_from_markdown  # noqa: E402
from data.loader import build_loader, collate_blocks  # noqa: E402
from training.checkpoint import complete_checkpoints  # noqa: E402
from training.device import choose_precision  # noqa: E402
from training.optimizer import build_optimizer  # noqa: E402
from training.recipe import TrainSettings  # noqa: E402
from training.settings import parse_settings  # noqa: E402

# The demo's model, and one whose step is long enough that the arithmetic, not the overhead, fills it.
SHAPES = {
    "the demo's, 4 blocks of 256": [],
    "6 blocks of 384": ["--n_layer", "6", "--n_head", "6", "--n_embd", "384"],
}
TOY = {"toy": ["--n_layer", "1", "--n_head", "2", "--n_embd", "32", "--block_size", "32"]}
SECONDS_BETWEEN_CHECKPOINTS = 600


@dataclass(frozen=True)
class Seconds:
    """What a block of steps took: on the clock, and of the processors."""

    wall: float
    cpu: float


class Stopwatch:
    """Time since it was made, the device's work included."""

    def __init__(self) -> None:
        self._began = self._now()

    @staticmethod
    def _now() -> Seconds:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return Seconds(time.perf_counter(), time.process_time())

    def seconds(self) -> Seconds:
        now = self._now()
        return Seconds(now.wall - self._began.wall, now.cpu - self._began.cpu)


def bare_steps(settings: TrainSettings) -> Iterator[None]:
    """The loop that everybody writes first, a step each time it is asked."""
    with redirect_stdout(StringIO()):
        tokenizer, train_set, _ = train_accelerate.prepare_data(settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(device, settings.mixed_precision).value
    model = train_accelerate.build_model(settings, tokenizer).train()
    model.to(device)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, settings)
    rows = settings.batch_tokens // settings.block_size
    for batch in build_loader(train_set, collate_blocks, micro_batch_size=rows, seed=settings.seed):
        input_ids = batch["input_ids"].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield


def blocks_in_turn(flags: list[str], rounds: int, steps: int) -> dict[str, list[Seconds]]:
    """Seconds of each block of `steps` steps: "bare", "loop", and "saving" for a loop's with a checkpoint."""
    settings = parse_settings(TrainSettings, [*flags, "--compile", "none"])
    bare = bare_steps(settings)
    taken: dict[str, list[Seconds]] = {"bare": [], "loop": [], "saving": []}
    take, step = train_accelerate.islice, -1  # the step that begins, counted from 0
    since = Stopwatch()
    # Blocks begin just before a step that logs and may save, so that the checkpoint's write in the background
    # slows down steps of the same block; what is left of it at the end is waited for.
    first_step = 2 * steps - 1

    def take_turns(batches: Iterator, count: int) -> Any:
        """Where the real loop takes a step's micro-batches, it begins the step."""
        nonlocal since, step
        step += 1
        if step >= first_step and (step - first_step) % steps == 0:
            turn = (step - first_step) // steps
            if turn > 0:
                kind = "saving" if turn % 2 else "loop"
                saved = step // (2 * steps) * 2 * steps
                while kind == "saving" and saved not in complete_checkpoints(Path(settings.run_dir)):
                    time.sleep(0.001)
                taken[kind].append(since.seconds())
            since = Stopwatch()
            for _ in range(steps):
                next(bare)
            taken["bare"].append(since.seconds())
            since = Stopwatch()
        return take(batches, count)

    last_step = first_step + 2 * rounds * steps + 1
    regular = ["--max_steps", str(last_step), "--save_every_steps", str(2 * steps), "--keep_last", "1"]
    train_accelerate.islice = take_turns  # type: ignore[assignment, misc]
    next(bare)  # both loops have warmed up before the first block
    try:
        with redirect_stdout(StringIO()):
            train_accelerate.main([*flags, *regular, "--log_every_steps", str(steps), "--compile", "none"])
    finally:
        train_accelerate.islice = take  # type: ignore[misc]
    return taken


def seconds_to_resume(flags: list[str], run_dir: Path) -> float:
    """From starting the command to the end of the next step, imports included."""
    metrics = run_dir / "metrics.jsonl"
    last = max(complete_checkpoints(run_dir))
    more = ["--max_steps", str(last + 1000), "--allow_change", "--log_every_steps", "1"]
    before = metrics.stat().st_size
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_accelerate.py"), *flags, *more], stdout=subprocess.DEVNULL
    )
    while metrics.stat().st_size <= before and process.poll() is None:
        time.sleep(0.01)
    seconds = time.perf_counter() - began
    assert process.poll() is None, "the run did not go on"
    process.terminate()
    process.wait()
    return seconds


def with_quartiles(values: list[float], form: str) -> str:
    """Median and, in brackets, the quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def measure(name: str, flags: list[str], rounds: int, steps: int) -> list[str]:
    """The table's rows of one shape."""
    taken = blocks_in_turn(flags, rounds, steps)
    run_dir = Path(flags[flags.index("--run_dir") + 1])
    resume = seconds_to_resume(flags, run_dir)
    rows = []
    for clock in ("wall", "cpu"):
        bare, loop = ([getattr(block, clock) for block in taken[kind]] for kind in ("bare", "loop"))
        # The order was bare, saving, bare, loop, bare, saving, …: each block of the loop has two beside it.
        beside = [(one + other) / 2 for one, other in zip(bare[1::2], bare[2::2], strict=False)]
        more = [with_us / without - 1 for with_us, without in zip(loop, beside, strict=False)]
        rows.append(
            f"| {name} | {clock} | {statistics.median(bare) / steps * 1e3:.1f} "
            f"| {statistics.median(loop) / steps * 1e3:.1f} | {with_quartiles(more, '+.2%')} |"
        )
    stalls = [
        with_one.wall - without.wall
        for with_one, without in zip(taken["saving"], taken["loop"], strict=False)
    ]
    part = [max(stall, 0.0) / SECONDS_BETWEEN_CHECKPOINTS for stall in stalls]
    print(f"{name}: a checkpoint costs {with_quartiles(stalls, '.3f')} s", file=sys.stderr)
    rows.append(f"| {name} | a checkpoint every ten minutes | | | {with_quartiles(part, '.3%')} |")
    rows.append(f"| {name} | started again, to the end of the next step | | {resume * 1e3:,.0f} | |")
    return rows


def main() -> None:
    parser = benchmark_parser(str(__doc__))
    parser.add_argument("--rounds", type=int, default=12, help="blocks of the loop without a checkpoint")
    parser.add_argument("--steps", type=int, default=10, help="steps of a block")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes")
    arguments, more = parser.parse_known_args()
    more += ["--cpu_threads", str(arguments.threads)]
    shapes = TOY if arguments.quick else SHAPES
    if arguments.quick:
        arguments.rounds, arguments.steps = 2, 2
    result = Result(
        "loop_overhead",
        "The loop around a step",
        "`train_accelerate` and a bare forward, backward, clip and update take turns in one process. "
        f"Medians, in brackets the quartiles, of {arguments.rounds} blocks of {arguments.steps} steps.",
    )
    with reported(result, arguments.json), tempfile.TemporaryDirectory() as temporary:
        rows = []
        shards = write_toy_shards(Path(temporary), documents=8000)
        for number, (name, shape) in enumerate(list(shapes.items())[: arguments.shapes]):
            flags = ["--config", str(ROOT / "recipes" / "demo.yaml"), "--shards", str(shards), *shape, *more]
            flags += ["--run_dir", str(Path(temporary, f"run-{number}")), "--save_every_minutes", "0"]
            flags += ["--eval_tokens", "4096", "--sample_tokens", "1", "--warmup_steps", "0"]
            flags += ["--eval_every_steps", "1000000", "--sample_every_steps", "1000000"]
            rows += measure(name, flags, arguments.rounds, arguments.steps)
        header = [
            "| model | clock | bare step, ms | step of train_accelerate, ms | more |",
            "|---|---|---|---|---|",
        ]
        result.tables.append(table_from_markdown("\n".join(header + rows)))


if __name__ == "__main__":
    main()
