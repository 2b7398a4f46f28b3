"""Real processes for tests: they meet without a port that others could take, and none is left behind."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def environment(**changes: str) -> dict[str, str]:
    """One thread a process, on the CPU, without network, with our packages at hand."""
    quiet = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **quiet, "PYTHONPATH": str(ROOT), **changes}


def start(command: list[str], cwd: Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """The command in a process group of its own, for `end`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        command, cwd=cwd, env=env or environment(), text=True, start_new_session=True, **pipes
    )


def end(process: subprocess.Popen[str]) -> None:
    """End it and its children, whatever state they are in."""
    if process.poll() is None:
        process.terminate()  # a launcher ends its workers, which are in groups of their own
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in filter(None, (process.stdout, process.stderr)):
        pipe.close()


def run(
    command: list[str], cwd: Path, *, env: dict[str, str] | None = None, timeout_seconds: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run it to its end, however that is."""
    process = start(command, cwd, env)
    try:
        out, err = process.communicate(timeout=timeout_seconds)
        return subprocess.CompletedProcess(command, process.returncode, out, err)
    finally:
        end(process)


def run_script(script: Path, *arguments: str, cwd: Path, processes: int = 1) -> str:
    """What the script printed; torch's launcher, which finds a port itself, starts several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = run([*launcher, str(script), *arguments], cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_workers(count: int, code: str, folder: Path) -> list[Any]:
    """What each of `count` processes that run `code` gave to `report`; they talk over the loopback."""
    mine = folder / f"{count} workers"
    mine.mkdir()
    (mine / "worker.py").write_text(code)
    run_script(mine / "worker.py", str(mine), cwd=ROOT, processes=count)
    return [json.loads((mine / f"{rank}.json").read_text()) for rank in range(count)]


def report(result: Any) -> None:
    """In a worker: hand this over, and end."""
    folder, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
    (folder / f"{rank}.json").write_text(json.dumps(result))
