"""The learning rate as a pure function of the step."""

import math
from typing import Protocol


class ScheduleSettings(Protocol):
    """The settings that the schedule reads."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def final_learning_rate_ratio(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def max_steps(self) -> int: ...


def learning_rate_at(step: int, settings: ScheduleSettings) -> float:
    """Rate for the update that takes the weights from `step` to `step + 1`.

    Linear from `learning_rate / warmup_steps` up to `learning_rate`, then half a cosine down to
    `final_learning_rate_ratio` of it, reached at the last update. There is no state to save or to advance: a
    scheduler object that Accelerate prepares moves `num_processes` times per step.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    final = settings.learning_rate * settings.final_learning_rate_ratio
    decay_steps = max(1, settings.max_steps - 1 - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / decay_steps)
    return final + (settings.learning_rate - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
