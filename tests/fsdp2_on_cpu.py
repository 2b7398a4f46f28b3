"""`train_accelerate.py`, with FSDP2 really sharding on CPU processes.

Accelerate shards only where it finds an accelerator, and trains data parallel on the CPU without a word. Its
FSDP2 code itself runs on gloo; this script only corrects what it believes about the machine.
"""

import os
import sys
import weakref

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

import train_accelerate
import training.checkpoint
from training.checkpoint import save_checkpoint
from training.weights import whole

detect = AcceleratorState.__init__


def detect_and_shard(self: AcceleratorState, *args, **kwargs) -> None:
    """What Accelerate does on GPUs when its launcher says FSDP."""
    detect(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        assert os.environ["ACCELERATE_USE_FSDP"] == "true"
        plugin = kwargs.get("fsdp_plugin") or self.fsdp_plugin
        if self._mixed_precision != "no":
            plugin.set_mixed_precision(self._mixed_precision)
        self._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
        self.__dict__ = self._shared_state


def save_and_look(accelerator, run_dir, state, **kwargs):
    """Says how the weights lie; a run that is not sharded must not pass for one."""
    folder = save_checkpoint(accelerator, run_dir, state, **kwargs)
    kinds = {type(parameter) for parameter in state.model.parameters()}
    assert kinds == {DTensor}, kinds
    print(f"process {accelerator.process_index}: every parameter is a DTensor", flush=True)
    return folder


GATHERED: list[weakref.ref] = []


def whole_and_look(tensor):
    """A checkpoint gathers one tensor after the other: a GPU has no room for a second model."""
    alive = sum(reference() is not None for reference in GATHERED)
    assert alive <= 1, f"{alive} gathered tensors are held"
    result = whole(tensor)
    if result is not tensor:  # a step count is no part of a model
        GATHERED.append(weakref.ref(result))
    return result


if __name__ == "__main__":
    AcceleratorState.__init__ = detect_and_shard
    train_accelerate.save_checkpoint = save_and_look
    training.checkpoint.whole = whole_and_look
    train_accelerate.main(sys.argv[1:])
