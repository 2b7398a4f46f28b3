"""AdamW, or Muon on the hidden matrices and AdamW on the rest; which parameter gets which rule and rate."""

from typing import Protocol

import torch
from torch import nn

from training.muon import MuonAndAdamW
from training.schedule import ScheduleSettings, schedule_at


class OptimizerSettings(Protocol):
    """The settings that the optimizer reads."""

    @property
    def optimizer(self) -> str: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def adam_beta1(self) -> float: ...
    @property
    def adam_beta2(self) -> float: ...
    @property
    def adam_epsilon(self) -> float: ...
    @property
    def muon_learning_rate(self) -> float: ...
    @property
    def muon_momentum(self) -> float: ...
    @property
    def muon_weight_decay(self) -> float: ...


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters of `model`; set its rates with `set_learning_rate`.

    Biases and LayerNorm gains are not decayed: pulling a gain to zero does not make the function smoother.
    The fused kernel exists for CPU, CUDA and MPS, and it alone can skip an update on the device's own word
    (training/guard.py).
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hidden = hidden_matrices(model) if settings.optimizer == "muon" else []
    taken = {id(parameter) for parameter in hidden}
    others = [parameter for parameter in trainable if id(parameter) not in taken]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [{**group, "peak_learning_rate": settings.learning_rate} for group in groups if group["params"]]
    rate, epsilon = settings.learning_rate, settings.adam_epsilon
    betas = (settings.adam_beta1, settings.adam_beta2)
    if not hidden:
        return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=epsilon, fused=True)
    muon = {
        "params": hidden,
        "weight_decay": settings.muon_weight_decay,
        "peak_learning_rate": settings.muon_learning_rate,
        "momentum": settings.muon_momentum,
    }
    return MuonAndAdamW(muon, groups, lr=rate, betas=betas, eps=epsilon)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, settings: ScheduleSettings) -> float:
    """Give each group its part of its own highest rate for the update from `step` to `step + 1`.

    Returns the rate of `settings.learning_rate`'s groups.
    """
    part = schedule_at(step, settings)
    for group in optimizer.param_groups:
        group["lr"] = part * group["peak_learning_rate"]
    return part * settings.learning_rate


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Trainable matrices between the embeddings and the head, which are not among them.

    Muon's reasoning is about matrices that map features to features; a row of an embedding or of the head
    belongs to one token, and sees gradients as rarely as that token comes.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    not_hidden = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) or m is head for p in m.parameters()
    }
    return [p for p in model.parameters() if p.requires_grad and p.dim() == 2 and id(p) not in not_hidden]
