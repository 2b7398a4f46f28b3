"""An exponential moving average of the weights, evaluated and exported beside them."""

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.weights import bare_model

T = TypeVar("T")

# Where the average lives in the optimizer's state; a checkpoint holds, cuts and restores it like a moment.
AVERAGE = "average"


class WeightAverage:
    """average <- decay x average + (1 - decay) x weights, after each step (Polyak & Juditsky 1992).

    The average of the last 1 / (1 - decay) steps or so: less noise than the last weights have at a high
    learning rate, little gain once the rate has come down. While a run is young the decay is lower,
    (1 + step) / (10 + step), so that the random start is soon forgotten. A `decay` of 0 keeps no average.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, decay: float
    ):
        self._accelerator, self._model, self._optimizer = accelerator, model, optimizer
        self._decay = decay

    def __bool__(self) -> bool:
        return self._decay > 0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as `step` updates have left them."""
        if not self:
            return
        decay = min(self._decay, (1 + step) / (10 + step))
        weights = self._weights()
        for weight in weights:
            if AVERAGE not in self._optimizer.state[weight]:
                self._optimizer.state[weight][AVERAGE] = weight.detach().clone()
        if weights:  # none before the first update, where a step that was not finite left no state at all
            torch._foreach_lerp_(self._averages(weights), weights, 1.0 - decay)

    def use(self, function: Callable[[], T]) -> T | None:
        """Call `function` while the model holds the average; then it has its own weights again, bit for bit.

        None, without a call, where no average is kept.
        """
        if not self:
            return None
        self._swap()
        try:
            return function()
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        bare_model(self._accelerator, self._model)  # weights that FSDP2 left gathered are sharded again
        weights = self._weights()
        for weight, average in zip(weights, self._averages(weights), strict=True):
            mine = weight.detach().clone()
            weight.copy_(average)
            average.copy_(mine)

    def _weights(self) -> list[Tensor]:
        """What the optimizer has begun to update: AdamW must find its own state empty at first."""
        optimizer = self._optimizer
        return [p for group in optimizer.param_groups for p in group["params"] if optimizer.state.get(p)]

    def _averages(self, weights: list[Tensor]) -> list[Tensor]:
        return [self._optimizer.state[weight][AVERAGE] for weight in weights]
