"""What a run tells: a line of metrics per step, the progress bar, events, trackers."""

import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from training.budget import RunLength
from training.checkpoint import TrainState
from training.guard import SpikeWatch, StepGuard
from training.memory import peak_memory
from training.recipe import TrainSettings, describe_batch
from training.report import write_page
from training.run_directory import RunDirectory
from training.settings import SettingsError, plain_settings
from training.throughput import Machine, Progress, Stopwatch, TimeSpent, in_words
from training.trackers import Trackers

# Of a step whose data is suspected; a batch of GPT-2 has hundreds.
ROWS_NAMED = 16


@dataclass(frozen=True)
class StepRecord:
    """One step, its tensors still on the device.

    `numbers`, float32 (3 + micro-batches of this process,), are the loss, the gradient norm, 1 if the update
    was skipped, and each micro-batch's share of the loss; `tokens`, int64 (), those of all processes.
    """

    step: int
    learning_rate: float
    numbers: Tensor
    tokens: Tensor


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
        machine: Machine,
        length: RunLength,
    ):
        """`describe_rows(first, count)` says in words where those rows of the data order come from."""
        self._accelerator, self._run, self._guard, self._settings = accelerator, run, guard, settings
        self._state, self._describe_rows = state, describe_rows
        is_shown = accelerator.is_main_process and not settings.plan
        self._machine, self._length = machine, length
        self._progress = Progress(step=state.step, max_steps=length.max_steps, is_shown=is_shown)
        self.say = self._progress.say
        self._trackers = Trackers(accelerator, plain_settings(settings), warn=self.say)
        self._spikes = SpikeWatch()
        self._records: list[StepRecord] = []
        self._stopwatch = Stopwatch()
        self._elapsed_before, self._began = state.elapsed_seconds, time.monotonic()
        self._first_step, self._marked = state.step, self._began
        self.spent: dict[str, TimeSpent] = {}  # by activity, in this start

    def begin(self, state: TrainState, chosen: str, parameters: int, validation_rows: int) -> None:
        """Say and note that training starts or goes on; `chosen` is where and how it computes."""
        machine, processes = self._machine, self._accelerator.num_processes
        batch = describe_batch(self._length.settings, processes)
        if self._accelerator.is_main_process:  # accelerator.print would say it on every machine
            print(
                f"{chosen}\n{parameters:,} parameters; {batch}.\n"
                f"MFU is relative to {machine.peak_flops / 1e12:,.3g} TFLOP/s ({machine.peak_source})."
            )
        begins = f"Going on from step {state.step:,}" if state.step else "A new run"
        self.say(f"{begins} in {self._run.path}.")
        self.event(
            "resumed" if state.step else "started",
            step=state.step,
            elapsed_seconds=round(state.elapsed_seconds, 3),
            processes=processes,
            machines=processes // int(os.environ.get("LOCAL_WORLD_SIZE", processes)),
            sharding=self._accelerator.distributed_type.value,
            parameters=parameters,
            validation_rows=validation_rows,
            device=machine.device,
            peak_tflops=round(machine.peak_flops / 1e12, 3),
            peak_source=machine.peak_source,
            flops_per_token=machine.flops_per_token,
            command=sys.argv,
            versions={"torch": torch.__version__, "transformers": transformers.__version__},
        )

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
        numbers = torch.stack([loss.float(), gradient_norm.float(), is_skipped, *shares.float()])
        self._records.append(StepRecord(state.step, learning_rate, numbers, tokens))

    def flush(self, state: TrainState) -> None:
        """Write the metrics of all steps since the last flush, and bring `state`'s counts up to date.

        Raises:
            SettingsError: if too many steps in a row were not finite.
        """
        last = self._write(state)
        if last is not None and state.skipped_in_a_row >= self._settings.max_skipped_steps:
            raise SettingsError(self._diverged(state, *last))

    def _write(self, state: TrainState) -> tuple[int, list[float]] | None:
        """`flush` without the judgement; returns the last step and its shares of the loss, if any."""
        if not self._records:
            return None
        records, self._records = self._records, []
        numbers = torch.stack([record.numbers for record in records]).tolist()
        tokens_of_steps = torch.stack([record.tokens for record in records]).tolist()
        self._mark("training")  # after the wait: until here the device was busy with these steps
        speed = self._stopwatch.tokens_per_second(sum(tokens_of_steps))
        state.elapsed_seconds = self._elapsed_before + time.monotonic() - self._began
        state.skipped_steps, state.skipped_in_a_row = self._guard.read()
        mfu, spend = self._machine.mfu(speed), self._machine.spend_usd(state.elapsed_seconds)
        costs = {"spend_usd": round(spend, 4)} if spend else {}
        lines = []
        for record, tokens, (loss, gradient_norm, is_skipped, *_) in zip(
            records, tokens_of_steps, numbers, strict=True
        ):
            state.tokens += tokens
            line = {
                "step": record.step,
                "tokens": state.tokens,
                "loss": loss,
                "learning_rate": record.learning_rate,
                "gradient_norm": gradient_norm,
                "tokens_per_second": round(speed, 1),
                "mfu": round(mfu, 4),
                "elapsed_seconds": round(state.elapsed_seconds, 3),
                **costs,
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
        max_steps = self._length.max_steps
        seconds = (time.monotonic() - self._began) / max(1, state.step - self._first_step)
        parts = [
            f"loss {numbers[-1][0]:.4f}",
            f"learning rate {records[-1].learning_rate:.2e}",
            f"gradient norm {numbers[-1][1]:.2f}",
            f"{speed:,.0f} tokens/s",
            f"MFU {mfu:.1%}",
            f"{in_words((max_steps - state.step) * seconds)} left",
            *([f"{spend:,.2f} USD"] if spend else []),
        ]
        self._progress.show(state.step, max_steps, ", ".join(parts))
        self._stopwatch.restart()
        return records[-1].step, numbers[-1][3:]

    def _diverged(self, state: TrainState, last_step: int, shares: list[float]) -> str:
        """The message that ends a run whose steps are not finite. Every process calls this."""
        rank, world_size = self._accelerator.process_index, self._accelerator.num_processes
        rows = self._settings.micro_batch_size
        rows_of_step = rows * len(shares) * world_size
        first_row = state.rows - rows_of_step
        mine = [
            first_row + (number * world_size + rank) * rows
            for number, share in enumerate(shares)
            if not math.isfinite(share)
        ]
        bad = sorted(gather_object(mine)) if world_size > 1 else mine
        if bad:
            rows_in_words = self._describe_rows(bad[0], rows)
            where = f"The first bad micro-batch of step {last_step:,} is {rows_in_words}."
        else:
            named = min(rows_of_step, ROWS_NAMED)
            others = f", and {rows_of_step - named:,} more" if rows_of_step > named else ""
            where = (
                f"The losses were finite: it was the gradients that were not. Step {last_step:,} read "
                f"{rows_of_step:,} rows from position {first_row:,} of the data's order: "
                f"{self._describe_rows(first_row, named)}{others}."
            )
        return (
            f"loss or gradients were not finite in {state.skipped_in_a_row} steps in a row, the last being "
            f"step {last_step:,}; none of them changed the weights. {where} The same command goes on "
            "from the newest checkpoint, which is good. If it ends here again, look at that data; if it ends "
            "elsewhere, lower the learning rate."
        )

    def validation(self, state: TrainState, result: Any, averaged: Any = None) -> None:
        """A validation's result: `loss` and `bits_per_byte`; `state` remembers the loss, by which the best
        checkpoint is found.

        `averaged` is that of the averaged weights, where an average is kept.
        """
        self._mark("validation")
        state.validation_loss, state.validation_step = result.loss, state.step
        line = {
            "step": state.step,
            "tokens": state.tokens,
            "validation_loss": result.loss,
            "bits_per_byte": result.bits_per_byte,
        }
        text = f"validation loss {result.loss:.4f} nats/token"
        if result.bits_per_byte is not None:
            text += f", {result.bits_per_byte:.4f} bits/byte"
        if averaged is not None:
            line["averaged_validation_loss"] = averaged.loss
            text += f"; with averaged weights {averaged.loss:.4f}"
        self._run.append_metrics([line])
        self._trackers.log(
            {name: value for name, value in line.items() if name not in ("step", "tokens")}, state.step
        )
        self.say(f"step {state.step:,}: {text}")
        self._write_page()

    def hellaswag(self, state: TrainState, accuracy: float | None, questions: int) -> None:
        """The part of `questions` answered rightly, lm-evaluation-harness's `acc_norm`; None if unknown."""
        self._mark("hellaswag")
        if accuracy is None:
            return
        line = {
            "step": state.step,
            "tokens": state.tokens,
            "hellaswag_acc_norm": accuracy,
            "hellaswag_questions": questions,
        }
        self._run.append_metrics([line])
        self._trackers.log({"hellaswag_acc_norm": accuracy}, state.step)
        self.say(f"step {state.step:,}: HellaSwag {accuracy:.2%} of {questions:,} questions (acc_norm)")

    def saved(self) -> None:
        """A checkpoint was taken; it may still be on its way to the disk."""
        self._mark("checkpoints")

    def samples(self, state: TrainState, texts: list[str] | None) -> None:
        """Show and keep what the model writes after each prompt of the settings; None is nothing."""
        self._mark("samples")
        if texts is None:
            return
        written = list(zip(self._settings.sample_prompts, texts, strict=True))
        self._run.append_samples([{"step": state.step, "prompt": p, "text": t} for p, t in written])
        for prompt, text in written:
            self.say(f"  | {prompt}{text}".replace("\n", "\n  | "))

    def resume_clock(self) -> None:
        """Training goes on after something else: that time does not count as training's."""
        self._stopwatch.restart()
        self._marked = time.monotonic()

    def _mark(self, activity: str) -> None:
        """What was done since the last mark was `activity`."""
        now = time.monotonic()
        self.spent.setdefault(activity, TimeSpent()).add(now - self._marked)
        self._marked = now

    def end(self, event: str, state: TrainState, reason: str) -> None:
        """Note how training ended, where the time went, and how much memory it took."""
        seconds = {activity: round(spent.seconds, 3) for activity, spent in self.spent.items()}
        last = {activity: round(spent.last_seconds, 3) for activity, spent in self.spent.items()}
        self.event(
            event,
            step=state.step,
            reason=reason,
            seconds=seconds,
            last_seconds=last,
            peak_memory_bytes=peak_memory(self._accelerator.device),
        )
        self._write_page()

    def _write_page(self) -> None:
        """Bring report.html up to date. A page that cannot be written is no reason to stop."""
        if not self._accelerator.is_main_process or self._settings.plan:
            return
        try:
            write_page(self._run.path)
        except (OSError, ValueError) as error:
            self.say(f"The page of the run was not written: {error}")

    def event(self, event: str, **details: Any) -> None:
        """See `RunDirectory.append_event`."""
        self._run.append_event(event, **details)

    def close(self) -> None:
        """Write what is left when an error ends the run, leave the bar as it is, and let trackers finish."""
        with suppress(Exception):  # a device that failed gives no numbers: its own error is the one to show
            self._write(self._state)
        self._run.close()
        self._trackers.close()
        self._progress.close()
