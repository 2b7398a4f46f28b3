"""FSDP2, where the launcher asks for it: what is sharded as one unit, and in which types it travels."""

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from training.settings import SettingsError

# What is gathered and multiplied. Gradients are summed, and weights kept, in float32 whatever this is.
COMPUTE_TYPES = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16}


def is_sharding_asked_for() -> bool:
    """Whether `accelerate launch` was given a configuration with FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")


def sharding_plugin(precision: str) -> FullyShardedDataParallelPlugin | None:
    """What Accelerate shards by: its launcher's configuration and our types. None without FSDP.

    By itself Accelerate would add up gradients, over micro-batches and processes, in the type of the forward,
    and hand out the loss in it: with bfloat16 the same batch in 64 pieces took a step that was 1% off.

    Raises:
        SettingsError: for FSDP's first version.
    """
    if not is_sharding_asked_for():
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise SettingsError(
            f"the launcher asks for FSDP version {plugin.fsdp_version}, which flattens weights together, and "
            "checkpoints here are by weight; set `fsdp_version: 2` as accelerate_configs/fsdp2.yaml has it"
        )
    if precision in COMPUTE_TYPES:
        # No output_dtype: blocks hand on what they have computed, and the loss is float32 already.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=COMPUTE_TYPES[precision], reduce_dtype=torch.float32
        )
    return plugin


def prepare(accelerator: Accelerator, model: Any, optimizer: Any) -> tuple[Any, Any]:
    """`accelerator.prepare`; FSDP2 shards blocks, and leaves embeddings and head to the outermost unit.

    That unit is gathered once and kept for the whole forward, so the loss can read the head's weight a chunk
    at a time. A unit of their own, which Accelerate would make, is gathered when the head is called: then all
    logits are there. Accelerate does not find what the model does not name.
    """
    names = ("get_input_embeddings", "get_output_embeddings")
    vars(model).update(dict.fromkeys(names, lambda: None))
    try:
        prepared, optimizer = accelerator.prepare(model, optimizer)
    finally:
        for name in names:
            del vars(model)[name]
    for module in prepared.modules():  # compiling by blocks copies what the model holds
        for name in names:
            vars(module).pop(name, None)
    return prepared, optimizer
