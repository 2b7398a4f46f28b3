"""Where a run computes, in which precision, and whether compiled: chosen once, and said in one line."""

import ctypes
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import AORecipeKwargs, DistributedDataParallelKwargs, TorchDynamoPlugin
from accelerate.utils.imports import is_torchao_available
from torch import nn

from training.recipe import TrainSettings
from training.settings import OwnSettingsError, SettingsError
from training.sharding import is_sharding_asked_for, sharding_plugin
from training.trackers import check_trackers

# Below this, compiling (about a minute) costs more than it brings. On an H200 that is a third: fine-tuning
# 124M on the bundled rooms, 1e15, waited a minute there to save two seconds.
COMPILE_MINIMUM_FLOPS = {"cpu": 1e15, "cuda": 5e15}
# Parameters of glibc's mallopt (malloc.h), and the largest tensor that its heap takes, in bytes.
MALLOPT_TRIM_THRESHOLD, MALLOPT_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT_BYTES = 2**30
# NVIDIA's Ada, Hopper and later multiply in FP8, where both sides of a matrix divide by the multiple.
FP8_CAPABILITY = (8, 9)
FP8_MULTIPLE = 16


@dataclass(frozen=True)
class Choice:
    """One decision with its reason, for the line at the start."""

    value: str
    reason: str


def start_processes() -> PartialState:
    """Meet the other processes of this run, if there are any. Call it before the rest of Accelerate.

    Accelerate starts CPU processes as it starts GPU ones, but joins them only when told that this is the CPU.
    """
    return PartialState(cpu=_runs_on_cpu())


@contextmanager
def as_script() -> Iterator[None]:
    """Around all that a script does: a SettingsError ends it with its message, said once a machine, and exit
    code 1; and the processes part in peace.
    """
    try:
        yield
    except SettingsError as error:
        if isinstance(error, OwnSettingsError) or start_processes().is_local_main_process:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _runs_on_cpu() -> bool:
    asked = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1")
    return asked or not torch.accelerator.is_available()


def start_accelerator(settings: TrainSettings) -> tuple[Accelerator, str]:
    """The Accelerator of this run, and the line that says what was chosen and why.

    Accelerate's own gradient accumulation stays at 1: the loop owns accumulation, because a loss must be
    divided by the targets of the whole step.

    Raises:
        SettingsError: if the device cannot do what the settings ask for.
    """
    check_trackers(settings.log_with)
    device = start_processes().device
    if device.type == "cpu":
        torch.set_num_threads(settings.cpu_threads or _cores_per_process())
        keep_freed_memory()
    precision = choose_precision(device, settings.mixed_precision)
    compilation = choose_compilation(device, settings)
    dynamo = None
    if compilation.value != "none":
        dynamo = TorchDynamoPlugin(
            backend="inductor", use_regional_compilation=compilation.value == "regional"
        )
    if device.type == "cuda":
        # Products that stay in float32 may use TF32: ten bits of mantissa, eight times the speed.
        torch.set_float32_matmul_precision("high")
    if settings.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if precision.value == "fp8":
        handlers.append(fp8_recipe())
    accelerator = Accelerator(
        cpu=_runs_on_cpu(),
        mixed_precision=precision.value,
        gradient_accumulation_steps=1,
        log_with=list(settings.log_with) or None,
        project_dir=settings.run_dir,
        dynamo_plugin=dynamo,
        fsdp_plugin=sharding_plugin(precision.value),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=handlers,
    )
    processes = accelerator.num_processes
    line = (
        f"Running on {_name_of(device)}, {processes} process{'es' if processes > 1 else ''} "
        f"({accelerator.distributed_type.value}); precision {precision.value} ({precision.reason}); "
        f"torch.compile {compilation.value} ({compilation.reason})"
    )
    line += "; TF32 for what stays in float32." if device.type == "cuda" else "."
    if processes == 1 and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        line += (
            "\n`accelerate launch --cpu` was asked for several processes and started one; "
            "`--config_file accelerate_configs/ddp.yaml --num_processes N` starts N, on the CPU too."
        )
    if is_sharding_asked_for() and accelerator.distributed_type.value != "FSDP":
        line += (
            "\nFSDP was asked for, but Accelerate shards nothing on this device: training is data parallel."
        )
    return accelerator, line


def choose_precision(device: torch.device, wanted: str) -> Choice:
    """`no` (float32), `bf16`, `fp16` or `fp8`, from what the device has in hardware.

    Raises:
        SettingsError: if the device, or the software, cannot compute in the precision asked for.
    """
    if wanted == "fp8":
        _check_fp8(device)
    if wanted == "fp16" and device.type == "cpu":
        raise SettingsError("mixed_precision=fp16 is for GPUs; on a CPU choose bf16 or no")
    if wanted != "auto":
        return Choice(wanted, "as asked")
    if device.type == "cuda":
        if torch.cuda.get_device_capability() >= (8, 0):
            return Choice("bf16", "the GPU has it in hardware")
        return Choice("fp16", "the GPU has no bfloat16")
    if device.type == "cpu":
        if cpu_has_bfloat16():
            return Choice("bf16", "the CPU has it in hardware")
        return Choice("no", "the CPU would emulate bfloat16")
    return Choice("no", f"float32 is the safe choice on {device.type}")


def _check_fp8(device: torch.device) -> None:
    has_capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if has_capability < FP8_CAPABILITY:
        needed, has = (".".join(map(str, numbers)) for numbers in (FP8_CAPABILITY, has_capability))
        it_has = f", which has {has}" if device.type == "cuda" else ""
        raise SettingsError(
            f"mixed_precision=fp8 needs an NVIDIA GPU of compute capability {needed} or more (Ada, Hopper, "
            f"Blackwell); this run is on {_name_of(device)}{it_has}. "
            f"Choose {choose_precision(device, 'auto').value}, or auto."
        )
    if not is_torchao_available():
        raise SettingsError(
            "mixed_precision=fp8 computes with torchao: `pip install torchao`, or choose bf16."
        )


def fp8_recipe(*, emulate: bool = False) -> AORecipeKwargs:
    """Accelerate's recipe for products in FP8 through torchao.

    With `emulate`, numbers are rounded to FP8 but multiplied in another type: slow, for devices without.
    """
    from torchao.float8 import Float8LinearConfig

    # Gathering sharded weights in FP8 would wrap each parameter in a class of torchao's: the optimizer, built
    # before, would go on holding the old ones.
    config = Float8LinearConfig(pad_inner_dim=True, enable_fsdp_float8_all_gather=False, emulate=emulate)
    return AORecipeKwargs(config=config, module_filter_func=computes_in_fp8)


def computes_in_fp8(module: nn.Module, name: str) -> bool:
    """Linear layers whose sides divide by FP8_MULTIPLE; not the head, whose errors would be the loss's."""
    return (
        isinstance(module, nn.Linear)
        and module.in_features % FP8_MULTIPLE == 0
        and module.out_features % FP8_MULTIPLE == 0
        and name.rpartition(".")[2] != "lm_head"
    )


def choose_compilation(device: torch.device, settings: TrainSettings) -> Choice:
    """`none`, `whole` or `regional`.

    FSDP2 is compiled block by block. Compiled whole, Accelerate would hang the gathering of weights onto
    torch.compile's wrapper, and whoever calls the model inside it, as sampling does, would find them sharded.
    """
    if settings.compile == "none":
        return Choice("none", "as asked")
    if missing := _missing_compiler(device):
        asked = "" if settings.compile == "auto" else "it was asked for, but "
        return Choice("none", f"{asked}{missing}")
    if settings.compile != "auto":
        if settings.compile == "whole" and is_sharding_asked_for():
            return Choice("regional", "FSDP2 is compiled block by block, not whole as asked")
        return Choice(settings.compile, "as asked")
    if device.type not in COMPILE_MINIMUM_FLOPS:
        return Choice("none", f"not tried on {device.type}")
    parameters = 12 * settings.n_layer * settings.n_embd**2
    flops = 6 * parameters * settings.batch_tokens * settings.max_steps
    if flops <= COMPILE_MINIMUM_FLOPS[device.type]:
        return Choice("none", "a short run does not earn back the minute of compilation")
    if device.type == "cuda" and is_sharding_asked_for():
        return Choice("regional", "it pays on GPUs, and FSDP2 works block by block")
    return Choice("whole", "a long run earns the minute of compilation")


def _missing_compiler(device: torch.device) -> str:
    """What torch.compile would call on this device and not find, in words; empty if it is there."""
    if device.type == "cuda":  # Triton's launchers are C
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
        kind = "C"
    elif device.type == "cpu":  # kernels are C++
        usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        names = [os.environ.get("CXX", usual)]
        kind = "C++"
    else:
        return ""
    if any(map(shutil.which, names)):
        return ""
    return f"this machine has no {kind} compiler ({' or '.join(names)})"


def cpu_has_bfloat16() -> bool:
    """Linux says so in /proc/cpuinfo: `avx512_bf16`, `amx_bf16` on x86, `bf16` on ARM."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next ones. Elsewhere nothing happens.

    By itself it gives every tensor of some size back to the system, which hands the pages out again one fault
    at a time, filled with zeros: up to a third of a step (docs/performance.md).
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MALLOPT_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        mallopt(MALLOPT_TRIM_THRESHOLD, -1)  # never


def _cores_per_process() -> int:
    """This process's share of the cores that it may run on.

    `accelerate launch` leaves OMP_NUM_THREADS at 1 for a single process, so half of a laptop would idle.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return device.type
