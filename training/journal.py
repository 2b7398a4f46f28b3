"""What a run tells: a line of metrics per step, the progress bar, events, trackers."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from training.checkpoint import TrainState
from training.guard import SpikeWatch, StepGuard
from training.recipe import TrainSettings
from training.run_directory import RunDirectory
from training.settings import SettingsError, plain_settings
from training.throughput import Progress, Stopwatch
from training.trackers import Trackers


@dataclass(frozen=True)
class StepRecord:
    """One step. `numbers`, float32 (4 + micro-batches of this process,), are still on the device.

    They are the loss, the gradient norm, 1 if the update was skipped, the step's tokens over all processes,
    and each micro-batch's share of the loss.
    """

    step: int
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
        describe_rows: Callable[[int, int], str],
    ):
        """`describe_rows(first, count)` says in words where those rows of the data order come from."""
        self._accelerator, self._run, self._guard, self._settings = accelerator, run, guard, settings
        self._describe_rows = describe_rows
        is_main = accelerator.is_main_process
        self._progress = Progress(step=state.step, max_steps=settings.max_steps, is_shown=is_main)
        self.say = self._progress.say
        self._trackers = Trackers(accelerator, plain_settings(settings), warn=self.say)
        self._spikes = SpikeWatch()
        self._records: list[StepRecord] = []
        self._stopwatch = Stopwatch()
        self._elapsed_before, self._began = state.elapsed_seconds, time.monotonic()

    def begin(self, state: TrainState, text: str) -> None:
        """Say and note that training starts or goes on."""
        self.say(text)
        self.say(
            f"{f'Going on from step {state.step:,}' if state.step else 'A new run'} in {self._run.path}."
        )
        processes = self._accelerator.num_processes
        self.event("resumed" if state.step else "started", step=state.step, processes=processes)

    def add(
        self,
        state: TrainState,
        learning_rate: float,
        loss: Tensor,
        gradient_norm: Tensor,
        is_skipped: Tensor,
        tokens: Tensor,
        shares: Tensor,
    ) -> None:
        """The step that `state` counted last was taken, with `tokens` over all processes.

        Nothing waits for the tensors, 0-d but for `shares`.
        """
        numbers = torch.cat([torch.stack([loss, gradient_norm, is_skipped, tokens.to(loss.dtype)]), shares])
        self._records.append(StepRecord(state.step, learning_rate, numbers))

    def flush(self, state: TrainState) -> None:
        """Write the metrics of all steps since the last flush, and bring `state`'s counts up to date.

        Raises:
            SettingsError: if too many steps in a row were not finite.
        """
        if not self._records:
            return
        records, self._records = self._records, []
        numbers = torch.stack([record.numbers for record in records]).tolist()
        speed = self._stopwatch.tokens_per_second(int(sum(row[3] for row in numbers)))
        state.elapsed_seconds = self._elapsed_before + time.monotonic() - self._began
        state.skipped_steps, state.skipped_in_a_row = self._guard.read()
        lines = []
        for record, (loss, gradient_norm, is_skipped, tokens, *_) in zip(records, numbers, strict=True):
            state.tokens += int(tokens)
            line = {
                "step": record.step,
                "tokens": state.tokens,
                "loss": loss,
                "learning_rate": record.learning_rate,
                "gradient_norm": gradient_norm,
                "tokens_per_second": round(speed, 1),
                "elapsed_seconds": round(state.elapsed_seconds, 3),
            }
            if is_skipped:
                line["skipped"] = True
                self.event("skipped_step", step=record.step)
                self.say(f"step {record.step:,}: loss or gradients were not finite; no update was made.")
            elif self._spikes.is_spike(loss):
                self.event("loss_spike", step=record.step, loss=loss)
                self.say(f"step {record.step:,}: the loss jumped to {loss:.3f} nats/token.")
            lines.append(line)
        self._run.append_metrics(lines)
        self._trackers.log({name: value for name, value in lines[-1].items() if name != "step"}, state.step)
        self._progress.show(state.step, numbers[-1][0], records[-1].learning_rate, speed)
        self._stopwatch.restart()
        if state.skipped_in_a_row >= self._settings.max_skipped_steps:
            raise SettingsError(self._diverged(state, records[-1].step, numbers[-1][4:]))

    def _diverged(self, state: TrainState, last_step: int, shares: list[float]) -> str:
        """The message that ends a run whose steps are not finite. Every process calls this."""
        rank, world_size = self._accelerator.process_index, self._accelerator.num_processes
        rows = self._settings.micro_batch_size
        first_micro_batch = (last_step - 1) * len(shares) * world_size
        mine = [
            first_micro_batch + number * world_size + rank
            for number, share in enumerate(shares)
            if not math.isfinite(share)
        ]
        bad = sorted(gather_object(mine)) if world_size > 1 else mine
        where = "The losses were finite: it was the gradients that were not."
        if bad:
            rows_in_words = self._describe_rows(bad[0] * rows, rows)
            where = f"The first bad micro-batch of step {last_step:,} is {rows_in_words}."
        return (
            f"loss or gradients were not finite in {state.skipped_in_a_row} steps in a row, the last being "
            f"step {last_step:,}; none of them changed the weights. {where} The same command goes on "
            "from the newest checkpoint, which is good. If it ends here again, look at that data; if it ends "
            "elsewhere, lower the learning rate."
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
        self._trackers.log({"validation_loss": loss, "bits_per_byte": bits_per_byte}, state.step)
        in_bytes = f", {bits_per_byte:.4f} bits/byte" if bits_per_byte is not None else ""
        self.say(f"step {state.step:,}: validation loss {loss:.4f} nats/token{in_bytes}")

    def hellaswag(self, state: TrainState, accuracy: float, questions: int) -> None:
        """The part of `questions` answered rightly, lm-evaluation-harness's `acc_norm`."""
        line = {
            "step": state.step,
            "tokens": state.tokens,
            "hellaswag_acc_norm": accuracy,
            "hellaswag_questions": questions,
        }
        self._run.append_metrics([line])
        self._trackers.log({"hellaswag_acc_norm": accuracy}, state.step)
        self.say(f"step {state.step:,}: HellaSwag {accuracy:.2%} of {questions:,} questions (acc_norm)")

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
        """Leave the progress bar as it is, and let trackers finish."""
        self._trackers.close()
        self._progress.close()
