"""What every benchmark shares: flags, facts about the machine, its physical limits, taking turns, results.

A result is one JSON file: what was run, when, on which commit and machine, tables as they are printed, the
figures in them as numbers, and who could not run with what to do about it. benchmarks/RESULTS.md is made from
these files by `python -m benchmarks --report`.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
VERSIONS_OF = ("torch", "transformers", "accelerate", "tokenizers", "datasets")
BANDWIDTH_BYTES = 2**28  # far more than any cache


@dataclass
class Table:
    """Rows of text under `columns`, as they are printed."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def as_markdown(self) -> str:
        lines = [self.title, ""] if self.title else []
        lines += ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in self.rows])


def table_from_markdown(text: str) -> Table:
    """The table that `text` holds, and what stands before it as its title."""
    title, _, body = text.strip().partition("|")
    header, _, *lines = [line.strip().strip("|") for line in ("|" + body).splitlines() if line.strip()]
    cells = [[cell.strip() for cell in line.split("|")] for line in (header, *lines)]
    return Table(title.strip(), cells[0], cells[1:])


@dataclass
class Result:
    """What one run of a benchmark found."""

    name: str
    title: str
    about: str  # what is compared, and how, in sentences
    tables: list[Table] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    not_run: list[list[str]] = field(default_factory=list)  # who, and why or what to do
    command: str = ""
    date: str = ""
    commit: str = ""
    seconds: float = 0.0
    hardware: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def as_markdown(self) -> str:
        took = f", {self.seconds / 60:.0f} minutes" if self.seconds >= 60 else ""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [f"## {self.title}", "", self.about, ""]
        lines += [f"`{self.command}`, {self.date}, commit {self.commit}{took}."]
        lines += ["; ".join(filter(None, (self.hardware, versions))) + "."]
        for table in self.tables:
            lines += ["", table.as_markdown()]
        if self.not_run:
            lines += ["", "Not run: " + "; ".join(f"{who} ({why})" for who, why in self.not_run) + "."]
        return "\n".join(lines) + "\n"


def read_result(path: Path) -> Result:
    loaded = json.loads(path.read_text(encoding="utf-8"))
    return Result(**{**loaded, "tables": [Table(**table) for table in loaded["tables"]]})


def benchmark_parser(doc: str) -> argparse.ArgumentParser:
    """The flags that all benchmarks understand."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder with checkouts of nanoGPT and build-nanogpt")
    parser.add_argument(
        "--quick", action="store_true", help="toy sizes: does it run; its figures mean nothing"
    )
    parser.add_argument("--json", type=Path, metavar="OUT_DIR", help="also write NAME.json there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=available_threads(), help="of the CPU")
    return parser


@contextlib.contextmanager
def reported(result: Result, out_dir: Path | None, command: str | None = None) -> Any:
    """Around a benchmark: afterwards what it put into `result` is complete, printed and written."""
    began = time.perf_counter()
    result.hardware = hardware()
    yield result
    result.seconds = time.perf_counter() - began
    result.command = command or as_typed()
    result.date = datetime.date.today().isoformat()
    result.commit = commit()
    result.versions = {name: importlib.metadata.version(name) for name in VERSIONS_OF}
    print("\n" + result.as_markdown())
    if out_dir is not None:
        out_dir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n"
        (out_dir / f"{result.name}.json").write_text(text, encoding="utf-8")


def as_typed() -> str:
    """The command without the folders of this machine."""
    name = Path(sys.argv[0]).stem
    words = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]
    return " ".join(["python -m benchmarks." + name, *words])


def commit() -> str:
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or "unknown"


def hardware() -> str:
    """Processor, cores, memory, GPU, and how busy the machine is."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    text = f"{available_threads()} cores of {name}"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        text += f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    if torch.cuda.is_available():
        text += f", {torch.cuda.get_device_name()}"
    if hasattr(os, "getloadavg"):
        text += f", load {os.getloadavg()[0]:.1f} when it began"
    return text


def available_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ----------------------------------------------------------------------------------------------------------
# Measuring.


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


@dataclass(frozen=True)
class Seconds:
    """Of one piece of work: on the clock, and of the processors in this process."""

    wall: float
    cpu: float


def timed(work: Callable[[], Any], device: str) -> Seconds:
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    synchronize(device)
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def with_spread(values: Sequence[float], form: str = ",.0f") -> str:
    """Median and, in brackets, the smallest and the largest."""
    return f"{median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def peak_bytes(device: str) -> int:
    """Peak of allocated memory on a GPU, of the resident set on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        # Not ru_maxrss: Linux hands the parent's peak on to a child.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 2**10
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def product_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the best of some large square matrix products."""
    side = 2048 if device == "cpu" else 8192
    # Random: zeros and ones switch fewer transistors, and a GPU that is bound by its power goes faster.
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = min(timed(lambda: one @ other, device).wall for _ in range(6))
    return 2 * side**3 / best


def read_bandwidth(device: str) -> float:
    """Bytes/s of the best of some sums over more memory than caches hold."""
    data = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    best = min(timed(lambda: data.sum(), device).wall for _ in range(6))
    return BANDWIDTH_BYTES / best


def physical_limits(device: str) -> dict[str, float]:
    return {
        "fp32": product_rate(device, torch.float32),
        "bf16": product_rate(device, torch.bfloat16),
        "bytes_per_second": read_bandwidth(device),
    }


def describe_limits(limits: dict[str, float]) -> str:
    return (
        f"matrix products {limits['fp32'] / 1e9:,.0f} GFLOP/s in float32 and {limits['bf16'] / 1e9:,.0f} in "
        f"bfloat16; memory is read at {limits['bytes_per_second'] / 1e9:,.1f} GB/s"
    )


# ----------------------------------------------------------------------------------------------------------
# Contenders in processes of their own that take turns.


ANSWER = "answer: "  # so begins a contender's line that is not its libraries' chatter


class Worker:
    """A process that warms up, then works a turn each time it is told to and answers with a line of JSON."""

    def __init__(self, module: str, *flags: str, threads: int):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, "--worker", *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if "BENCHMARKS_VERBOSE" not in os.environ else None,
            text=True,
            env=environment,
        )
        self.warm = self._answer()

    def turn(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        errors = self._process.stderr.read() if self._process.stderr else ""
        raise RuntimeError(f"a contender ended without an answer:\n{errors[-3000:]}")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def serve_turns(warm: dict[str, Any], turn: Callable[[], dict[str, Any]]) -> None:
    """The other side of `Worker`: says that it is warm, then takes a turn for every line that comes in."""
    say(warm)
    for _ in sys.stdin:
        say(turn())


def say(answer: dict[str, Any]) -> None:
    print(ANSWER + json.dumps(answer), flush=True)
