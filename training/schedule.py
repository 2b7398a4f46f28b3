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
    @property
    def schedule(self) -> str: ...
    @property
    def cooldown_ratio(self) -> float: ...


def learning_rate_at(step: int, settings: ScheduleSettings) -> float:
    """Rate for the update that takes the weights from `step` to `step + 1`."""
    return settings.learning_rate * schedule_at(step, settings)


def schedule_at(step: int, settings: ScheduleSettings) -> float:
    """The part, in [0, 1], of the highest rate that the update from `step` to `step + 1` takes.

    Both schedules rise linearly from 1 / `warmup_steps` and reach `final_learning_rate_ratio` at the last
    update. "cosine" comes down all the way (Loshchilov & Hutter 2017). "trapezoidal" stays up until the last
    `cooldown_ratio` of the steps and then falls linearly (Hägele et al. 2024): its plateau does not know how
    long the run will be, so one run can be cooled down at several lengths.

    There is no state to save or to advance: a scheduler object that Accelerate prepares moves `num_processes`
    times per step.
    """
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    final = settings.final_learning_rate_ratio
    last = settings.max_steps - 1
    if settings.schedule == "trapezoidal":
        begin = max(settings.warmup_steps, round(settings.max_steps * (1.0 - settings.cooldown_ratio)))
    else:
        begin = settings.warmup_steps
    progress = min(1.0, max(0, step - begin) / max(1, last - begin))
    if settings.schedule == "trapezoidal":
        return final + (1.0 - final) * (1.0 - progress)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
