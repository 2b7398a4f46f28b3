"""All benchmarks behind one command.

    python -m benchmarks                                   lists them, with aims and durations
    python -m benchmarks training_step generation --peers DIR --json benchmarks/results
    python -m benchmarks all --peers DIR --texts prose.jsonl.xz --questions hellaswag_val.jsonl
    python -m benchmarks --report                          benchmarks/results/*.json → RESULTS.md

Each runs in a process of its own and prints a table: ours, every peer that is here, this machine's limits.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import ROOT, read_result

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "benchmarks" / "RESULTS.md"
INTRODUCTION = """# Results

Made from `benchmarks/results/*.json` by `python -m benchmarks --report`. Each section is one command on one
machine, or one for each shape; contenders took turns in it. Read ratios, not absolute times: machines differ,
and so do days.
"""


@dataclass(frozen=True)
class Benchmark:
    """A line of the list. `minutes` is a full run on two CPU cores; `needs` is the flag with its data."""

    name: str
    aim: str
    minutes: float
    needs: str = ""


BENCHMARKS = (
    Benchmark("training_step", "≥ 1.25 × the best peer's tokens/s, ≤ 0.6 × its peak memory", 35),
    Benchmark("loss", "no slower than plain logits, a fifth of their memory", 3),
    Benchmark("loop_overhead", "< 2% over a bare step", 8),
    Benchmark("quality_for_time", "lower bits per byte at every checkpoint than nanoGPT and Trainer", 18),
    Benchmark("preparation", "faster than datasets.map and a pool of processes", 6, "texts"),
    Benchmark("hellaswag", "float32 ≥ 2.2 × the best peer, bfloat16 ≥ 4 ×, equal choices", 5, "questions"),
    Benchmark("generation", "never slower than stock; ≥ 5 × nanoGPT at 256 new tokens, ≥ 10 × at 1,000", 12),
    Benchmark("startup", "reported: start to first step, a checkpoint, resume to first step", 3),
    Benchmark("plan", "seconds and memory of a run within 10% of what --plan said", 6),
    Benchmark("scaling", "≥ 0.9 efficiency where cores allow; memory within 10% of --plan", 6),
)


def has_file(benchmark: Benchmark) -> bool:
    return (ROOT / "benchmarks" / f"{benchmark.name}.py").is_file()


def listing() -> str:
    lines = ["benchmark          minutes  aim"]
    for benchmark in filter(has_file, BENCHMARKS):
        data = f" (wants --{benchmark.needs})" if benchmark.needs else ""
        lines.append(f"{benchmark.name:<18} {benchmark.minutes:>7g}  {benchmark.aim}{data}")
    return "\n".join([*lines, "", "python -m benchmarks NAME … | all, --help for the rest"])


def report_of(folder: Path) -> str:
    """The page that the results in `folder` make, in the list's order: `NAME.json` before `NAME_*.json`."""
    names = [benchmark.name for benchmark in BENCHMARKS]

    def place(file: Path) -> tuple[int, str]:
        own = (number for number, name in enumerate(names) if file.stem.startswith(name))
        return next(own, len(names)), file.stem

    files = sorted(folder.glob("*.json"), key=place)
    return "\n".join([INTRODUCTION, *(read_result(file).as_markdown() for file in files)])


def command_of(benchmark: Benchmark, arguments: argparse.Namespace) -> list[str]:
    """How `benchmark` is started as a process of its own."""
    command = [sys.executable, "-m", f"benchmarks.{benchmark.name}"]
    command += ["--quick"] if arguments.quick else []
    for flag in ("peers", "json", "threads"):
        if getattr(arguments, flag) is not None:
            command += [f"--{flag}", str(getattr(arguments, flag))]
    if benchmark.needs:
        command += ["--data", *map(str, getattr(arguments, benchmark.needs))]
    return command


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run, or all")
    parser.add_argument("--peers", type=Path, help="folder with checkouts of nanoGPT and build-nanogpt")
    parser.add_argument("--texts", type=Path, nargs="+", help="JSON lines with `text`, for preparation")
    parser.add_argument("--questions", type=Path, nargs=1, help="HellaSwag's validation file, for hellaswag")
    parser.add_argument("--quick", action="store_true", help="toy sizes: do they run")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--json", type=Path, metavar="OUT_DIR", help=f"usually {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--report", action="store_true", help=f"write {PAGE.relative_to(ROOT)}, then end")
    arguments = parser.parse_args()
    if arguments.report:
        PAGE.write_text(report_of(arguments.json or RESULTS), encoding="utf-8")
        return 0
    known = {benchmark.name: benchmark for benchmark in filter(has_file, BENCHMARKS)}
    if not arguments.names:
        print(listing())
        return 0
    names = list(known) if arguments.names == ["all"] else arguments.names
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    failed = []
    for name in names:
        if known[name].needs and not getattr(arguments, known[name].needs):
            print(f"{name}: not run; give its data with --{known[name].needs}", flush=True)
            continue
        print(f"{name}: about {known[name].minutes:g} minutes, unless --quick", flush=True)
        if subprocess.run(command_of(known[name], arguments), cwd=ROOT, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
