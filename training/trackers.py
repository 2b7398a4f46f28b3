"""Accelerate's experiment trackers, none of which may end a run."""

from collections.abc import Callable, Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils.imports import is_tensorboard_available, is_trackio_available, is_wandb_available

from training.settings import SettingsError

IS_AVAILABLE = {
    "tensorboard": is_tensorboard_available,
    "trackio": is_trackio_available,
    "wandb": is_wandb_available,
}


def check_trackers(names: tuple[str, ...]) -> None:
    """Accelerate leaves out a tracker without its package, and says nothing.

    Raises:
        SettingsError: naming each missing package.
    """
    missing = [name for name in names if not IS_AVAILABLE[name]()]
    if missing:
        raise SettingsError(
            f"log_with: {', '.join(missing)} not installed; `pip install {' '.join(missing)}` or leave it out"
        )


class Trackers:
    """The trackers of `log_with`; one that raises is left out from then on. Only the main process has any."""

    def __init__(self, accelerator: Accelerator, config: Mapping[str, Any], warn: Callable[[str], None]):
        self._accelerator, self._warn = accelerator, warn
        self._active: list[Any] = []
        if accelerator.log_with:
            plain = {k: v if isinstance(v, str | int | float) else str(v) for k, v in config.items()}
            names = list(accelerator.log_with)
            for name in names:  # one at a time: one that fails takes no other along
                accelerator.log_with, accelerator.trackers = [name], []
                try:
                    accelerator.init_trackers("gpt-scratch", config=plain)
                    self._active += accelerator.trackers
                except Exception as error:  # no login, no network, …
                    named = name.name if isinstance(name, GeneralTracker) else name  # given ready, or by name
                    self._warn(
                        f"log_with: {named} could not start, and the run goes on without; metrics.jsonl has "
                        f"all numbers. {type(error).__name__}: {error}"
                    )
            accelerator.log_with, accelerator.trackers = names, list(self._active)

    def log(self, values: Mapping[str, float | None], step: int) -> None:
        """Send the numbers of one step."""
        numbers = {name: value for name, value in values.items() if value is not None}
        for tracker in list(self._active):
            try:
                tracker.log(numbers, step=step)
            except Exception as error:  # whatever a service or its library comes up with
                self._active.remove(tracker)
                self._warn(
                    f"The tracker {tracker.name} failed and is left out: {type(error).__name__}: {error}"
                )

    def close(self) -> None:
        """Let each finish what it has queued."""
        for tracker in self._active:
            try:
                tracker.finish()
            except Exception as error:
                self._warn(f"The tracker {tracker.name} failed at the end: {type(error).__name__}: {error}")
