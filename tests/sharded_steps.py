"""Gradients of a toy sharded by FSDP2 on CPU processes; process 0 prints what it found as one line of JSON.

Started below `accelerate launch --config_file accelerate_configs/fsdp2.yaml` by test_training_sharding.py.
"""

import json
from contextlib import nullcontext

import torch
from accelerate.state import AcceleratorState
from fsdp2_on_cpu import detect_and_shard
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from training.device import start_accelerator
from training.objective import count_targets, language_modeling_loss
from training.optimizer import build_optimizer
from training.recipe import TrainSettings
from training.sharding import prepare
from training.weights import whole

# Rows of a process. 1,024 tokens: enough for the loss to be taken in several chunks.
ROWS, TOKENS, VOCABULARY = 32, 32, 320


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor whose last side is the vocabulary."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.shape[-1:] == (VOCABULARY,):
                self.elements = max(self.elements, leaf.numel())
        return result


def toy() -> GPTScratchForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 2}
    return GPTScratchForCausalLM(GPTScratchConfig(**sizes)).train()


def main() -> None:
    settings = TrainSettings(mixed_precision="bf16", compile="none", cpu_threads=1)
    accelerator, _ = start_accelerator(settings)
    rank, processes = accelerator.process_index, accelerator.num_processes
    generator = torch.Generator().manual_seed(1)
    everyone = torch.randint(VOCABULARY, (ROWS * processes, TOKENS), generator=generator)
    targets = count_targets({"labels": everyone})

    model = toy()
    optimizer = build_optimizer(model, settings)
    model, _ = prepare(accelerator, model, optimizer)

    def gradient(micro_batches: int) -> tuple[Tensor, Tensor]:
        """That of the whole batch, and its loss, from so many pieces a process."""
        losses = []
        for number, rows in enumerate(everyone.chunk(processes)[rank].chunk(micro_batches), start=1):
            with nullcontext() if number == micro_batches else accelerator.no_sync(model):
                loss = language_modeling_loss(model, {"input_ids": rows, "labels": rows}, targets)
                accelerator.backward(loss * processes)
            losses.append(loss.detach())
        flat = torch.cat([whole(parameter.grad).flatten() for parameter in model.parameters()])
        model.zero_grad()
        return flat, accelerator.reduce(torch.stack(losses).sum(), "sum")

    with LargestTensor() as largest:
        of_one, loss = gradient(1)
    found = {
        "kinds": sorted({type(parameter).__name__ for parameter in model.parameters()}),
        "head": type(model.lm_head).__name__,
        "loss": loss.item(),
        "loss_type": str(loss.dtype),
        "largest": largest.elements,
        "off": {
            pieces: ((gradient(pieces)[0] - of_one).norm() / of_one.norm()).item() for pieces in (2, 8, 32)
        },
    }
    plain: nn.Module = toy()
    with torch.no_grad():
        batch = {"input_ids": everyone, "labels": everyone}
        found["plain_loss"] = language_modeling_loss(plain, batch, targets).item()
    if accelerator.is_main_process:
        print("found: " + json.dumps(found), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    AcceleratorState.__init__ = detect_and_shard
    main()
