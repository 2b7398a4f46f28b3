"""Looking at a model in the middle of training without leaving a trace."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel


class NotFiniteError(ValueError):
    """A model returned NaN or infinity: its weights are broken, or overflow in their dtype."""


@contextmanager
def preserved_rng() -> Iterator[None]:
    """On leaving, put back the random states of Python, NumPy and PyTorch, accelerators included."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.get_rng_state()
    # An accelerator that nobody has touched is left alone: asking for its state would initialise it.
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    mps_state = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, nothing compiled; each module's mode and all random states come back.

    `model` may be wrapped or compiled. Compiled code is stepped around rather than used: evaluation brings
    other shapes and modes than training, and each would cost a compilation of its own.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with preserved_rng(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        # Module by module: a frozen part may have been in evaluation mode while the rest was training.
        for module, training in modes:
            module.training = training


def bare_model(model: nn.Module) -> PreTrainedModel:
    """The transformers (or PEFT) model inside `torch.compile` and data-parallel wrappers, in whatever order.

    FSDP2 wraps nothing: its hooks stay on the model that is returned.
    """
    while True:
        if isinstance(model, OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, DataParallel | DistributedDataParallel | FullyShardedDataParallel):
            model = model.module
        else:
            return cast(PreTrainedModel, model)


def without_wrappers(model: nn.Module) -> nn.Module:
    """What to call for a forward of which other processes need not know.

    A replicated model's wrapper may broadcast its buffers at each forward, and processes that score another
    number of batches would then wait for ever. A sharded model's forward needs all processes, and stays as
    it is.
    """
    while True:
        if isinstance(model, OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        else:
            return model


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward needs all processes, each of which holds a part of the weights."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )
