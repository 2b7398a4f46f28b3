"""How long a run will be: `max_steps`, or what its tokens, money or minutes pay for."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from training.checkpoint import TrainState
from training.files import explain_write_error, replace_file
from training.interruption import STARTED
from training.recipe import TrainSettings
from training.run_directory import LENGTH_FILE
from training.settings import SettingsError
from training.throughput import Machine, TimeSpent, in_words

# The rate is taken from the steps after the first ones, which compile and warm up.
UNTIMED_STEPS, TIMED_STEPS = 3, 17
# Of a budget, for what no rate knows: the export, and that a machine is not always as fast. A fitted length
# stands as long as half of it would be left.
PART_TO_KEEP = 0.03


class RunLength:
    """The settings that the schedule follows; `max_steps` and `warmup_steps` fit the budgets.

    A budget of tokens is known at once. One of money, or of minutes with `fit_schedule`, is turned into steps
    by the rate of some steps after the first, and corrected after the first validation, whose time counts as
    well, and when half of the rest is done. From then on, and in a run that was resumed, the length can only
    shrink, and does if the machine has become slower: it is looked at each time half of the steps, or half of
    the time, that were left have gone. So the learning rate comes down before the budget is spent, and never
    rises again. Only if all that was left goes at once, while a machine stands still, the run ends without.

    Decided by the main process, by its `clock`, which counts seconds as `time.monotonic` does.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run_dir: Path,
        settings: TrainSettings,
        machine: Machine,
        state: TrainState,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._accelerator, self._file, self._machine = accelerator, run_dir / LENGTH_FILE, machine
        self.settings = settings
        self._clock, self._began, self._first_step = clock, clock() - state.elapsed_seconds, state.step
        self._is_timed = bool(settings.budget_usd or (settings.fit_schedule and settings.max_minutes))
        self._budgets = {
            name: getattr(settings, name) for name in ("budget_usd", "budget_tokens", "max_steps")
        }
        if settings.budget_tokens:
            self._set(min(settings.max_steps, settings.budget_tokens // settings.batch_tokens))
        self._most_steps = self.max_steps
        recorded = broadcast_object_list([self._recorded() if accelerator.is_main_process else None])[0]
        self._fits = 0
        if self._is_timed and recorded is not None:
            max_steps, self._fits, warmup_steps = recorded
            self._set(max_steps, warmup_steps)
        self._may_grow, self._knows_validation = self._fits == 0, False
        # The step at the last fit and the seconds that were left; the step and training's seconds from which
        # on the rate is taken: all of this start while the length may grow, then what followed the last fit.
        self._fitted, self._rate_from = (state.step, self._seconds_left()), (state.step, 0.0)

    @property
    def max_steps(self) -> int:
        """How many steps the run will have, as far as is known."""
        return self.settings.max_steps

    @property
    def stop_minutes(self) -> float:
        """`max_minutes`, unless the run is fitted into them and ends by itself; 0 is never."""
        return 0.0 if self.settings.fit_schedule else self.settings.max_minutes

    def is_due(self, state: TrainState) -> bool:
        """Whether the length is to be fitted after this step. Only the main process says so."""
        steps = state.step - self._first_step
        if not self._is_timed or not self._accelerator.is_main_process or state.step >= self.max_steps:
            return False
        if self._seconds_left() <= 0:
            return True
        if steps <= UNTIMED_STEPS + TIMED_STEPS:
            return steps in (UNTIMED_STEPS, UNTIMED_STEPS + TIMED_STEPS)
        return self._has_new_validation(state) or self._is_half_gone(state)

    def fit(self, state: TrainState, spent: Mapping[str, TimeSpent]) -> str:
        """Fit the length to the budget, where it `is_due`; returns what to say. Every process calls this.

        `spent` is what this start has done until now, by activity, the device having been waited for.

        Raises:
            SettingsError: if the budget does not reach the first checkpoint.
        """
        found: list[int | str] = [0, "", ""]
        if self._accelerator.is_main_process:
            found = list(self._fit(state, spent))
        length, text, problem = broadcast_object_list(found)
        if problem:
            raise SettingsError(problem)
        if length:
            self._set(length)
        return text

    def _fit(self, state: TrainState, spent: Mapping[str, TimeSpent]) -> tuple[int, str, str]:
        """A new length, or 0; what to say; a problem that ends the run."""
        training = spent["training"].seconds if "training" in spent else 0.0
        if state.step - self._first_step == UNTIMED_STEPS:
            self._rate_from = (state.step, training)
        left = self._seconds_left()
        if left <= 0:
            length, text = state.step, "The budget is spent: this step is the last."
        elif state.step - self._first_step < UNTIMED_STEPS + TIMED_STEPS:
            return 0, "", ""
        else:
            length, seconds = self._affordable(state, spent, training)
            text = (
                f"{in_words(left)} are left, at {seconds:.3g} s a step: the run will have {length:,} steps, "
                "and the learning rate follows."
            )
            self._may_grow &= not self._is_half_gone(state)
            self._knows_validation |= self._has_new_validation(state)
            self._fitted = (state.step, left)
            if not self._may_grow:
                self._rate_from = (state.step, training)
        is_first, self._fits = self._fits == 0, self._fits + 1
        if length == self.max_steps and not is_first:
            return 0, "", ""
        if is_first and length < min(self.settings.save_every_steps, self._most_steps):
            return 0, "", self._too_small(state, length)
        try:
            record = {
                "max_steps": length,
                "warmup_steps": self._warmup_of(length),
                "fits": self._fits,
                "step": state.step,
                "budgets": self._budgets,
            }
            replace_file(self._file, json.dumps(record).encode())
        except OSError as error:  # a run that is resumed before the next fit makes its own
            text += " " + explain_write_error(error, "The run's length", self._file.parent)
        return length, text, ""

    def _affordable(
        self, state: TrainState, spent: Mapping[str, TimeSpent], training: float
    ) -> tuple[int, float]:
        """Steps that the budget pays for in all, and the seconds that each of the next ones will take."""
        settings = self.settings
        first, before = self._rate_from
        seconds = (training - before) / max(1, state.step - first)
        at_the_end = 0.0
        for activity, every_steps in (
            ("validation", settings.eval_every_steps),
            ("samples", settings.sample_every_steps),
            ("hellaswag", settings.hellaswag_every_steps),
            ("checkpoints", settings.save_every_steps),
        ):
            if activity in spent:
                seconds += spent[activity].last_seconds / every_steps
                at_the_end += spent[activity].last_seconds
        seconds = max(seconds, 1e-9)
        rest = (self.max_steps - state.step) * seconds + at_the_end
        if not self._may_grow and rest <= self._seconds_left(keeping=PART_TO_KEEP / 2):
            return self.max_steps, seconds
        usable = max(0.0, self._seconds_left(keeping=PART_TO_KEEP) - at_the_end)
        most = self._most_steps if self._may_grow else self.max_steps
        return min(most, state.step + int(usable / seconds)), seconds

    def _has_new_validation(self, state: TrainState) -> bool:
        return not self._knows_validation and state.validation_step > self._first_step

    def _is_half_gone(self, state: TrainState) -> bool:
        step, left = self._fitted
        return 2 * (state.step - step) >= self.max_steps - step or 2 * self._seconds_left() <= left

    def _set(self, max_steps: int, warmup_steps: int | None = None) -> None:
        warmup_steps = warmup_steps or self._warmup_of(max_steps)
        self.settings = replace(self.settings, max_steps=max_steps, warmup_steps=warmup_steps)

    def _warmup_of(self, max_steps: int) -> int:
        """A warm-up meant for a longer run takes a quarter of this one at most, and no more if that grows."""
        return min(self.settings.warmup_steps, max(1, max_steps // 4))

    def _seconds_left(self, keeping: float = 0.0) -> float:
        """Of the budget that ends first, all but the part that is kept."""
        left, now = float("inf"), self._clock()
        if self.settings.budget_usd:
            whole = self.settings.budget_usd / self._machine.price_per_hour_usd * 3600
            left = (1 - keeping) * whole - (now - self._began)
        if self.settings.fit_schedule and self.settings.max_minutes:
            left = min(left, (1 - keeping) * self.settings.max_minutes * 60 - (now - STARTED))
        return left

    def _too_small(self, state: TrainState, length: int) -> str:
        wanted = self.settings.save_every_steps
        return (
            f"the budget pays for {length:,} steps at the rate of the first {state.step:,}, and the first "
            f"checkpoint is due after save_every_steps={wanted:,}; give about "
            f"{wanted / max(1, length):.1f} times the budget, or --save_every_steps {max(1, length // 2):,}"
        )

    def _recorded(self) -> tuple[int, int, int | None] | None:
        """The length that an earlier start fitted to the same budgets, how often, and its warm-up."""
        try:
            record = json.loads(self._file.read_text(encoding="utf-8"))
            is_of_these = record["budgets"] == self._budgets
            if not is_of_these:
                return None
            return int(record["max_steps"]), int(record["fits"]), record.get("warmup_steps")
        except (OSError, ValueError, KeyError, TypeError):
            return None
