"""How fast a run goes beside what its device can do, what it costs, and showing it."""

import functools
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from training.recipe import TrainSettings
from training.settings import SettingsError

# Without a terminal there is no bar; a line this often keeps a log file readable.
SECONDS_BETWEEN_LINES = 10.0

# Dense 16-bit matrix products, accumulated in float32, without sparsity; TFLOP/s. A pattern is the whole of a
# device's name: a laptop's, a "SUPER" of the same number, or a slice of a GPU (MIG) is another device.
# Where NVIDIA names no such rate for a GeForce, it follows from one that it does name: "Tensor TFLOPS" of the
# 30 series are sparse and summed in float16 (four times this), "AI TOPS" of the 40 series are sparse FP8
# (eight times), of the 50 series sparse FP4 (sixteen times). The devices of its whitepapers' tables agree.
PEAK_TFLOPS = (
    (r"(NVIDIA )?A100-(SXM4|PCIE)-(40|80)GB|NVIDIA A100 80GB PCIe", 312.0, "NVIDIA A100 datasheet"),
    (r"NVIDIA H100 PCIe", 756.0, "NVIDIA H100 datasheet, PCIe"),
    (r"NVIDIA H100 NVL", 835.5, "NVIDIA H100 datasheet, NVL"),
    (r"NVIDIA H100 80GB HBM3", 989.4, "NVIDIA H100 datasheet, SXM"),
    (r"NVIDIA H200 NVL", 835.5, "NVIDIA H200 datasheet, NVL"),
    (r"NVIDIA H200", 989.4, "NVIDIA H200 datasheet, SXM"),
    (r"NVIDIA GH200 (480|144)GB.*", 989.4, "NVIDIA GH200 datasheet"),
    (r"NVIDIA B200", 2250.0, "NVIDIA HGX B200 datasheet, an eighth of its 18 dense PFLOP/s"),
    (r"NVIDIA GB200", 2500.0, "NVIDIA GB200 NVL72 datasheet"),
    (r"NVIDIA L4", 121.0, "NVIDIA L4 datasheet"),
    (r"NVIDIA L40S", 362.05, "NVIDIA L40S datasheet"),
    (r"NVIDIA A10", 125.0, "NVIDIA A10 datasheet"),
    (r"(NVIDIA )?Tesla T4|NVIDIA T4", 65.0, "NVIDIA T4 datasheet, float16"),
    (r"(NVIDIA )?Tesla V100-SXM2-(16|32)GB", 125.0, "NVIDIA V100 datasheet, NVLink, float16"),
    (r"(NVIDIA )?Tesla V100-PCIE-(16|32)GB", 112.0, "NVIDIA V100 datasheet, PCIe, float16"),
    (r"(NVIDIA )?Tesla V100S-PCIE-32GB", 130.0, "NVIDIA V100 datasheet, V100S, float16"),
    (r"NVIDIA GeForce RTX 3060", 25.5, "NVIDIA's 102 Tensor TFLOPS, a quarter"),
    (r"NVIDIA GeForce RTX 3060 Ti", 32.5, "NVIDIA's 130 Tensor TFLOPS, a quarter"),
    (r"NVIDIA GeForce RTX 3070", 40.6, "NVIDIA Ampere GA102 whitepaper"),
    (r"NVIDIA GeForce RTX 3070 Ti", 43.5, "NVIDIA's 174 Tensor TFLOPS, a quarter"),
    (r"NVIDIA GeForce RTX 3080", 59.5, "NVIDIA Ampere GA102 whitepaper"),
    (r"NVIDIA GeForce RTX 3080 Ti", 68.2, "NVIDIA's 273 Tensor TFLOPS, a quarter"),
    (r"NVIDIA GeForce RTX 3090", 71.0, "NVIDIA Ampere GA102 whitepaper"),
    (r"NVIDIA GeForce RTX 3090 Ti", 80.0, "NVIDIA's 320 Tensor TFLOPS, a quarter"),
    (r"NVIDIA GeForce RTX 4060", 30.2, "NVIDIA's 242 AI TOPS, an eighth"),
    (r"NVIDIA GeForce RTX 4060 Ti", 44.1, "NVIDIA's 353 AI TOPS, an eighth"),
    (r"NVIDIA GeForce RTX 4070", 58.3, "NVIDIA's 466 AI TOPS, an eighth"),
    (r"NVIDIA GeForce RTX 4070 SUPER", 71.0, "NVIDIA's 568 AI TOPS, an eighth"),
    (r"NVIDIA GeForce RTX 4070 Ti", 80.2, "NVIDIA Ada whitepaper"),
    (r"NVIDIA GeForce RTX 4070 Ti SUPER", 88.2, "NVIDIA's 706 AI TOPS, an eighth"),
    (r"NVIDIA GeForce RTX 4080", 97.5, "NVIDIA Ada whitepaper"),
    (r"NVIDIA GeForce RTX 4080 SUPER", 104.5, "NVIDIA's 836 AI TOPS, an eighth"),
    (r"NVIDIA GeForce RTX 4090", 165.2, "NVIDIA Ada whitepaper"),
    (r"NVIDIA GeForce RTX 5060", 38.4, "NVIDIA's 614 AI TOPS, a sixteenth"),
    (r"NVIDIA GeForce RTX 5060 Ti", 47.4, "NVIDIA's 759 AI TOPS, a sixteenth"),
    (r"NVIDIA GeForce RTX 5070", 61.7, "NVIDIA RTX Blackwell whitepaper"),
    (r"NVIDIA GeForce RTX 5070 Ti", 87.9, "NVIDIA RTX Blackwell whitepaper"),
    (r"NVIDIA GeForce RTX 5080", 112.6, "NVIDIA RTX Blackwell whitepaper"),
    (r"NVIDIA GeForce RTX 5090", 209.5, "NVIDIA RTX Blackwell whitepaper"),
    (r"AMD Instinct MI300X.*", 1307.4, "AMD MI300X datasheet"),
    (r"AMD Instinct MI325X.*", 1307.4, "AMD MI325X datasheet"),
    (r"AMD Instinct MI300A.*", 980.6, "AMD MI300A datasheet"),
    # Apple names one rate, of float32, for the chips below and none for the others, which are measured.
    (r"Apple M1", 2.6, "Apple newsroom, November 2020"),
    (r"Apple M1 Pro", 5.2, "Apple newsroom, October 2021"),
    (r"Apple M1 Max", 10.4, "Apple newsroom, October 2021"),
    (r"Apple M1 Ultra", 21.0, "Apple newsroom, March 2022"),
    (r"Apple M2", 3.6, "Apple newsroom, June 2022"),
)
# What a device that is not in the table is measured in: what the run multiplies in, or the widest type with
# tensor cores below it, so that FP8 is told apart by its MFU as on a device that is in the table.
MEASURED_IN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


@dataclass(frozen=True)
class Machine:
    """What a run computes on, over all its processes, and what a token of its model costs.

    `peak_flops` are floating-point operations per second; `peak_source` says where that is from.
    """

    device: str
    processes: int
    peak_flops: float
    peak_source: str
    flops_per_token: float
    price_per_hour_usd: float = 0.0

    def mfu(self, tokens_per_second: float) -> float:
        """Model FLOPs utilisation: the part of `peak_flops` that the model's own arithmetic takes."""
        return tokens_per_second * self.flops_per_token / self.peak_flops

    def spend_usd(self, seconds: float) -> float:
        """Price of that much time on all devices."""
        return self.price_per_hour_usd * seconds / 3600


def describe_machine(accelerator: Accelerator, settings: TrainSettings, model: nn.Module) -> Machine:
    """The machine under `accelerator` for a model that is not yet sharded. Every process calls this."""
    device, processes = accelerator.device, accelerator.num_processes
    name = device_name(device)
    if settings.peak_tflops:
        peak, source = settings.peak_tflops * 1e12, "as asked with --peak_tflops"
    else:
        peak, source = peak_of(name)
    if not peak:
        dtype = MEASURED_IN.get(accelerator.mixed_precision, torch.float32)
        peak, what = measured_peak(device, dtype), str(dtype).removeprefix("torch.")
        known = (
            ""
            if device.type == "cpu"
            else "; it is not in the table of devices, --peak_tflops overrides this"
        )
        source = f"measured here by a matrix product in {what}{known}"
    # Each process measured what it can have beside the others.
    total = accelerator.reduce(torch.tensor(peak / 1e12, device=device), "sum").item() * 1e12
    price = settings.price_per_gpu_hour_usd * processes
    return Machine(name, processes, total, source, flops_per_token(model, settings.block_size), price)


def flops_per_token(model: nn.Module, block_size: int) -> float:
    """Forward and backward: 6 N + 12 L C T, or 4 for each parameter that is not trained.

    N parameters, each a multiplication and an addition forward, twice that backward; L layers of width C
    attending over T = `block_size` tokens (Chowdhery et al. 2022, appendix B).
    """
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    config = getattr(model, "config", None)
    layers = getattr(config, "num_hidden_layers", None) or 0
    width = getattr(config, "hidden_size", None) or 0
    return 4 * sum(p.numel() for p in parameters) + 2 * trained + 12 * layers * width * block_size


def peak_of(device: str) -> tuple[float, str]:
    """FLOP/s of a device by its name and their source; (0, "") for one that is not in the table."""
    for pattern, tflops, source in PEAK_TFLOPS:
        if re.fullmatch(pattern, device):
            return tflops * 1e12, source
    return 0.0, ""


@functools.cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of some square matrix products. Draws none of the run's random numbers.

    Raises:
        SettingsError: if the device does not multiply in `dtype`.
    """
    side = 1024 if device.type == "cpu" else 8192 if device.type == "cuda" else 2048
    try:
        # Not ones or zeros, whose bits do not change: a GPU that saves power on them clocks higher.
        own = torch.Generator(device).manual_seed(0)
        matrix = torch.randn(side, side, device=device, dtype=dtype, generator=own)
        best = float("inf")
        for _ in range(6):
            began = time.perf_counter()
            (matrix @ matrix)[0, 0].item()  # waits for the device
            best = min(best, time.perf_counter() - began)
    except RuntimeError as error:
        raise SettingsError(f"{device} could not be measured ({error}); give --peak_tflops") from error
    return 2 * side**3 / best


def device_name(device: torch.device) -> str:
    """The name by which the table knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        return asked.stdout.strip() or "mps"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"CPU ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"
    return device.type


@dataclass
class TimeSpent:
    """Seconds that one activity has taken: in all, and the last time it was done."""

    seconds: float = 0.0
    last_seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """It was done once more."""
        self.seconds += seconds
        self.last_seconds = seconds


class Stopwatch:
    """Tokens per second of training alone.

    What is spent on validation, samples and checkpoints is left out.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def restart(self) -> None:
        """Call when training goes on."""
        self._began = time.perf_counter()

    def tokens_per_second(self, tokens: int) -> float:
        """Of `tokens` since the last `restart`. Only right after the device has been waited for."""
        return tokens / max(time.perf_counter() - self._began, 1e-9)


class Progress:
    """A progress bar on a terminal, a line now and then elsewhere; silent where `is_shown` is false."""

    def __init__(self, *, step: int, max_steps: int, is_shown: bool):
        self._is_shown = is_shown
        self._last_line = 0.0
        self._bar = None
        if is_shown and sys.stderr.isatty():
            self._bar = tqdm(
                total=max_steps,
                initial=step,
                unit="step",
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )

    def show(self, step: int, max_steps: int, text: str) -> None:
        """The newest numbers of training."""
        if self._bar is not None:
            self._bar.n, self._bar.total = step, max_steps
            self._bar.set_postfix_str(text)
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.say(f"step {step:,} of {max_steps:,}: {text}")

    def say(self, text: str) -> None:
        """Print above the bar, unless there is nothing to say."""
        if self._is_shown and text:
            tqdm.write(text)
            sys.stdout.flush()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def in_words(seconds: float) -> str:
    """A duration as a person would say it: "45 s", "12 min", "3 h 20 min", "2 d 4 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
