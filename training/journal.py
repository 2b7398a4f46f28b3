"""What a run tells.

A line of metrics per step, the progress bar, events, trackers; read from the device in batches.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from training.checkpoint import TrainState
from training.guard import StepGuard
from training.recipe import TrainSettings
from training.run_directory import RunDirectory
from training.settings import SettingsError
from training.throughput import Progress, Stopwatch


@dataclass(frozen=True)
class StepRecord:
    """One step. `numbers`, float32 (3,) on the device: loss, gradient norm, 1 if the update was skipped."""

    step: int
    tokens: int
    learning_rate: float
    numbers: Tensor


class Journal:
    """Keeps each step's numbers on the device until `flush`, the only place where the host waits for them."""

    def __init__(
        self,
        accelerator: Accelerator,
        run: RunDirectory,
        guard: StepGuard,
        state: TrainState,
        settings: TrainSettings,
    ):
        self._run, self._guard, self._settings = run, guard, settings
        is_main = accelerator.is_main_process
        self._progress = Progress(step=state.step, max_steps=settings.max_steps, is_shown=is_main)
        self.say = self._progress.say
        self._records: list[StepRecord] = []
        self._stopwatch = Stopwatch()
        self._elapsed_before, self._began = state.elapsed_seconds, time.monotonic()

    def add(
        self, state: TrainState, learning_rate: float, loss: Tensor, gradient_norm: Tensor, is_skipped: Tensor
    ) -> None:
        """The step that `state` counted last was taken; the tensors are 0-d, and nothing waits for them."""
        self._records.append(
            StepRecord(
                state.step, state.tokens, learning_rate, torch.stack([loss, gradient_norm, is_skipped])
            )
        )
        self._stopwatch.add(self._settings.batch_tokens)

    def flush(self, state: TrainState) -> None:
        """Write the metrics of all steps since the last flush, and bring `state`'s counts up to date.

        Raises:
            SettingsError: if too many steps in a row were not finite.
        """
        if not self._records:
            return
        numbers = torch.stack([record.numbers for record in self._records]).tolist()
        speed = self._stopwatch.tokens_per_second()
        state.elapsed_seconds = self._elapsed_before + time.monotonic() - self._began
        state.skipped_steps, state.skipped_in_a_row = self._guard.read()
        lines: list[dict[str, Any]] = []
        for record, (loss, gradient_norm, is_skipped) in zip(self._records, numbers, strict=True):
            line = {
                "step": record.step,
                "tokens": record.tokens,
                "loss": loss,
                "learning_rate": record.learning_rate,
                "gradient_norm": gradient_norm,
                "tokens_per_second": round(speed, 1),
                "elapsed_seconds": round(state.elapsed_seconds, 3),
            }
            if is_skipped:
                line["skipped"] = True
                self._run.append_event("skipped_step", step=record.step)
            lines.append(line)
        self._run.append_metrics(lines)
        self._progress.show(state.step, loss, record.learning_rate, speed)
        skipped = [
            record.step for record, (*_, is_skipped) in zip(self._records, numbers, strict=True) if is_skipped
        ]
        if skipped:
            steps = ", ".join(map(str, skipped))
            self.say(f"Loss or gradients were not finite: no update in step {steps}.")
        self._records = []
        self._stopwatch.restart()
        if state.skipped_in_a_row >= self._settings.max_skipped_steps:
            first = state.step - state.skipped_in_a_row + 1
            raise SettingsError(
                f"loss or gradients were not finite in {state.skipped_in_a_row} steps in a row, from step "
                f"{first:,} on; none of them changed the weights. The same command goes on from the newest "
                "checkpoint, which is good. If it comes again at the same step, look at that step's data; if "
                "not, lower the learning rate."
            )

    def validation(self, state: TrainState, loss: float, bits_per_byte: float | None) -> None:
        """A validation's result; `state` remembers the loss, by which the best checkpoint is found."""
        state.validation_loss, state.validation_step = loss, state.step
        line = {
            "step": state.step,
            "tokens": state.tokens,
            "validation_loss": loss,
            "bits_per_byte": bits_per_byte,
        }
        self._run.append_metrics([line])
        in_bytes = f", {bits_per_byte:.4f} bits/byte" if bits_per_byte is not None else ""
        self.say(f"step {state.step:,}: validation loss {loss:.4f} nats/token{in_bytes}")

    def samples(self, prompts: tuple[str, ...], texts: list[str]) -> None:
        """Show what the model writes."""
        for prompt, text in zip(prompts, texts, strict=True):
            self.say(f"  | {prompt}{text}".replace("\n", "\n  | "))

    def resume_clock(self) -> None:
        """Training goes on after something else: that time does not count as training's."""
        self._stopwatch.restart()

    def event(self, event: str, **details: Any) -> None:
        """See `RunDirectory.append_event`."""
        self._run.append_event(event, **details)

    def close(self) -> None:
        """Leave the progress bar as it is."""
        self._progress.close()
