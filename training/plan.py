"""What a run would take, from some of its own steps: `train_accelerate.py --plan`."""

import dataclasses
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import Dataset

from training.checkpoint import TrainState
from training.device import choose_compilation, start_processes
from training.memory import TensorBytes, available_memory, local_bytes, peak_memory
from training.micro_batch import with_largest_micro_batch
from training.objective import count_targets, language_modeling_loss
from training.recipe import TrainSettings, describe_batch, micro_batches_per_process
from training.run_directory import EVENTS_FILE, METRICS_FILE, on_main_process
from training.settings import SettingsError
from training.start import count_parameters
from training.throughput import in_words
from training.weights import bare_model

# Of a micro-batch the first forward compiles, and the first updates make the optimizer's state.
UNTIMED_STEPS = 3
# Fewer are not all of memory: gradients of the first wait while the second is computed.
MOST_MICRO_BATCHES = 2
# Bytes a parameter: weights, gradients and AdamW's two moments in float32.
BYTES_PER_PARAMETER = 16
MB, GB = 1e6, 1e9


class StandInBlocks(Dataset):
    """Random blocks in place of shards that are not there yet: arithmetic takes as long on any tokens."""

    fingerprint = "stand-in"

    def __init__(self, vocabulary: int, block_size: int):
        self._vocabulary, self._block_size = vocabulary, block_size

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        input_ids = torch.randint(
            self._vocabulary, (self._block_size,), generator=torch.Generator().manual_seed(index)
        )
        return {"input_ids": input_ids, "labels": input_ids}


@dataclass(frozen=True)
class Plan:
    """Numbers of a run that was not started. Bytes are those of one process, times of the whole run."""

    parameters: int
    processes: int
    sharding: str
    steps: int
    tokens: int
    flops: float
    memory_bytes: dict[str, float]
    memory_available_bytes: float
    seconds_per_step: float
    tokens_per_second: float
    mfu: float
    seconds: dict[str, float]
    price_per_hour_usd: float

    @property
    def total_memory_bytes(self) -> float:
        return sum(self.memory_bytes.values())

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def total_usd(self) -> float:
        return self.total_seconds / 3600 * self.price_per_hour_usd


def plan_or_run(
    settings: TrainSettings,
    build: Callable[[], nn.Module],
    run: Callable[[TrainSettings, nn.Module], TrainState],
    script: str,
) -> None:
    """`run(settings, build())`, or what `--plan` and `--find_micro_batch_size` make of it.

    `script` is the file that was started, to start trials of it. Every process calls this.

    Raises:
        SettingsError: as `run`; also if the memory does not suffice.
    """
    if settings.find_micro_batch_size:
        settings = with_largest_micro_batch(settings, script)
    try:
        if settings.plan:
            print_plan(settings, build, run)
        else:
            run(settings, build())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise SettingsError(
            f"micro_batch_size={settings.micro_batch_size:,} does not fit the memory ({str(error)[:200]}). "
            + nearest_that_fits(settings)
        ) from error


def print_plan(
    settings: TrainSettings,
    build: Callable[[], nn.Module],
    run: Callable[[TrainSettings, nn.Module], TrainState],
) -> None:
    """Try some steps of the run, in a folder that is thrown away, and say what all of it would take.

    The run's own directory is not looked at. Every process calls this.

    Raises:
        SettingsError: if the run cannot work, with the nearest that can.
    """
    processes = start_processes()
    micro_batches_per_process(settings, processes.num_processes)
    with torch.device("meta"):
        parameters = count_parameters(build())
    _refuse_what_is_too_large(parameters, processes)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(broadcast_object_list([folder])[0], "run")
        probe = probe_settings(settings, processes.num_processes, processes.device, run_dir)
        state = run(probe, build())
        parts = memory_parts(state, probe, processes.device)
        plans: list[Plan] = []
        on_main_process(processes, lambda: plans.append(_plan(settings, probe, run_dir, parts, parameters)))
        if not processes.is_main_process:
            return
    plan = plans[0]
    if settings.plan_output:
        numbers = dataclasses.asdict(plan) | {"total_memory_bytes": plan.total_memory_bytes}
        numbers |= {"total_seconds": plan.total_seconds, "total_usd": plan.total_usd}
        Path(settings.plan_output).write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    print(in_a_table(plan, settings))
    if plan.total_memory_bytes > plan.memory_available_bytes:
        raise SettingsError(
            f"the run would need {plan.total_memory_bytes / GB:,.2f} GB of "
            f"{plan.memory_available_bytes / GB:,.2f} GB. {nearest_that_fits(settings)}"
        )


def probe_settings(
    settings: TrainSettings, processes: int, device: torch.device, run_dir: Path
) -> TrainSettings:
    """Settings of a short run whose steps take memory as those of `settings`, and time in proportion."""
    unit = settings.micro_batch_size * settings.block_size * processes
    micro_batches = min(MOST_MICRO_BATCHES, settings.batch_tokens // unit)
    steps, never = settings.plan_steps, 10**9
    return dataclasses.replace(
        settings,
        plan=True,
        run_dir=str(run_dir),
        max_steps=steps,
        warmup_steps=min(settings.warmup_steps, steps),
        batch_tokens=unit * micro_batches,
        compile=choose_compilation(device, settings).value,  # which looks at the length of the run
        eval_tokens=min(settings.eval_tokens, MOST_MICRO_BATCHES * unit),
        eval_every_steps=never,
        sample_every_steps=never,
        hellaswag_every_steps=never,
        hellaswag_limit=min(settings.hellaswag_limit, 20 * processes),
        save_every_steps=never,
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


def _plan(
    settings: TrainSettings, probe: TrainSettings, run_dir: Path, parts: dict[str, float], parameters: int
) -> Plan:
    lines = [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]
    events = [json.loads(line) for line in (run_dir / EVENTS_FILE).read_text().splitlines()]
    started, ended = events[0], events[-1]

    def seconds_of(line: dict[str, Any]) -> float:
        return probe.batch_tokens / line["tokens_per_second"]

    steps = [line for line in lines if "loss" in line]
    timed = steps[min(UNTIMED_STEPS, len(steps) - 1) :]
    # The middle: one step that something else on the machine disturbed says nothing about the run.
    per_probe_step = statistics.median(map(seconds_of, timed))
    per_step = per_probe_step * settings.batch_tokens / probe.batch_tokens
    processes, seconds = started["processes"], ended["seconds"]
    whole_set = started["validation_rows"] * settings.block_size
    wanted = settings.max_steps
    if settings.budget_tokens:
        wanted = min(wanted, settings.budget_tokens // settings.batch_tokens)

    def times(every: int) -> int:
        return math.ceil(wanted / every)

    in_all = {
        "training": wanted * per_step,
        "validation": times(settings.eval_every_steps)
        * seconds.get("validation", 0.0)
        * min(settings.eval_tokens, whole_set)
        / min(probe.eval_tokens, whole_set),
        "samples": times(settings.sample_every_steps) * seconds.get("samples", 0.0),
        "HellaSwag": times(settings.hellaswag_every_steps)
        * seconds.get("hellaswag", 0.0)
        * settings.hellaswag_limit
        / probe.hellaswag_limit,
        # What they took beyond the others: compilation, memory that is asked for once.
        "the first steps": sum(seconds_of(line) - per_probe_step for line in steps[:UNTIMED_STEPS]),
    }
    speed = settings.batch_tokens / per_step
    peak = started["peak_tflops"] * 1e12
    device = start_processes().device
    return Plan(
        parameters=parameters,
        processes=processes,
        sharding=str(Accelerator().distributed_type.value),
        steps=wanted,
        tokens=wanted * settings.batch_tokens,
        flops=started["flops_per_token"] * wanted * settings.batch_tokens,
        memory_bytes=parts,
        memory_available_bytes=available_memory(device),
        seconds_per_step=per_step,
        tokens_per_second=speed,
        mfu=speed * started["flops_per_token"] / peak,
        seconds={what: max(0.0, took) for what, took in in_all.items() if took > 0},
        price_per_hour_usd=settings.price_per_gpu_hour_usd * processes,
    )


def in_a_table(plan: Plan, settings: TrainSettings) -> str:
    """The plan for a person to read."""
    end = datetime.now(timezone.utc) + timedelta(seconds=min(plan.total_seconds, 1e9))
    length = dataclasses.replace(settings, max_steps=plan.steps)
    share = plan.total_memory_bytes / plan.memory_available_bytes
    lines = [
        "",
        f"{plan.parameters:,} parameters; {describe_batch(length, plan.processes)}.",
        f"{plan.tokens:,} tokens ({plan.tokens / plan.parameters:.3g} a parameter), {plan.flops:.3g} FLOPs; "
        f"{plan.processes} process{'es' if plan.processes > 1 else ''}, {plan.sharding}.",
        "",
        "Memory of a process",
        *(f"  {what:<28}{size / MB:>12,.1f} MB" for what, size in plan.memory_bytes.items()),
        f"  {'in all':<28}{plan.total_memory_bytes / MB:>12,.1f} MB, {share:.0%} of "
        f"{plan.memory_available_bytes / GB:,.2f} GB that are available",
        "",
        f"Time, at {plan.seconds_per_step:.3g} s a step: {plan.tokens_per_second:,.0f} tokens/s, "
        f"MFU {plan.mfu:.1%}",
        *(f"  {what:<28}{in_words(took):>15}" for what, took in plan.seconds.items()),
        f"  {'in all':<28}{in_words(plan.total_seconds):>15}; started now, it would end on "
        f"{end:%d %B %Y at %H:%M} UTC",
    ]
    if plan.price_per_hour_usd:
        lines += ["", f"Money: {plan.total_usd:,.2f} USD at {plan.price_per_hour_usd:,.2f} USD an hour"]
        if settings.budget_usd and plan.total_usd > settings.budget_usd:
            steps = int(plan.steps * settings.budget_usd / plan.total_usd)
            lines.append(f"  budget_usd={settings.budget_usd:,.2f} pays for about {steps:,} of the steps")
    return "\n".join(lines)


def _refuse_what_is_too_large(parameters: int, processes: Any) -> None:
    """Before anything is allocated: weights, gradients and moments alone."""
    available = available_memory(processes.device)
    needed = BYTES_PER_PARAMETER * parameters
    # Not asked of an Accelerator: the first one settles the precision of all.
    is_sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if needed / (processes.num_processes if is_sharded else 1) > available:
        least = math.ceil(needed / (0.8 * available))
        raise SettingsError(
            f"{parameters:,} parameters need {needed / GB:,.1f} GB for weights, gradients and AdamW's "
            f"moments alone, and a process has {available / GB:,.1f} GB. Nearest that can work: FSDP2 over "
            f"{least:,} such devices (accelerate_configs/fsdp2.yaml), or a model of "
            f"{int(0.8 * available / BYTES_PER_PARAMETER):,} parameters."
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says, in the words of one of torch's allocators, that memory ran out."""
    words = str(error).lower()
    says_so = "memory" in words and ("alloc" in words or "out of" in words)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or says_so


def nearest_that_fits(settings: TrainSettings) -> str:
    """What to try instead."""
    smaller = settings.micro_batch_size // 2
    rows = f"--micro_batch_size {smaller}" if smaller else "a smaller model or --block_size"
    more = "" if settings.activation_checkpointing else ", or --activation_checkpointing"
    return (
        f"Try {rows} (the same steps in smaller pieces){more}; --find_micro_batch_size finds the largest "
        "that fits."
    )
