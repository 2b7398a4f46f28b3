"""The run that faults are done to, and what "the same end" means."""

import time
from collections.abc import Callable
from pathlib import Path

from faults import Outcome, run
from training_toys import metrics_of

from training.checkpoint import latest_checkpoint

# Ten steps, saved after 3, 6, 9 and 10; dropout, so that a lost random state would show.
STEPS = {
    "max_steps": 10,
    "save_every_steps": 3,
    "eval_every_steps": 5,
    "sample_every_steps": 5,
    "dropout": 0.1,
}
# Spelt out above the table.
SAME = "*same end*"


def finish(settings: dict, *, processes: int = 1, **changes) -> Outcome:
    """Run the same command again; it must reach the end."""
    outcome = run({**settings, **changes}, processes=processes)
    assert outcome.code == 0, outcome.text
    assert "The model is in" in outcome.text
    return outcome


def assert_like(undisturbed: Path, settings: dict) -> None:
    """Bit for bit: weights, optimizer state, random states and metrics; and nothing lies about."""
    ends = [latest_checkpoint(folder) for folder in (undisturbed, settings["run_dir"])]
    assert ends[0].name == ends[1].name == "step-0000010"
    for name in ("model.safetensors", "optimizer.safetensors", "random_states.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), name
    exports = [folder / "export" / "model.safetensors" for folder in (undisturbed, settings["run_dir"])]
    assert exports[0].read_bytes() == exports[1].read_bytes()
    assert metrics_of(undisturbed) == metrics_of(settings["run_dir"])
    # What a crash leaves half written is gone, but for a folder that only its marker was missing from.
    left = [path for path in settings["run_dir"].rglob(".*") if ".incomplete" not in str(path)]
    assert [path.name for path in left] == [".lock"]


def wait_until(happened: Callable[[], object], explain: Callable[[], str] = str) -> None:
    """Until it has; a minute is a bug, however slow the machine."""
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.02)
