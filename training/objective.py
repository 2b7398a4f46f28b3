"""What is minimised, and how its targets are counted."""

import inspect
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


def count_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Tokens that are read, without padding; a 0-d int64 tensor. Without a mask every position is one."""
    input_ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    # Not torch.tensor(number): where that is to be on a GPU, the host waits for the copy.
    return mask.sum() if mask is not None else torch.full((), input_ids.numel(), device=input_ids.device)


def language_modeling_loss(model: nn.Module, batch: Mapping[str, Tensor], num_targets: Tensor) -> Tensor:
    """This micro-batch's share of the step's loss: its summed cross-entropy / the whole step's targets, nats.

    `num_targets` counts over all micro-batches and processes of the step, so the shares add up to the loss of
    the whole batch, however it was cut. The model owns the label shift.
    """
    if _divides_by(model, "num_items_in_batch"):
        return model(**batch, num_items_in_batch=num_targets).loss
    # A model that only knows the mean over its own targets: NaN where it has none.
    own_targets = count_targets(batch)
    return torch.where(own_targets > 0, model(**batch).loss, 0.0) * (own_targets / num_targets)


def without_cache(model: nn.Module, batch: Mapping[str, Tensor], num_targets: Tensor) -> Tensor:
    """`language_modeling_loss` of packed rows, for models that would make a cache and so mix them."""
    return language_modeling_loss(model, {**batch, "use_cache": False}, num_targets)  # type: ignore[dict-item]


def _divides_by(model: nn.Module, argument: str) -> bool:
    """Whether the forward takes `argument`, by name or among others, as transformers' loss functions do."""
    while hasattr(model, "module") or hasattr(model, "_orig_mod"):  # data parallel, compiled
        model = model.module if hasattr(model, "module") else model._orig_mod  # type: ignore[assignment]
    if hasattr(model, "get_base_model"):  # PEFT hands on what it is given
        model = model.get_base_model()  # type: ignore[operator]
    if getattr(model, "accepts_loss_kwargs", None) is False:
        return False
    parameters = inspect.signature(type(model).forward).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on the device. A tensor under two names, as labels often are, is sent once."""
    sent: dict[int, Tensor] = {}
    for tensor in batch.values():
        if id(tensor) not in sent:
            sent[id(tensor)] = send(tensor, device)
    return {name: sent[id(tensor)] for name, tensor in batch.items()}


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device.

    A GPU fetches from pinned memory while it computes and the host goes on; for other memory the host waits
    until the GPU has done all that came before.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    # torch keeps the pinned copy until it is fetched, and then for the next batch.
    return tensor.pin_memory().to(device, non_blocking=True)
