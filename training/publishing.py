"""What comes after a run: its picture and its card, and the way to the Hub."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from tqdm import tqdm

from training.checkpoint import latest_checkpoint
from training.device import start_processes
from training.recipe import TrainSettings
from training.record import read_run
from training.report import PICTURE_FILE, draw_losses
from training.run_directory import on_main_process
from training.settings import SettingsError

CARD_FILE = "README.md"  # of an export
AVERAGED_FOLDER = "export-ema"  # beside the export, where an average of the weights was kept
# Of a run that was stopped: whoever stopped it is waiting.
SECONDS_FOR_THE_HUB_AFTER_A_STOP = 30.0


class Publisher:
    """Publishes the run of `settings`. Nothing that fails here is an error of the run, whose files are safe.

    `push` makes what pushes (`release.background.HubPushes`), `write_card` is `release.card`'s.
    """

    def __init__(
        self,
        settings: TrainSettings,
        *,
        push: Callable[..., Any],
        write_card: Callable[..., object],
    ):
        """Look at the Hub, if it is to be pushed to. Every process calls this, before anything takes long.

        Raises:
            SettingsError: if there is no token, so that nothing could be pushed after all the work.
        """
        self._settings, self._write_card = settings, write_card
        self._run_dir = Path(settings.run_dir)
        self._is_idle = settings.plan or not start_processes().is_main_process
        self._pushes: Any = None
        if not settings.push_to_hub or settings.plan:
            return
        on_main_process(start_processes(), _check_token)
        if self._is_idle:
            return
        disable_progress_bars()
        hub_logging.set_verbosity_error()  # its warnings quote signed addresses, and our own say the rest
        self._pushes = push(settings.hub_model_id, private=settings.hub_private, warn=_say)
        self._pushes.check()
        if settings.hub_strategy == "every_save":
            self._pushes.watch(partial(latest_checkpoint, self._run_dir))

    def finish(self) -> None:
        """Draw and describe a run that has ended, now or at an earlier start, and push it.

        Of one that was stopped, only wait a little for a checkpoint that is on its way. Every process calls
        this; the main one works.
        """
        export, waits = self._run_dir / "export", self._settings.hub_minutes * 60
        if self._is_idle:
            return
        try:
            if not (export.exists() and has_ended(self._run_dir)):
                if self._pushes is not None:
                    self._pushes.stop(min(waits, SECONDS_FOR_THE_HUB_AFTER_A_STOP))
                return
            # Once for each export: a run that was complete stays as it is, unless others are to see it.
            if self._pushes is not None or not (export / CARD_FILE).exists():
                self._describe(export, repo_id=self._settings.hub_model_id or None)
                if (averaged := self._run_dir / AVERAGED_FOLDER).exists():
                    self._describe(averaged)  # it is pushed by hand, under a name of its own
            if self._pushes is not None:
                _say(f"Pushing {export} to the Hub as {self._settings.hub_model_id}.")
                url = self._pushes.finish(export, waits)
                again = f"`python -m release.push {export} {self._settings.hub_model_id}` does it later."
                _say(f"The model is at {url}" if url else f"The export is not on the Hub; {again}")
        except KeyboardInterrupt:
            _say("Ctrl-C: the Hub is not waited for. The run is complete, and its files are all here.")

    def _describe(self, export: Path, **details: Any) -> None:
        try:
            draw_losses([self._run_dir], self._run_dir / PICTURE_FILE)
        except Exception as error:
            _say(f"{PICTURE_FILE} was not drawn: {error}")
        try:
            self._write_card(export, self._run_dir, **details)
        except Exception as error:
            _say(f"The model card was not written: {error}")


def has_ended(run_dir: Path) -> bool:
    """Whether the run, when it was last trained on, went to its end."""
    try:
        events = [event["event"] for event in read_run(run_dir).events]
    except ValueError:
        return False
    turns = [event for event in events if event in ("started", "resumed", "stopped", "finished")]
    return turns[-1:] == ["finished"]


def _check_token() -> None:
    if not get_token():
        raise SettingsError(
            "--push_to_hub: there is no token for the Hub, and nothing could be pushed in the end. Run "
            "`hf auth login`, or set HF_TOKEN to one that may write (https://huggingface.co/settings/tokens)."
        )


def _say(text: str) -> None:
    tqdm.write(text)  # above a progress bar, if there is one
    sys.stdout.flush()
