"""Some steps of a run, taken in a folder that is thrown away: what they took of memory and of time."""

import dataclasses
import json
import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from training.checkpoint import TrainState
from training.device import choose_compilation
from training.memory import TensorBytes, local_bytes, peak_memory
from training.objective import count_targets, language_modeling_loss
from training.recipe import TrainSettings
from training.run_directory import EVENTS_FILE, METRICS_FILE
from training.weights import bare_model

# Of a micro-batch the first forward compiles, and the first updates make the optimizer's state.
UNTIMED_STEPS = 3
# Fewer are not all of memory: gradients of the first wait while the second is computed.
MOST_MICRO_BATCHES = 2
# Of a validation: what is done once each time must not pass for a batch's.
EVAL_BATCHES = 8
QUESTIONS_PER_PROCESS = 20
NEVER = 10**9


@dataclass(frozen=True)
class Probe:
    """Seconds of each step, its tokens in the mean, and the events of its start and its end."""

    step_seconds: list[float]
    tokens_per_step: float
    started: dict[str, Any]
    ended: dict[str, Any]

    @property
    def seconds_per_step(self) -> float:
        """The middle: one step that something else on the machine disturbed says nothing about the run."""
        return statistics.median(self.step_seconds[min(UNTIMED_STEPS, len(self.step_seconds) - 1) :])

    @property
    def first_seconds(self) -> float:
        """What the first of everything took beyond the next: compilation, memory that is asked for once."""
        steps = sum(seconds - self.seconds_per_step for seconds in self.step_seconds[:UNTIMED_STEPS])
        # Each look was taken twice.
        looks = sum(
            self.ended["seconds"][look] - 2 * self.seconds_of(look)
            for look in ("validation", "samples", "hellaswag")
            if look in self.ended["seconds"]
        )
        return max(0.0, steps) + max(0.0, looks)

    def seconds_of(self, look: str) -> float:
        """The second validation, samples or HellaSwag; 0 where there were none."""
        return self.ended["last_seconds"].get(look, 0.0)


def probe_settings(
    settings: TrainSettings,
    processes: int,
    device: torch.device,
    run_dir: Path,
    *,
    micro_batches: int,
    looks: bool,
) -> TrainSettings:
    """Settings of a short run whose steps are those of `settings`, but for the number of micro-batches.

    With `looks`, the model is validated, sampled from and asked half-way and at the end.
    """
    unit = settings.micro_batch_size * settings.block_size * processes
    steps = settings.plan_steps
    half = (steps + 1) // 2 if looks else NEVER
    return dataclasses.replace(
        settings,
        plan=True,
        run_dir=str(run_dir),
        max_steps=steps,
        warmup_steps=min(settings.warmup_steps, steps),
        batch_tokens=unit * micro_batches,
        compile=choose_compilation(device, settings).value,  # which looks at the length of the run
        eval_tokens=min(settings.eval_tokens, EVAL_BATCHES * unit) if looks else 1,
        eval_every_steps=half,
        sample_every_steps=half,
        hellaswag_questions=settings.hellaswag_questions if looks else "",
        hellaswag_every_steps=half,
        hellaswag_limit=min(settings.hellaswag_limit, QUESTIONS_PER_PROCESS * processes),
        save_every_steps=NEVER,
        save_every_minutes=0,
        log_every_steps=1,
        log_with=(),
        max_minutes=0,
        fit_schedule=False,
        budget_tokens=0,
        budget_usd=0,
        early_stopping_evaluations=0,
        export_best=False,
        allow_change=False,
    )


def read_probe(run_dir: Path) -> Probe:
    """What the run in `run_dir` noted."""
    lines = [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]
    events = [json.loads(line) for line in (run_dir / EVENTS_FILE).read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    # A step's own tokens: rows that are not full have fewer than the batch's name says.
    tokens = [after - before for before, after in pairwise([0, *(step["tokens"] for step in steps)])]
    return Probe(
        step_seconds=[n / step["tokens_per_second"] for n, step in zip(tokens, steps, strict=True)],
        tokens_per_step=statistics.mean(tokens),
        started=events[0],
        ended=events[-1],
    )


def seconds_of_a_step(micro_batches: int, one: float, two: float) -> float:
    """A step of so many micro-batches, from one of one and one of two.

    What is done once a step, the update and the exchange of gradients, is in both and counts once.
    """
    if micro_batches == 1:
        return one
    # What is done once takes no less than nothing, whatever disturbed the clock.
    each = min(two - one, two / 2) if one < two else two / 2
    return two + (micro_batches - 2) * each


def memory_parts(state: TrainState, probe: TrainSettings, device: torch.device) -> dict[str, float]:
    """Bytes on the device at the peak of a step, by what they are for. Every process calls this.

    The whole is what the probe was seen to take; its parts are counted once more in one micro-batch.
    """
    peak = peak_memory(device)
    model = state.model
    weights = local_bytes(model.parameters()) + local_bytes(model.buffers())
    gradients = local_bytes(p for p in model.parameters() if p.requires_grad)
    moments = [value for values in state.optimizer.state.values() for value in values.values()]
    optimizer = local_bytes(moments)
    activations, loss = _of_a_micro_batch(model, probe, device)
    known = weights + gradients + optimizer + activations + loss
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations,
        "loss": loss,
        "Python, libraries, kernels": max(0.0, peak - known),
    }
    if device.type == "cpu":  # elsewhere the copy lies in the host's memory, not in the device's
        kept = [*model.parameters(), *model.buffers(), *moments]  # sharded or not, one process gathers all
        parts["copy for checkpoints"] = float(sum(t.numel() * t.element_size() for t in kept))
    return parts


def _of_a_micro_batch(model: nn.Module, probe: TrainSettings, device: torch.device) -> tuple[float, float]:
    """Bytes kept for the backward by the blocks, and what the loss takes at most on top."""
    bare = bare_model(Accelerator(), model)
    vocabulary = bare.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    rows = torch.zeros(probe.micro_batch_size, probe.block_size, dtype=torch.int64, device=device)
    batch = {"input_ids": rows % vocabulary, "labels": rows % vocabulary}
    counter, at_the_head = TensorBytes(), []
    counter.ignore([*model.parameters(), *model.buffers(), *batch.values()])
    # The last thing before the head is the backbone; a PEFT model keeps it one level deeper.
    inner = bare.get_base_model() if hasattr(bare, "get_base_model") else bare  # type: ignore[operator]
    handle = inner.base_model.register_forward_hook(  # type: ignore[union-attr, operator]
        lambda *_: at_the_head.append(counter.now)
    )
    model.train()
    try:
        with torch.compiler.set_stance("force_eager"), counter:
            loss = language_modeling_loss(model, batch, count_targets(batch).clamp(min=1))
    finally:
        handle.remove()
    del loss
    activations = at_the_head[0] if at_the_head else 0
    return float(activations), float(counter.peak - activations)
