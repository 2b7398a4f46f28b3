"""The training step beside its peers: forward, backward, clipping, AdamW; tokens/s, MFU, peak memory.

    python -m benchmarks.training_step --peers DIR

Every contender runs in a process of its own, warmed up; those of one shape and precision take turns. Memory
is the growth of the process from its imports to its peak (on a GPU, the peak of what is allocated).
"""

import argparse
import contextlib
import os
from dataclasses import fields
from typing import Any

import torch

from benchmarks.contenders import (
    BUILD_NANOGPT,
    LIGER,
    NANOGPT,
    OURS,
    RECOMPUTING,
    STOCK,
    Shape,
    our_training,
    peer_step,
    shape_from_words,
    why_missing,
)
from benchmarks.harness import (
    Result,
    Table,
    Worker,
    benchmark_parser,
    describe_limits,
    median,
    peak_bytes,
    physical_limits,
    reported,
    serve_turns,
    timed,
    with_spread,
)

CONTENDERS = (OURS, RECOMPUTING, NANOGPT, BUILD_NANOGPT, STOCK, LIGER)
OF_OURS = (OURS, RECOMPUTING)
# Compilers choose by themselves what to recompute, and torch 2.11's fails in Liger's loss.
EAGER_ONLY = (RECOMPUTING, LIGER)
SHAPES = {
    "cpu": {
        "6 layers of 384, GPT-2's words": Shape(6, 6, 384, 50_304, 256, 8),
        "the demo's": Shape(4, 4, 256, 4096, 256, 16),
    },
    "cuda": {
        "GPT-2 124M": Shape(12, 12, 768, 50_304, 1024, 32),
        "GPT-2 350M": Shape(24, 16, 1024, 50_304, 1024, 16),
    },
}
TOY = {"toy": Shape(1, 2, 32, 512, 32, 2)}
AIM_SPEED, AIM_MEMORY = 1.25, 0.6
WARM_UP_STEPS = 3


def serve(arguments: argparse.Namespace) -> None:
    """One contender: build, warm up, then some steps a turn."""
    device, shape = arguments.device, shape_from_words(arguments.shape)
    torch.set_num_threads(arguments.threads)
    before = peak_bytes(device)
    torch.manual_seed(0)
    compiled, precision = arguments.compiled, arguments.precision
    if arguments.contender in OF_OURS:
        more = {"activation_checkpointing": arguments.contender == RECOMPUTING}
        step = our_training(shape, precision, compiled, arguments.threads, **more).step
    else:
        step = peer_step(arguments.contender, shape, precision, compiled, device, arguments.peers)
    batch = torch.randint(shape.vocabulary, (shape.rows, shape.tokens)).to(device)
    first = timed(lambda: step(batch), device).wall
    for _ in range(WARM_UP_STEPS - 1):
        step(batch)

    def turn_on_cpu() -> dict[str, Any]:
        seconds = [timed(lambda: step(batch), device) for _ in range(arguments.steps)]
        return {
            "wall": median(s.wall for s in seconds),
            "cpu": median(s.cpu for s in seconds),
            "loss": float(step(batch)),
            "peak_bytes": peak_bytes(device) - before,
        }

    def turn_on_gpu() -> dict[str, Any]:
        step(batch)  # takes the memory that was handed back for the others after the last turn
        # As in a run, the host goes ahead of the device.
        seconds = timed(lambda: [step(batch) for _ in range(arguments.steps)], device)
        answer = {
            "wall": seconds.wall / arguments.steps,
            "cpu": seconds.cpu / arguments.steps,
            "loss": float(step(batch)),
            "peak_bytes": peak_bytes(device) - before,
        }
        torch.cuda.empty_cache()
        return answer

    turn = turn_on_cpu if device == "cpu" else turn_on_gpu
    if device != "cpu":
        torch.cuda.empty_cache()
    serve_turns({"first_step_seconds": first}, turn)


def compare(shape: Shape, precision: str, names: list[str], arguments: argparse.Namespace) -> list[dict]:
    """Figures of all contenders at one shape and precision, eager and compiled, in turns."""
    variants = [
        (n, mode) for mode in arguments.compile for n in names if mode == "eager" or n not in EAGER_ONLY
    ]
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, compiled in variants:
            flags = ["--contender", name, "--precision", precision, "--device", arguments.device]
            flags += ["--shape", *shape.words(), "--threads", str(arguments.threads)]
            flags += ["--steps", str(arguments.steps)] + (["--compiled"] if compiled == "compiled" else [])
            flags += ["--peers", str(arguments.peers)] if arguments.peers else []
            worker = Worker("benchmarks.training_step", *flags, threads=arguments.threads)
            stack.callback(worker.close)
            workers[name, compiled] = worker
            if arguments.device == "cpu":
                assert worker.warm  # one after the other: a first step takes all cores
        for variant in variants:
            assert workers[variant].warm
        turns: dict[tuple[str, str], list[dict]] = {variant: [] for variant in variants}
        for _ in range(arguments.rounds):
            for variant in variants:
                turns[variant].append(workers[variant].turn())
    return [
        {
            "contender": name,
            "mode": compiled,
            "precision": precision,
            "tokens_per_second": [shape.step_tokens / turn["wall"] for turn in turns[name, compiled]],
            "tokens_per_cpu_second": [shape.step_tokens / turn["cpu"] for turn in turns[name, compiled]],
            "peak_mib": max(turn["peak_bytes"] for turn in turns[name, compiled]) / 2**20,
            "first_step_seconds": workers[name, compiled].warm["first_step_seconds"],
            "loss": turns[name, compiled][-1]["loss"],
        }
        for name, compiled in variants
    ]


def table_of(title: str, shape: Shape, figures: list[dict], limits: dict[str, float]) -> Table:
    """One row a contender, precision and mode; ratios are to the best peer of the same precision and mode."""
    rows = []
    for row in figures:
        peers = [
            other
            for other in figures
            if other["contender"] not in OF_OURS
            and (other["precision"], other["mode"]) == (row["precision"], row["mode"])
        ]
        speed = median(row["tokens_per_second"])
        row["mfu"] = speed * shape.flops_per_token / limits[row["precision"]]
        if "datasheet_bf16" in limits:
            row["datasheet_mfu"] = speed * shape.flops_per_token / limits["datasheet_bf16"]
        if peers:
            # Turns that stood next to one another are compared, then the median of their ratios.
            best = max(peers, key=lambda peer: median(peer["tokens_per_second"]))
            pairs = zip(row["tokens_per_second"], best["tokens_per_second"], strict=True)
            row["speed_ratio"] = median(mine / theirs for mine, theirs in pairs)
            row["memory_ratio"] = row["peak_mib"] / min(peer["peak_mib"] for peer in peers)
        ratios = [f"{row[key]:.2f}" if key in row else "" for key in ("speed_ratio", "memory_ratio")]
        rows.append(
            [
                row["contender"],
                row["precision"],
                row["mode"],
                with_spread(row["tokens_per_second"]),
                f"{median(row['tokens_per_cpu_second']):,.0f}",
                f"{row['mfu']:.0%}" + (f", {row['datasheet_mfu']:.0%}" if "datasheet_mfu" in row else ""),
                f"{row['peak_mib']:,.0f}",
                *ratios,
                f"{row['first_step_seconds']:.1f}",
            ]
        )
    mfu = "MFU of the measured rate, of the datasheet's" if "datasheet_bf16" in limits else "MFU"
    columns = ["", "precision", "mode", "tokens/s (smallest–largest)", "tokens/CPU s", mfu, "peak MiB"]
    columns += ["speed, best peer = 1", "memory, best peer = 1", "first step, s"]
    return Table(f"{title}: {shape}", columns, rows)


def best_of(title: str, figures: list[dict], name: str = OURS) -> list[str]:
    """`name`, one of ours, at its fastest beside the fastest of the peers, in any precision and mode."""
    ours = [row for row in figures if row["contender"] == name]
    peers = [row for row in figures if row["contender"] not in OF_OURS]
    fastest, their_fastest = (
        max(rows, key=lambda row: median(row["tokens_per_second"])) for rows in (ours, peers)
    )
    speed = median(fastest["tokens_per_second"]) / median(their_fastest["tokens_per_second"])
    memory = fastest["peak_mib"] / their_fastest["peak_mib"]
    return [
        title,
        f"{name}, {fastest['precision']}, {fastest['mode']}",
        f"{their_fastest['contender']}, {their_fastest['precision']}, {their_fastest['mode']}",
        f"{speed:.2f} (aim ≥ {AIM_SPEED})",
        f"{memory:.2f} (aim ≤ {AIM_MEMORY})",
    ]


def main() -> None:
    parser = benchmark_parser(str(__doc__))
    parser.add_argument("--rounds", type=int, default=5, help="turns of every contender")
    parser.add_argument(
        "--steps", type=int, default=3, help="of a turn; their median counts, on a GPU their mean"
    )
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--compile", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--shapes", metavar="TEXT", default="", help="only shapes whose title has this in it")
    for hidden in ("--worker", "--compiled"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    for hidden in ("--contender", "--precision"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--shape", nargs=len(fields(Shape)), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return serve(arguments)
    if arguments.quick:
        arguments.rounds, arguments.steps = 2, 1
        arguments.compile, arguments.precisions = ["eager"], ["bf16"]
    known = TOY if arguments.quick else SHAPES["cuda" if arguments.device == "cuda" else "cpu"]
    shapes = {title: shape for title, shape in known.items() if arguments.shapes in title}
    if not shapes:
        parser.error(f"--shapes {arguments.shapes}: none of {', '.join(known)}")
    why = {name: why_missing(name, arguments.device, arguments.peers) for name in CONTENDERS}
    names = [name for name in CONTENDERS if not why[name]]
    torch.set_num_threads(arguments.threads)
    result = Result(
        "training_step",
        "The training step",
        "Forward, backward, clipping and AdamW on the same batch. Ours is the step of `train_accelerate.py`; "
        "the others are built and stepped as their own scripts do. Each in a process of its own, in turns.",
        not_run=[[name, why[name]] for name in CONTENDERS if why[name]],
    )
    if arguments.device == "cpu":
        result.not_run.append(["GPT-2 124M and 350M on one GPU", "the same command on a machine with one"])
    with reported(result, arguments.json):
        limits = physical_limits(arguments.device)
        result.about += f" Limits here, {arguments.threads} threads: {describe_limits(limits)}."
        summary = []
        for title, shape in shapes.items():
            figures = []
            for precision in arguments.precisions:
                figures += compare(shape, precision, names, arguments)
                print(table_of(title, shape, figures, limits).as_markdown(), flush=True)
            result.tables.append(table_of(title, shape, figures, limits))
            result.figures += [{"shape": title, **row} for row in figures]
            measured = [name for name in OF_OURS if any(row["contender"] == name for row in figures)]
            summary += [best_of(title, figures, name) for name in measured]
        columns = ["shape", "ours at its best", "best peer", "speed", "memory"]
        result.tables.insert(0, Table("Best beside best", columns, summary))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
