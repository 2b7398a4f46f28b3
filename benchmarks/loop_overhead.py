"""What the training loop costs beside a bare loop on the same model: forward, backward, clip, step.

    python benchmarks/loop_overhead.py --rounds 3 --steps 30

Both train the demo's model (or what the flags say) on the same batches in one process, taking turns, so that
a noisy machine disturbs both alike. Prints a Markdown table: the fastest steps of each, a checkpoint's cost
in training, and the time from starting a stopped run again to its next step.
"""

import argparse
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from io import StringIO
from itertools import islice, pairwise
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from training_toys import write_toy_shards  # noqa: E402

import train_accelerate  # noqa: E402
from data.loader import build_loader, collate_blocks  # noqa: E402
from training.device import choose_precision  # noqa: E402
from training.optimizer import build_optimizer  # noqa: E402
from training.recipe import TrainSettings  # noqa: E402
from training.settings import parse_settings  # noqa: E402

WARM_UP_STEPS = 3


def step_times_of_loop(flags: list[str], steps: int) -> list[float]:
    """Seconds of each step of `train_accelerate`, from one learning rate to the next."""
    starts, rate = [], train_accelerate.learning_rate_at

    def rate_and_time(step, settings):
        starts.append(time.perf_counter())
        return rate(step, settings)

    train_accelerate.learning_rate_at = rate_and_time
    try:
        with redirect_stdout(StringIO()):
            train_accelerate.main([*flags, "--max_steps", str(steps)])
    finally:
        train_accelerate.learning_rate_at = rate
    return [later - earlier for earlier, later in pairwise(starts)][WARM_UP_STEPS:]


def step_times_of_bare_loop(settings: TrainSettings, steps: int) -> list[float]:
    """Seconds of each step of the loop that everybody writes first."""
    tokenizer, train_set, _ = train_accelerate.prepare_data(settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(device, settings.mixed_precision).value
    model = train_accelerate.build_model(settings, tokenizer).train()
    model.to(device)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, settings)
    rows = settings.batch_tokens // settings.block_size
    loader = build_loader(train_set, collate_blocks, micro_batch_size=rows, seed=settings.seed)
    times = []
    for batch in islice(loader, steps):
        began = time.perf_counter()
        input_ids = batch["input_ids"].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return times[WARM_UP_STEPS:]


def seconds_to_resume(flags: list[str], run_dir: Path) -> float:
    """From starting the command to the end of the next step, imports included."""
    before = len((run_dir / "metrics.jsonl").read_text().splitlines())
    began = time.perf_counter()
    command = [sys.executable, str(ROOT / "train_accelerate.py"), *flags, "--max_steps", "1000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len((run_dir / "metrics.jsonl").read_text().splitlines()) <= before and process.poll() is None:
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    process.terminate()
    process.wait()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns that each loop gets")
    parser.add_argument("--steps", type=int, default=30, help="steps of a turn")
    arguments, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards, run_dir = write_toy_shards(folder, documents=8000), folder / "run"
        flags = ["--config", str(ROOT / "recipes" / "demo.yaml"), "--shards", str(shards), *more]
        flags += ["--run_dir", str(run_dir), "--save_every_minutes", "0", "--eval_tokens", "4096"]
        flags += ["--sample_tokens", "1", "--allow_change", "--warmup_steps", "0"]
        flags += ["--eval_every_steps", "1000000", "--sample_every_steps", "1000000"]
        rarely = ["--save_every_steps", "1000000"]
        settings = parse_settings(TrainSettings, [*flags, *rarely])
        loop: list[float] = []
        bare: list[float] = []
        saving: list[float] = []
        for _ in range(arguments.rounds):
            shutil.rmtree(run_dir, ignore_errors=True)
            loop += step_times_of_loop([*flags, *rarely], arguments.steps)
            bare += step_times_of_bare_loop(settings, arguments.steps)
            shutil.rmtree(run_dir, ignore_errors=True)
            saving += step_times_of_loop([*flags, "--save_every_steps", "10"], arguments.steps)
        resume = seconds_to_resume([*flags, "--save_every_steps", "10", "--log_every_steps", "1"], run_dir)
    # Whatever else runs on the machine only ever makes a step slower: the fast ones are the undisturbed ones.
    usual, with_bare = (statistics.quantiles(times, n=10)[0] for times in (loop, bare))
    # Every tenth step of `saving` holds a checkpoint, and the write behind it slows down some of the next.
    per_checkpoint = max(0.0, (statistics.mean(saving) - statistics.mean(loop)) * 10)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| | seconds | |")
    print("|---|---|---|")
    print(f"| a step of the bare loop, fastest tenth of {len(bare)} | {with_bare:.4f} | |")
    more_than_bare = f"{usual / with_bare - 1:+.1%}"
    print(f"| a step of train_accelerate, fastest tenth of {len(loop)} | {usual:.4f} | {more_than_bare} |")
    print(f"| lost per checkpoint | {per_checkpoint:.3f} | {per_checkpoint / 600:.3%} of ten minutes |")
    print(f"| from starting again to the next step | {resume:.1f} | |")


if __name__ == "__main__":
    main()
