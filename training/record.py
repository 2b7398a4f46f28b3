"""What a run directory tells of its run, whatever state its files are in."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from training.run_directory import (
    DATA_FILE,
    EVENTS_FILE,
    LENGTH_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    SETTINGS_FILE,
    is_held,
)

# Longer than steps, validations or checkpoints keep a run from writing metrics, as a rule.
LATELY_SECONDS = 900


@dataclass(frozen=True)
class RunRecord:
    """A run directory, read. `problems` says in words what could not be read."""

    name: str
    path: Path
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    settings: dict[str, Any]
    receipt: dict[str, Any]
    length: dict[str, Any]
    is_running: bool = False
    problems: list[str] = field(default_factory=list)

    def with_number(self, name: str) -> list[dict[str, Any]]:
        """The lines of metrics that hold a number called `name`."""
        return [line for line in self.metrics if isinstance(line.get(name), int | float)]


def read_run(run_dir: Path | str) -> RunRecord:
    """All that a page shows. Lines cut short or otherwise damaged are left out and named in `problems`.

    Raises:
        ValueError: if there are no metrics to show.
    """
    path = Path(run_dir)
    if not (path / METRICS_FILE).exists():
        raise ValueError(
            f"{run_dir} has no {METRICS_FILE}; give the folder of a run, such as artifacts/runs/demo"
        )
    problems: list[str] = []
    metrics = _read_lines(path / METRICS_FILE, ("step",), problems)
    if not metrics:
        raise ValueError(f"{path / METRICS_FILE} holds no metrics: no step has been logged yet")
    return RunRecord(
        name=path.resolve().name,
        path=path,
        metrics=metrics,
        events=_read_lines(path / EVENTS_FILE, ("event", "unix_time"), problems),
        samples=_read_lines(path / SAMPLES_FILE, ("step", "prompt", "text"), problems),
        settings=_read_mapping(path / SETTINGS_FILE, problems),
        receipt=_read_mapping(path / DATA_FILE, problems),
        length=_read_mapping(path / LENGTH_FILE, problems),
        is_running=_is_running(path),
        problems=problems,
    )


def _is_running(path: Path) -> bool:
    """By its lock; where the file system has none, by whether it has written lately."""
    held = is_held(path)
    return held if held is not None else time.time() - (path / METRICS_FILE).stat().st_mtime < LATELY_SECONDS


def _read_lines(path: Path, needed: tuple[str, ...], problems: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines, damaged = [], []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or any(name not in line for name in needed):
                raise ValueError("not a line of a run")
            lines.append(line)
        except ValueError:
            damaged.append(number)
    if damaged:
        many = f"{len(damaged)} lines" if len(damaged) > 1 else "one line"
        shown = ", ".join(map(str, damaged[:5])) + (", …" if len(damaged) > 5 else "")
        problems.append(
            f"{many} of {path.name} could not be read and {'are' if len(damaged) > 1 else 'is'} "
            f"left out (line {shown}): cut short, perhaps by a kill or a full disk."
        )
    return lines


def _read_mapping(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{path.name} could not be read ({type(error).__name__}).")
        return {}
    return content if isinstance(content, dict) else {}
