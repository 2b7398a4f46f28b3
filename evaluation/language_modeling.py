"""Loss, perplexity and bits per byte of a causal language model."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from evaluation.isolation import bare_model, undisturbed

# Logits are made for this many positions at a time: 200 MB in float32 at GPT-2's vocabulary.
POSITIONS_PER_CHUNK = 1024


@dataclass(frozen=True)
class LanguageModelingResult:
    """How well a model predicts a text.

    `loss` is the mean over all `targets`, in nats per token. `bits_per_byte` is comparable across tokenizers:
    bits spent on the targets that are text, divided by the UTF-8 `bytes` of those targets; special tokens
    such as <|endoftext|> count in neither. It and `bytes` are None where the caller gave no byte lengths.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    targets: int
    bytes: int | None


def evaluate_loss(
    model: nn.Module,
    loader: Iterable[Mapping[str, Tensor]],
    accelerator: Accelerator,
    *,
    token_bytes: Tensor | None = None,
    max_batches: int | None = None,
    allow_nan: bool = False,
) -> LanguageModelingResult:
    """Mean cross-entropy in nats per target token, over every process.

    Each process iterates its own `loader`, which is not prepared by Accelerate: process r of W holds the
    micro-batches r, r + W, r + 2W, … of one common list, and the first `max_batches` of that list count (all
    of them if None). A batch holds `input_ids` and `labels`, int64 (B, T), labels not yet shifted and -100
    where they do not count, and any further arguments of the forward. `token_bytes`, (vocabulary,), holds the
    UTF-8 bytes of each token, 0 for special ones.

    The result is the same to the last bit on every process and, given the same micro-batches, on any number
    of processes. No random state, no gradient and no module's train/eval mode is touched. With `allow_nan` a
    model that returns NaN has a loss of NaN: a training run notes it and goes on.

    Raises:
        ValueError: if no batch holds a target, or the model returns NaN.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    sums = []  # per batch: nats, targets, nats of text targets, their bytes
    with undisturbed(model):
        for position, batch in enumerate(_as_many_on_every_process(loader, accelerator)):
            if max_batches is not None and position * world_size >= max_batches:
                break
            if batch is None or (max_batches is not None and position * world_size + rank >= max_batches):
                # The forward of a sharded model is collective: one whose batches ran out still takes part.
                nothing = torch.zeros(1, 2, dtype=torch.int64)
                batch = {"input_ids": nothing, "labels": torch.full_like(nothing, -100)}
            sums.append(_sum_batch(model, batch, accelerator, token_bytes))

    # Each number is a batch's own and fsum rounds once: neither the order of batches nor their owner shows.
    table = torch.tensor(sums, dtype=torch.float64).reshape(-1, 4)
    if world_size > 1:
        table = accelerator.gather(table.to(accelerator.device)).cpu()
    nats, targets, text_nats, text_bytes = (math.fsum(column) for column in table.T.tolist())
    if targets == 0:
        raise ValueError(
            "the evaluation set holds no targets: no batch came, or every label after a row's first is -100"
        )
    loss = nats / targets
    if math.isnan(loss) and not allow_nan:
        broken = int(table[:, 0].isnan().sum())
        raise ValueError(
            f"the model returned NaN on {broken:,} of {len(table):,} batches: its weights are broken or "
            "overflow in this dtype"
        )
    return LanguageModelingResult(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=text_nats / math.log(2) / text_bytes if text_bytes else None,
        targets=int(targets),
        bytes=int(text_bytes) if token_bytes is not None else None,
    )


def _sum_batch(
    model: nn.Module, batch: Mapping[str, Tensor], accelerator: Accelerator, token_bytes: Tensor | None
) -> tuple[float, float, float, float]:
    """Nats and targets of a batch, then the nats and bytes of those targets that are text."""
    labels = batch["labels"]
    inputs = {name: tensor.to(accelerator.device) for name, tensor in batch.items() if name != "labels"}
    losses = token_losses(model, inputs, labels.to(accelerator.device), accelerator).cpu().double()
    targets = labels[:, 1:].cpu()
    counted = targets != -100
    nats, count = losses[counted].sum().item(), counted.sum().item()
    if token_bytes is None:
        return nats, count, 0.0, 0.0
    sizes = token_bytes.cpu()[targets.clamp(min=0)] * counted
    return nats, count, losses[sizes > 0].sum().item(), sizes.sum().item()


def token_losses(
    model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor, accelerator: Accelerator
) -> Tensor:
    """Cross-entropy of each target in nats, float32 (B, T - 1): entry t is that of labels[:, t + 1].

    It is 0 where the label is -100.
    `inputs` are arguments of the forward (`input_ids` (B, T), perhaps a mask), `labels` int64 (B, T).
    """
    causal_model = bare_model(model)
    if hasattr(causal_model, "get_base_model"):  # PEFT keeps the model inside
        causal_model = causal_model.get_base_model()  # type: ignore[operator]
    head = causal_model.get_output_embeddings()
    targets = labels[:, 1:].flatten()

    if causal_model.config.model_type == "gpt_scratch" and isinstance(head, nn.Linear):
        # Our model applies nothing after its head, so the head can run in chunks on the last hidden states.
        hidden = _last_hidden_states(model, causal_model.base_model, inputs)
        hidden = hidden[:, :-1].flatten(0, 1)  # (B * (T - 1), C)
        weight = head.weight.full_tensor() if isinstance(head.weight, DTensor) else head.weight
        logits_of: Callable[[Tensor], Tensor] = partial(F.linear, weight=weight)
        # FSDP2 changes the class of a head that it shards; called, such a one gathers weights by itself.
        if type(head) is nn.Linear and weight is head.weight:
            logits_of = getattr(causal_model, "logits_of", head)
        losses = []
        for rows, wanted in zip(
            hidden.split(POSITIONS_PER_CHUNK), targets.split(POSITIONS_PER_CHUNK), strict=True
        ):
            with accelerator.autocast():
                logits = logits_of(rows.to(weight.dtype))
            losses.append(F.cross_entropy(logits.float(), wanted, reduction="none"))
        return torch.cat(losses).view(len(labels), -1)

    logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)  # (B * (T - 1), vocabulary)
    losses = [
        F.cross_entropy(rows.float(), wanted, reduction="none")
        for rows, wanted in zip(
            logits.split(POSITIONS_PER_CHUNK), targets.split(POSITIONS_PER_CHUNK), strict=True
        )
    ]
    return torch.cat(losses).view(len(labels), -1)


def _last_hidden_states(model: nn.Module, backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the `backbone` inside `model` returns, (B, T, C), when the outermost `model` is called.

    The outermost, because mixed precision and sharding are set up in its forward; logits of one position
    are the fewest that it can be asked for.
    """
    caught = []
    handle = backbone.register_forward_hook(lambda module, args, output: caught.append(output[0]))
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return caught[0]


def _as_many_on_every_process(
    loader: Iterable[Mapping[str, Tensor]], accelerator: Accelerator
) -> Iterator[Mapping[str, Tensor] | None]:
    """The loader's batches, then None for as long as another process still has some."""
    batches = iter(loader)
    while True:
        batch = next(batches, None)
        have_batches = int(batch is not None)
        if accelerator.num_processes > 1:
            flag = torch.tensor(have_batches, device=accelerator.device)
            have_batches = accelerator.reduce(flag, reduction="sum").item()
        if not have_batches:
            return
        yield batch
