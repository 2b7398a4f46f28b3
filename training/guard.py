"""A non-finite loss or gradient never reaches the weights, and finding one costs no wait for the device."""

import statistics
from collections import deque

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training.settings import SettingsError

# Where the fused optimizer heeds `found_inf`. On MPS it takes the flag and updates all the same.
DEVICES_THAT_SKIP = ("cpu", "cuda")
SPIKE_WINDOW_STEPS = 64
# Median absolute deviations; of normally distributed losses, three in a hundred million are so far up.
SPIKE_SPREADS = 8.0


class StepGuard:
    """Counts non-finite steps and makes the optimizer skip them, all on the device.

    The fused optimizer looks at its `found_inf` (a float32 0-d tensor) and leaves weights, moments and step
    counts as they are where it is 1: the flag that fp16's GradScaler uses. The host learns of it when it next
    reads the counts. On devices other than DEVICES_THAT_SKIP the host waits for the flag, at every step.
    """

    def __init__(self, device: torch.device, skipped_steps: int = 0, skipped_in_a_row: int = 0):
        # total, in a row now
        self._counts = torch.tensor([skipped_steps, skipped_in_a_row], dtype=torch.float32, device=device)
        self._device_skips = device.type in DEVICES_THAT_SKIP

    def check(self, optimizer: AcceleratedOptimizer, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """Arm the optimizer's next step; returns 1.0 (skipped) or 0.0, a 0-d tensor.

        `loss` and `gradient_norm` are 0-d and the same on every process, so that all skip or none.
        """
        is_bad = 1.0 - (torch.isfinite(loss) & torch.isfinite(gradient_norm)).float()
        total, in_a_row = self._counts
        self._counts = torch.stack([total + is_bad, (in_a_row + 1.0) * is_bad])
        if not self._device_skips:
            if is_bad.item():
                optimizer.optimizer.zero_grad()  # without gradients a step changes nothing
        elif optimizer.scaler is None:
            optimizer.optimizer.found_inf = is_bad
        else:
            # A GradScaler sets the flag itself, from what clipping has let it see: this process's gradients.
            for found_inf in optimizer.scaler._found_inf_per_device(optimizer.optimizer).values():
                found_inf.copy_(torch.maximum(found_inf, is_bad))
        return is_bad

    def read(self) -> tuple[int, int]:
        """Skipped steps in total and in a row up to now. Waits for the device."""
        total, in_a_row = self._counts.tolist()
        return int(total), int(in_a_row)


def check_weights(accelerator: Accelerator, model: nn.Module, step: int) -> None:
    """Look at every weight before the model is asked for text: NaN logits crash sampling, on a GPU for good.

    Raises:
        SettingsError: on every process, if any process holds a weight that is not finite.
    """
    parameters = [parameter.detach() for parameter in model.parameters()]
    local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    bad = torch.stack([(~torch.isfinite(tensor)).sum() for tensor in local]).sum()
    count = int(accelerator.reduce(bad, "sum").item())
    if count:
        raise SettingsError(
            f"{count:,} weights are not finite after step {step:,}. They were not saved: the same command "
            "goes on from the newest checkpoint, which is good. If it ends here again, lower learning_rate."
        )


class SpikeWatch:
    """Notices a spike: a loss above the median of the last SPIKE_WINDOW_STEPS finite ones by more than
    SPIKE_SPREADS times their median distance from it. Medians, because one spike must not hide the next.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=SPIKE_WINDOW_STEPS)

    def is_spike(self, loss: float) -> bool:
        """Whether `loss`, finite and in nats/token, is a spike; either way it counts among the last steps."""
        is_spike = False
        if len(self._recent) == SPIKE_WINDOW_STEPS:
            usual = statistics.median(self._recent)
            spread = statistics.median(abs(recent - usual) for recent in self._recent)
            is_spike = loss > usual + SPIKE_SPREADS * spread
        self._recent.append(loss)
        return is_spike
