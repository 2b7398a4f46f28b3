"""Ours and its peers at one shape: models and the training step that each project documents.

nanoGPT and build-nanogpt are read from checkouts beside one another in a folder (`--peers DIR`); their code
is never part of this repository. Every builder takes a `Shape` and returns what the benchmarks call alike.
"""

import ast
import contextlib
import importlib.util
import inspect
import io
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutput

from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from training.device import start_accelerator
from training.guard import StepGuard
from training.objective import count_targets, count_tokens, language_modeling_loss
from training.optimizer import build_optimizer
from training.recipe import TrainSettings

OURS, RECOMPUTING, NANOGPT, BUILD_NANOGPT, STOCK, LIGER = (
    "ours",
    "ours, --activation_checkpointing",
    "nanoGPT",
    "build-nanogpt",
    "stock GPT-2 + AdamW",
    "stock GPT-2 + Liger + AdamW",
)
WEIGHT_DECAY, LEARNING_RATE, BETAS, MAX_GRAD_NORM = 0.1, 6e-4, (0.9, 0.95), 1.0


@dataclass(frozen=True)
class Shape:
    """A GPT-2 and its batch: `rows` rows of `tokens` tokens."""

    layers: int
    heads: int
    width: int
    vocabulary: int
    tokens: int
    rows: int

    @property
    def step_tokens(self) -> int:
        return self.rows * self.tokens

    @property
    def parameters(self) -> int:
        """Weights and biases, the tied embedding once."""
        block = 12 * self.width**2 + 13 * self.width
        return self.layers * block + (self.vocabulary + self.tokens + 2) * self.width

    @property
    def flops_per_token(self) -> int:
        """Forward and backward, 6 N + 12 L C T (Chowdhery et al. 2022, appendix B)."""
        return 6 * self.parameters + 12 * self.layers * self.width * self.tokens

    def words(self) -> list[str]:
        """As a command line takes it, and `shape_from_words` reads it."""
        return [str(number) for number in astuple(self)]

    def __str__(self) -> str:
        model = f"{self.layers} layers, width {self.width}, {self.vocabulary:,} words"
        return f"{model}, {self.rows} rows of {self.tokens} tokens"


def shape_from_words(words: Sequence[str]) -> Shape:
    return Shape(*map(int, words))


def why_missing(name: str, device: str, peers: Path | None) -> str:
    """Why a contender cannot run here and what to do about it; empty if it can."""
    if name in (NANOGPT, BUILD_NANOGPT):
        file = _file_of(name, peers)
        if file is None or not file.is_file():
            return f"git clone https://github.com/karpathy/{name} into a folder DIR, then --peers DIR"
    if name == LIGER:
        if device != "cuda":
            return "its kernels need a GPU"
        if importlib.util.find_spec("liger_kernel") is None:
            return "pip install liger-kernel"
    return ""


def _file_of(name: str, peers: Path | None) -> Path | None:
    return peers and peers / name / {NANOGPT: "model.py", BUILD_NANOGPT: "train_gpt2.py"}[name]


def nanogpt_module(peers: Path) -> Any:
    """nanoGPT's model.py, imported from where it lies."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", peers / NANOGPT / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_nanogpt_module(peers: Path) -> Any:
    """The classes of train_gpt2.py without its main program, which would start to train."""
    file = peers / BUILD_NANOGPT / "train_gpt2.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    module = ModuleType("build_nanogpt_model")
    names = {"torch": torch, "nn": nn, "F": nn.functional, "math": math, "inspect": inspect}
    # configure_optimizers asks this global of the script whether to print.
    vars(module).update(names, dataclass=dataclass, master_process=False)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(tree, str(file), "exec"), vars(module))
    return module


def settings_for(shape: Shape, precision: str, compiled: bool, threads: int, **more: Any) -> TrainSettings:
    """What train_accelerate would be told for this shape."""
    settings: dict[str, Any] = {
        "block_size": shape.tokens,
        "batch_tokens": shape.step_tokens,
        "micro_batch_size": shape.rows,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "n_embd": shape.width,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "mixed_precision": {"fp32": "no", "bf16": "bf16"}[precision],
        "compile": "whole" if compiled else "none",
        "cpu_threads": threads,
    }
    return TrainSettings(**{**settings, **more})


def our_model(shape: Shape, **more: Any) -> GPTScratchForCausalLM:
    return GPTScratchForCausalLM(
        GPTScratchConfig(
            vocab_size=shape.vocabulary,
            n_positions=shape.tokens,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_embd=shape.width,
            bos_token_id=0,
            eos_token_id=0,
            **more,
        )
    )


def stock_model(shape: Shape) -> GPT2LMHeadModel:
    """transformers' GPT-2 without dropout, which none of the others has."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocabulary,
            n_positions=shape.tokens,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_embd=shape.width,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
    )


def peer_model(name: str, shape: Shape, peers: Path | None) -> Any:
    """nanoGPT's or build-nanogpt's GPT."""
    assert peers is not None
    sizes = {
        "block_size": shape.tokens,
        "vocab_size": shape.vocabulary,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "n_embd": shape.width,
    }
    module = nanogpt_module(peers) if name == NANOGPT else build_nanogpt_module(peers)
    with contextlib.redirect_stdout(io.StringIO()):
        return module.GPT(module.GPTConfig(**sizes))


@dataclass(frozen=True)
class OurTraining:
    """What `train_accelerate.train` steps, and a step of it without its journal."""

    settings: TrainSettings
    accelerator: Accelerator
    model: Any
    optimizer: Any
    step: Callable[[Tensor], Tensor]


def our_training(shape: Shape, precision: str, compiled: bool, threads: int, **more: Any) -> OurTraining:
    """The functions that the loop calls, in its order; `more` are settings."""
    settings = settings_for(shape, precision, compiled, threads, **more)
    with contextlib.redirect_stdout(io.StringIO()):
        accelerator, _ = start_accelerator(settings)
    torch.manual_seed(settings.seed)
    model = our_model(shape).train()
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model, optimizer = accelerator.prepare(model, build_optimizer(model, settings))
    guard = StepGuard(accelerator.device)

    def step(input_ids: Tensor) -> Tensor:
        batch = {"input_ids": input_ids, "labels": input_ids}
        counts = torch.stack([count_targets(batch), count_tokens(batch)])
        num_targets, _ = accelerator.reduce(counts, "sum").clamp(min=1)
        loss = language_modeling_loss(model, batch, num_targets)
        accelerator.backward(loss * accelerator.num_processes)
        gradient_norm = accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        guard.check(optimizer, loss.detach(), gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return OurTraining(settings, accelerator, model, optimizer, step)


class LigerGPT2(nn.Module):
    """Stock GPT-2 with Liger's LayerNorm and its loss without logits.

    Liger 0.8 replaces the parts of many models by itself, but not those of GPT-2.
    """

    def __init__(self, model: GPT2LMHeadModel):
        super().__init__()
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerLayerNorm

        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.LayerNorm):
                    setattr(parent, name, LigerLayerNorm(child.normalized_shape[0], child.eps, bias=True))
                    getattr(parent, name).load_state_dict(child.state_dict())
        self.model, self.loss = model, LigerFusedLinearCrossEntropyLoss()

    def forward(self, input_ids: Tensor, labels: Tensor) -> CausalLMOutput:
        hidden_states = self.model.transformer(input_ids).last_hidden_state[:, :-1].flatten(0, 1)
        loss = self.loss(self.model.lm_head.weight, hidden_states, labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss)


def peer_step(
    name: str, shape: Shape, precision: str, compiled: bool, device: str, peers: Path | None
) -> Callable[[Tensor], Tensor]:
    """Forward, backward, clip, AdamW as the peer's own script or transformers' documentation has it."""
    if name in (STOCK, LIGER):
        stock = stock_model(shape)
        model: Any = (LigerGPT2(stock) if name == LIGER else stock).train().to(device)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY
        )
    else:
        model = peer_model(name, shape, peers).train().to(device)
        more = {"betas": BETAS} if name == NANOGPT else {}
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer = model.configure_optimizers(
                weight_decay=WEIGHT_DECAY, learning_rate=LEARNING_RATE, device_type=device, **more
            )
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # both scripts and ours allow TF32
    forward = torch.compile(model) if compiled else model

    def step(input_ids: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            if name in (STOCK, LIGER):
                loss = forward(input_ids, labels=input_ids).loss
            else:
                # Their loaders hand over the targets shifted; a roll is as many of them.
                loss = forward(input_ids, input_ids.roll(-1, dims=1))[1]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
