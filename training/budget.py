"""How long a run will be: `max_steps`, or what its tokens, money or minutes pay for."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from training.checkpoint import TrainState
from training.files import explain_write_error, replace_file
from training.interruption import STARTED
from training.recipe import TrainSettings
from training.settings import SettingsError
from training.throughput import Machine, in_words

LENGTH_FILE = "length.json"
# The rate is taken from the steps after the first ones, which compile and warm up.
UNTIMED_STEPS, TIMED_STEPS = 3, 17
# Left for what a rate cannot know: the last validation and checkpoint, the export.
PART_TO_USE = 0.97


class RunLength:
    """The settings that the schedule follows; `max_steps` and `warmup_steps` fit the budgets.

    A budget of tokens is known at once. One of money, or of minutes with `fit_schedule`, is turned into steps
    after a few steps, by their rate, and corrected after the first validation, whose time counts as well, and
    half-way. Then the length stands, also for the run when it is resumed. If the rate was wrong and the
    budget is spent before, the run ends there, in the same clean way.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run_dir: Path,
        settings: TrainSettings,
        machine: Machine,
        state: TrainState,
    ):
        self._accelerator, self._file, self._machine = accelerator, run_dir / LENGTH_FILE, machine
        self.settings = settings
        self._elapsed_before, self._steps_before = state.elapsed_seconds, state.step
        self._fits, self._timed_from = 0, (0.0, 0)
        self._is_timed = bool(settings.budget_usd or (settings.fit_schedule and settings.max_minutes))
        self._budgets = {
            name: getattr(settings, name) for name in ("budget_usd", "budget_tokens", "max_steps")
        }
        if settings.budget_tokens:
            self._set(min(settings.max_steps, settings.budget_tokens // settings.batch_tokens))
        recorded = broadcast_object_list([self._recorded() if accelerator.is_main_process else None])[0]
        if self._is_timed and recorded is not None:
            self._set(recorded["max_steps"])
            self._fits = recorded["fits"]

    @property
    def max_steps(self) -> int:
        """How many steps the run will have, as far as is known."""
        return self.settings.max_steps

    def fit(self, state: TrainState) -> str:
        """Fit the length to the budget where it is time to; returns what to say. Every process calls this.

        `state.elapsed_seconds` is to be fresh.

        Raises:
            SettingsError: if the budget does not reach the first checkpoint.
        """
        if not self._is_timed:
            return ""
        steps = state.step - self._steps_before
        if steps <= UNTIMED_STEPS or not self._timed_from[1]:
            self._timed_from = (state.elapsed_seconds, state.step)
        left = self._seconds_left(state)
        # Only a validation of this start is in the rate.
        has_validated = state.validation_step > self._steps_before
        is_past_half = 2 * state.step >= self.max_steps
        stage = 1 + has_validated + is_past_half
        is_due = self._fits < stage and steps >= UNTIMED_STEPS + TIMED_STEPS
        length, text = 0, ""
        if left <= 0:
            length, text = state.step, "The budget is spent: this step is the last."
        elif is_due:
            seconds = (state.elapsed_seconds - self._timed_from[0]) / max(1, state.step - self._timed_from[1])
            # Of the whole, not of what is left: the last validation comes after the last step.
            usable = left - (1 - PART_TO_USE) * (left + state.elapsed_seconds - self._elapsed_before)
            length = max(state.step, state.step + int(usable / seconds))
            length = min(length, self._budgets["max_steps"])
            text = (
                f"{in_words(left)} are left, at {seconds:.3g} s a step: the run will have {length:,} steps, "
                "and the learning rate follows."
            )
        length, text = broadcast_object_list([length, text])
        if not length or (length == self.max_steps and self._fits):
            return ""
        if length < self.settings.save_every_steps and not self._fits and length < self._budgets["max_steps"]:
            raise SettingsError(self._too_small(state, length, left))
        self._set(length)
        self._fits = stage
        if self._accelerator.is_main_process:
            record = {"max_steps": length, "fits": self._fits, "step": state.step, "budgets": self._budgets}
            try:
                replace_file(self._file, json.dumps(record).encode())
            except OSError as error:  # no reason to end: a later start would fit anew
                text += " " + explain_write_error(error, "The run's length", self._file.parent)
        return text

    def _set(self, max_steps: int) -> None:
        # A warm-up that was meant for a longer run takes a quarter of this one at most.
        warmup_steps = min(self.settings.warmup_steps, max(1, max_steps // 4))
        self.settings = replace(self.settings, max_steps=max_steps, warmup_steps=warmup_steps)

    def _seconds_left(self, state: TrainState) -> float:
        left = float("inf")
        if self.settings.budget_usd:
            left = self.settings.budget_usd / self._machine.price_per_hour_usd * 3600 - state.elapsed_seconds
        if self.settings.fit_schedule and self.settings.max_minutes:
            left = min(left, self.settings.max_minutes * 60 - (time.monotonic() - STARTED))
        return left

    def _too_small(self, state: TrainState, length: int, left: float) -> str:
        wanted = self.settings.save_every_steps
        return (
            f"the budget pays for {length:,} steps at the rate of the first {state.step:,}, and the first "
            f"checkpoint is due after save_every_steps={wanted:,}; give about "
            f"{wanted / max(1, length):.1f} times the budget, or --save_every_steps {max(1, length // 2):,}"
        )

    def _recorded(self) -> dict[str, Any] | None:
        try:
            record = json.loads(self._file.read_text(encoding="utf-8"))
            same = record["budgets"] == self._budgets
            return {"max_steps": int(record["max_steps"]), "fits": int(record["fits"])} if same else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
