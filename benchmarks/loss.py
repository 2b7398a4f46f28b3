"""Time and peak memory of the loss without logits, beside the plain one: `python -m benchmarks.loss`.

Forward and backward of head and cross-entropy together. Both run in one process, turn by turn, for time, and
each in a process of its own for memory: the growth of the resident set (CPU) or of allocated memory (CUDA)
over inputs, weight and their gradients, which both need.
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from benchmarks.harness import Result, Table, benchmark_parser, peak_bytes, reported
from modeling_gpt_scratch import linear_cross_entropy


def plain(hidden_states, weight, targets):
    """What a stock causal language model does: all logits, upcast to float32."""
    return F.cross_entropy(F.linear(hidden_states, weight).float(), targets)


# The allocator's luck moves single peaks by some 50 MiB.
MEMORY_RUNS = 5

LOSSES = {"plain": plain, "ours": linear_cross_entropy}


def inputs(arguments):
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(arguments.tokens, arguments.width, generator=generator)
    weight = torch.randn(arguments.vocabulary, arguments.width, generator=generator) * 0.02
    targets = torch.randint(0, arguments.vocabulary, (arguments.tokens,), generator=generator)
    leaves = [tensor.to(arguments.device).requires_grad_() for tensor in (hidden_states, weight)]
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    return *leaves, targets.to(arguments.device)


def step(loss, tensors, precision, device):
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
        value = loss(*tensors)
    value.backward()
    if device != "cpu":
        torch.accelerator.synchronize()
    return value.item()


def measure_memory(name, precision, arguments):
    """MiB over inputs and gradients, median of processes of their own: a peak cannot be reset."""
    command = [sys.executable, "-m", "benchmarks.loss", "--only_memory_of", name, "--precision", precision]
    for field in ("tokens", "vocabulary", "width", "device", "threads"):
        command += [f"--{field}", str(getattr(arguments, field))]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(MEMORY_RUNS)]
    return statistics.median(float(run.stdout.split()[-1]) for run in runs)


def main():
    parser = benchmark_parser(__doc__)
    parser.add_argument(
        "--tokens", type=int, default=2048, help="rows of hidden states (default: %(default)s)"
    )
    parser.add_argument("--vocabulary", type=int, default=50_304, help="words (default: %(default)s)")
    parser.add_argument("--width", type=int, default=384, help="model width (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=7, help="interleaved repetitions (default: %(default)s)"
    )
    parser.add_argument("--precision", nargs="*", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--only_memory_of", choices=LOSSES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.tokens, arguments.vocabulary, arguments.rounds, arguments.precision = 64, 512, 2, ["bf16"]
    tensors = inputs(arguments)

    if arguments.only_memory_of:
        before = peak_bytes(arguments.device)
        step(LOSSES[arguments.only_memory_of], tensors, arguments.precision[0], arguments.device)
        print((peak_bytes(arguments.device) - before) / 2**20)
        return

    result = Result(
        "loss",
        "The loss beside the plain one",
        "Forward and backward of head and cross-entropy, in turns. Extra MiB is the peak over inputs, weight "
        f"and their gradients, median of {MEMORY_RUNS} processes.",
    )
    with reported(result, arguments.json):
        result.figures = figures_of(tensors, arguments)
        rows = [
            [
                row["precision"],
                row["loss"],
                f"{row['median_ms']:,.0f} ({row['min_ms']:,.0f}–{row['max_ms']:,.0f})",
                f"{row['extra_mib']:,.0f}",
                f"{row['time_ratio']:.2f}",
                f"{row['memory_ratio']:.2f}",
            ]
            for row in result.figures
        ]
        title = (
            f"{arguments.tokens:,} tokens x {arguments.vocabulary:,} words, width {arguments.width}, "
            f"{arguments.device}, {arguments.threads} threads"
        )
        columns = ["precision", "loss", "ms (smallest–largest)", "extra MiB", "time", "memory"]
        result.tables.append(Table(title, columns, rows))


def figures_of(tensors, arguments):
    rows = []
    for precision in arguments.precision:
        seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
        for round_number in range(arguments.rounds + 1):
            for name, loss in LOSSES.items():
                start = time.perf_counter()
                step(loss, tensors, precision, arguments.device)
                if round_number > 0:  # the first warms up
                    seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        memory = {name: measure_memory(name, precision, arguments) for name in LOSSES}
        rows += [
            {
                "precision": precision,
                "loss": name,
                "median_ms": 1e3 * medians[name],
                "min_ms": 1e3 * min(seconds[name]),
                "max_ms": 1e3 * max(seconds[name]),
                "extra_mib": memory[name],
                "time_ratio": medians[name] / medians["plain"],
                "memory_ratio": memory[name] / memory["plain"] if memory["plain"] else float("nan"),
            }
            for name in LOSSES
        ]
    return rows


if __name__ == "__main__":
    main()
