"""What is minimised, and how its targets are counted."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

# Positions with this label are not predicted (the convention of torch and transformers).
IGNORED_LABEL = -100


def count_targets(batch: Mapping[str, Tensor]) -> Tensor:
    """Label positions that count, a 0-d int64 tensor on the batch's device.

    `labels` is (B, T) and not yet shifted: the first label of a row has nothing before it, so it is no
    target.
    """
    return (batch["labels"][:, 1:] != IGNORED_LABEL).sum()


def language_modeling_loss(model: nn.Module, batch: Mapping[str, Tensor], num_targets: Tensor) -> Tensor:
    """This micro-batch's share of the step's loss: its summed cross-entropy / the whole step's targets, nats.

    `num_targets` counts over all micro-batches and processes of the step, so the shares add up to the loss of
    the whole batch, however it was cut. The model owns the label shift.
    """
    return model(**batch, num_items_in_batch=num_targets).loss


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on the device.

    From pinned memory the copy overlaps with what the device is still computing.
    """
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
