"""A corpus of a few thousand tokens and a model of two narrow blocks, for tests that train for real."""

import itertools
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from accelerate.state import AcceleratorState, GradientState

import train_accelerate
from data.prepare import PrepareSettings, prepare

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 300

# A step is 8 rows of 32 tokens: 8 = 1 process x 2 micro-batches x 4 rows = 2 processes x 1 x 4.
TOY_SETTINGS = {
    "block_size": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "batch_tokens": 256,
    "micro_batch_size": 4,
    "max_steps": 12,
    "warmup_steps": 2,
    "optimizer": "adamw",
    "schedule": "cosine",
    "learning_rate": 3e-3,
    "final_learning_rate_ratio": 0.05,
    "eval_every_steps": 6,
    "eval_tokens": 256,
    "sample_every_steps": 12,
    "sample_tokens": 4,
    "save_every_steps": 4,
    "save_every_minutes": 0,
    "log_every_steps": 3,
    "keep_last": 10,
    "mixed_precision": "no",
    "compile": "none",
    "cpu_threads": 1,
}


def write_toy_shards(folder: Path, seed: int = 0, documents: int = 400) -> Path:
    """Shards of some hundred made-up sentences with a tokenizer trained on them."""
    words = ["the", "model", "token", "learns", "reads", "dungeon", "loss", "step", "and", "never", "deep"]
    randomness = random.Random(seed)
    lines = []
    for _ in range(documents):
        text = " ".join(randomness.choices(words, k=randomness.randint(10, 60)))
        lines.append(json.dumps({"text": text.capitalize() + "."}))
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "toy.jsonl"
    source.write_text("\n".join(lines) + "\n")
    settings = PrepareSettings(
        source=str(source), output=str(folder / "shards"), train_tokenizer=VOCABULARY, validation_tokens=1000
    )
    return prepare(settings, progress=False)


def as_flags(settings: dict) -> list[str]:
    """`{"a": 1}` as `["--a", "1"]`."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def environment() -> dict[str, str]:
    """One thread a process, no network, no launcher's leftovers."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))
    }
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**kept, **quiet, "PYTHONPATH": str(ROOT)}


def train_command(*launch: str, script: Path = ROOT / "train_accelerate.py", **settings) -> list[str]:
    """A command line that trains: through `accelerate launch` if `launch` has flags for it, else without."""
    launcher = [sys.executable]
    if launch:
        launcher += ["-m", "accelerate.commands.launch", *launch]
    return [*launcher, str(script), *as_flags({**TOY_SETTINGS, **settings})]


def run_training(*launch: str, check: bool = True, **settings) -> subprocess.CompletedProcess[str]:
    """Train in a process of its own, outside the repository's folder."""
    done = run_to_its_end(train_command(*launch, **settings), cwd=Path(settings["run_dir"]).parent)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def run_to_its_end(
    command: Sequence[str], *, env: dict[str, str] | None = None, cwd: Path = ROOT, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` does, but that nothing it started goes on after it, however it ends."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=env or environment(), cwd=cwd, **pipes)
    with ended([process]):
        stdout, stderr = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@contextmanager
def ended(processes: Sequence[subprocess.Popen]) -> Iterator[None]:
    """On leaving, kill what still runs of these processes and of all that they have started."""
    try:
        yield
    finally:
        for process in processes:
            kill_family(process.pid)
            process.wait()


def kill_family(pid: int) -> None:
    """A launcher's own children are in sessions of their own: they are found by whose children they are."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def train_here(**settings) -> None:
    """A run of the toy in this process."""
    train_flags_here(as_flags({**TOY_SETTINGS, **settings}))


def train_flags_here(flags: list[str]) -> None:
    """A run in this process, as if it were a new one."""
    try:
        train_accelerate.main(flags)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


# Below what systems hand out by themselves (32768 and up on Linux, 49152 elsewhere): between the look and the
# use nobody gets one of these by chance. Test processes beside this one begin elsewhere.
PORTS = itertools.count(os.getpid() * 37)


def free_port() -> int:
    """A TCP port on which nobody listens."""
    while True:
        port = 10_000 + next(PORTS) % 20_000
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def metrics_of(run_dir: Path) -> list[dict]:
    """Lines of metrics.jsonl, without what depends on the time."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("tokens_per_second", "elapsed_seconds", "mfu", "spend_usd")
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]
