"""What a run would take, from some of its own steps: `train_accelerate.py --plan`."""

import contextlib
import copy
import dataclasses
import gc
import io
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import Dataset

from training.checkpoint import TrainState
from training.device import start_processes
from training.memory import DOES_NOT_FIT, available_memory, says_out_of_memory
from training.micro_batch import with_largest_micro_batch
from training.probe import (
    MOST_MICRO_BATCHES,
    UNTIMED_STEPS,
    Probe,
    memory_parts,
    probe_settings,
    read_probe,
    seconds_of_a_step,
)
from training.recipe import TrainSettings, describe_batch, micro_batches_per_process
from training.run_directory import on_main_process
from training.settings import OwnSettingsError, SettingsError
from training.sharding import is_sharding_asked_for
from training.start import count_parameters
from training.throughput import in_words

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

    `script` is the file that was started, to start trials of it. `build` may be called more than once, and
    may give the same model again. Every process calls this.

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
        raise OwnSettingsError(
            f"micro_batch_size={settings.micro_batch_size:,} {DOES_NOT_FIT} ({str(error)[:200]}). "
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
    accumulation = micro_batches_per_process(settings, processes.num_processes)
    _check_output(settings.plan_output)
    with torch.device("meta"):
        model = build()
    parameters = count_parameters(model)
    _refuse_what_is_too_large(model, settings, processes)
    has_single = accumulation > MOST_MICRO_BATCHES and settings.plan_steps > UNTIMED_STEPS
    # A model that was loaded and not built comes back the same, and FSDP2 shards what it gets: only once.
    is_same = not next(model.parameters()).is_meta
    spare = copy.deepcopy(model) if is_same and has_single and is_sharding_asked_for() else None
    del model
    plans: list[Plan] = []
    with tempfile.TemporaryDirectory() as folder:
        here = Path(broadcast_object_list([folder])[0])
        of = partial(probe_settings, settings, processes.num_processes, processes.device)
        probe = of(here / "run", micro_batches=min(MOST_MICRO_BATCHES, accumulation), looks=True)
        state = run(probe, build())
        parts = memory_parts(state, probe, processes.device)
        if has_single:  # the other point of a straight line
            del state
            gc.collect()
            with contextlib.redirect_stdout(io.StringIO()):  # the first has said it all
                run(of(here / "single", micro_batches=1, looks=False), build() if spare is None else spare)

        def plan_all() -> None:
            single = read_probe(here / "single") if has_single else None
            plans.append(_plan(settings, probe, read_probe(here / "run"), single, parts, parameters))

        on_main_process(processes, plan_all)
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
            f"micro_batch_size={settings.micro_batch_size:,} {DOES_NOT_FIT}: the run would need "
            f"{plan.total_memory_bytes / GB:,.2f} GB of {plan.memory_available_bytes / GB:,.2f} GB. "
            + nearest_that_fits(settings)
        )


def _plan(
    settings: TrainSettings,
    probe_is: TrainSettings,
    probe: Probe,
    single: Probe | None,
    parts: dict[str, float],
    parameters: int,
) -> Plan:
    """The numbers of the run of `settings`, from a probe with the settings `probe_is`, and one of a single
    micro-batch a step where the run has more than the probe.
    """
    started = probe.started
    processes = started["processes"]
    larger = settings.batch_tokens // probe_is.batch_tokens  # than the probe's batch
    per_step = probe.seconds_per_step * larger
    if single is not None:
        accumulation = micro_batches_per_process(settings, processes)
        per_step = seconds_of_a_step(accumulation, single.seconds_per_step, probe.seconds_per_step)
    whole_set = started["validation_rows"] * settings.block_size
    wanted = settings.max_steps
    if settings.budget_tokens:
        wanted = min(wanted, settings.budget_tokens // settings.batch_tokens)

    def times(every: int) -> int:
        return math.ceil(wanted / every)

    in_all = {
        "training": wanted * per_step,
        "validation": times(settings.eval_every_steps)
        * probe.seconds_of("validation")
        * min(settings.eval_tokens, whole_set)
        / min(probe_is.eval_tokens, whole_set),
        "samples": times(settings.sample_every_steps) * probe.seconds_of("samples"),
        "HellaSwag": times(settings.hellaswag_every_steps)
        * probe.seconds_of("hellaswag")
        * settings.hellaswag_limit
        / probe_is.hellaswag_limit,
        "compilation, first calls": probe.first_seconds,
    }
    tokens_per_step = probe.tokens_per_step * settings.batch_tokens / probe_is.batch_tokens
    speed = tokens_per_step / per_step
    peak = started["peak_tflops"] * 1e12
    device = start_processes().device
    return Plan(
        parameters=parameters,
        processes=processes,
        sharding=str(Accelerator().distributed_type.value),
        steps=wanted,
        tokens=round(wanted * tokens_per_step),
        flops=started["flops_per_token"] * wanted * tokens_per_step,
        memory_bytes=parts,
        memory_available_bytes=available_memory(device),
        seconds_per_step=per_step,
        tokens_per_second=speed,
        mfu=speed * started["flops_per_token"] / peak,
        seconds={what: took for what, took in in_all.items() if took > 0},
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


def _check_output(output: str) -> None:
    """Better known before the steps are taken than after."""
    path = Path(output)
    if output and (path.is_dir() or not path.parent.is_dir()):
        what = f"{path} is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise SettingsError(f"--plan_output {output} cannot be written: {what}")


def _refuse_what_is_too_large(model: nn.Module, settings: TrainSettings, processes: Any) -> None:
    """Before anything is allocated: weights, and of those that are trained gradients and moments, alone."""
    available = available_memory(processes.device)
    # A matrix under Muon has one moment.
    kept = 3 if settings.optimizer == "muon" else 4
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    needed = sum(size * kept if is_trained else size for size, is_trained in sizes)
    # Not asked of an Accelerator: the first one settles the precision of all.
    if needed / (processes.num_processes if is_sharding_asked_for() else 1) > available:
        least = math.ceil(needed / (0.8 * available))
        raise SettingsError(
            f"{count_parameters(model):,} parameters need {needed / GB:,.1f} GB for weights, gradients and "
            f"the optimizer's moments alone, and a process has {available / GB:,.1f} GB. Nearest that can "
            f"work: FSDP2 over {least:,} such devices (accelerate_configs/fsdp2.yaml), or a model of "
            f"{int(0.8 * available / BYTES_PER_PARAMETER):,} parameters."
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says, in the words of one of torch's allocators, that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or says_out_of_memory(str(error))


def nearest_that_fits(settings: TrainSettings) -> str:
    """What to try instead."""
    smaller = settings.micro_batch_size // 2
    rows = f"--micro_batch_size {smaller}" if smaller else "a smaller model or --block_size"
    more = "" if settings.activation_checkpointing else ", or --activation_checkpointing"
    return (
        f"Try {rows} (the same steps in smaller pieces){more}; --find_micro_batch_size finds the largest "
        "that fits."
    )
