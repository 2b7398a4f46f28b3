"""Names and whole tensors of a model's weights and its optimizer's state, sharded or not."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

# Inserted into parameter names by torch.compile and by activation checkpointing.
WRAPPER_NAMES = ("_orig_mod.", "_checkpoint_wrapped_module.")


def bare_model(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model as it was built, out of data-parallel and compiled wrappers; what can be sharded is.

    After a forward without a backward (validation, sampling) FSDP2 leaves the outermost weights gathered, as
    plain parameters that the optimizer does not know.
    """
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    for module in bare.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return bare


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a bare model by name; what is tied appears once.

    Tensors are the model's own: DTensors where it is sharded. Of a model with adapters (PEFT) only what is
    trained: the base is frozen, and whoever made the model has it.
    """
    if is_adapted(model):
        return {_clean(name): p.detach() for name, p in model.named_parameters() if p.requires_grad}
    persistent = model.state_dict().keys()
    named: dict[str, Tensor] = dict(model.named_parameters())
    named.update((name, buffer) for name, buffer in model.named_buffers() if name in persistent)
    return {_clean(name): tensor.detach() for name, tensor in named.items()}


def is_adapted(model: nn.Module) -> bool:
    """Whether it is PEFT's wrapper around a frozen model."""
    return hasattr(model, "peft_config")


def named_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`{"<parameter name>/<kind>": tensor}`, for example "transformer.wte.weight/exp_avg"."""
    return {
        f"{_clean(name)}/{kind}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_weights(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into the model's own, shard by shard where it is sharded.

    Raises:
        ValueError: if names or shapes differ.
    """
    own = named_weights(model)
    problems = [f"{name} is missing" for name in own if name not in saved]
    problems += [f"{name} belongs to no weight" for name in saved if name not in own]
    problems += [
        f"{name} is {tuple(saved[name].shape)}, the model's is {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in saved and saved[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError("the checkpoint is of another model: " + "; ".join(problems[:5]))
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(_like(saved[name], tensor))


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]
) -> None:
    """Give each parameter its saved state; one that has none there starts afresh."""
    parameters = {_clean(name): parameter for name, parameter in model.named_parameters()}
    optimizer.state.clear()
    for key, value in saved.items():
        name, kind = key.rsplit("/", 1)
        if name not in parameters:
            raise ValueError(f"the checkpoint's optimizer knows {name}, the model does not")
        parameter = parameters[name]
        # Step counts are scalars that live beside each parameter and are never sharded.
        is_scalar = value.dim() == 0 and parameter.dim() > 0
        optimizer.state[parameter][kind] = (
            value.to(parameter.device) if is_scalar else _like(value, parameter).clone()
        )


def whole(tensor: Tensor) -> Tensor:
    """The tensor without sharding; a collective call where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(value: Tensor, model_tensor: Tensor) -> Tensor:
    """`value` on the device of `model_tensor`, and cut as it is cut."""
    value = value.to(model_tensor.device)
    if isinstance(model_tensor, DTensor):
        # Every process has read the whole tensor: each keeps its part, and nothing is sent.
        return distribute_tensor(value, model_tensor.device_mesh, model_tensor.placements, src_data_rank=None)
    return value


def _clean(name: str) -> str:
    for inserted in WRAPPER_NAMES:
        name = name.replace(inserted, "")
    return name
