"""Faster or leaner forms of what a line of torch says: linear layers, dropout, the loss, attention on CPUs.

They differ from that line by rounding, and dropout by what it draws; tests hold them to it.
This file travels with every checkpoint, beside `modeling_gpt_scratch.py`.

Shapes: B batch, T tokens, C model width, H heads, D width of a head, V vocabulary or outputs, N = B * T.
"""

import math
import platform
import zlib
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

# ----------------------------------------------------------------------------------------------------------
# Products.


def _is_amd() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return "AuthenticAMD" in file.read(1000)
    except OSError:
        return "AuthenticAMD" in platform.processor()  # Windows


# torch multiplies float32 by MKL, which keeps AVX-512 for Intel's processors; oneDNN, its other library,
# takes it wherever it is.
ONEDNN_IS_FASTER = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and _is_amd()
)


def _onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# Checkpoints bring copies of this file, so the operators' names are the copy's: one must not serve another.
COPY = f"{zlib.crc32(__name__.encode()):08x}"

# An operator of our own for torch.compile, which takes torch's only with constant weights.
_onednn_linear_compiled = torch.library.custom_op(
    f"gpt_scratch::onednn_linear_{COPY}", _onednn_linear, mutates_args=()
)
_onednn_linear_compiled.register_fake(lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]))


def _onednn_takes(x, weight):
    return (
        ONEDNN_IS_FASTER
        and torch.backends.mkldnn.enabled
        and not torch.is_grad_enabled()  # it has no gradient
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.dim() > 1
        and type(x) is torch.Tensor
        and type(weight) in (nn.Parameter, torch.Tensor)  # not quantised, not sharded
        and not torch.is_autocast_enabled("cpu")
        and not (torch.jit.is_tracing() or torch.compiler.is_exporting())
    )


def linear(x, weight, bias=None):
    """`F.linear`, (..., C) and (V, C) to (..., V); by oneDNN where it is faster and no gradient is wanted."""
    if not _onednn_takes(x, weight):
        return F.linear(x, weight, bias)
    multiply = _onednn_linear_compiled if torch.compiler.is_compiling() else _onednn_linear
    return multiply(x, weight, bias)


def project(layer, x):
    """`layer(x)`; in eval mode an ordinary layer's product is `linear`'s.

    Not a class of our own: bitsandbytes and others replace layers whose type is exactly `nn.Linear`. What
    somebody has put in a layer's place, or hooked onto it, is called.
    """
    is_ordinary = type(layer) is nn.Linear and not layer.training and "forward" not in vars(layer)
    is_hooked = layer._forward_hooks or layer._forward_pre_hooks
    if is_ordinary and not is_hooked and _onednn_takes(x, layer.weight):
        return linear(x, layer.weight, layer.bias)
    return layer(x)


def in_product_type(x):
    """`x` in autocast's type, where that is on: cast once for several layers that would each do it."""
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return x
    return x.to(torch.get_autocast_dtype(device_type))


# ----------------------------------------------------------------------------------------------------------
# Dropout.


def dropout_mask(x, rate):
    """Of `x`'s shape on the CPU, bool: false with probability `rate`, to 2⁻¹⁶. A 64-bit number makes four."""
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    lowest_kept = min(round(rate * 2**16), 2**16 - 1) - 2**15
    return (draws.view(torch.int16)[: x.numel()] >= lowest_kept).view(x.shape)


class Dropout(nn.Dropout):
    """torch's, with the mask above on CPUs, where drawing numbers is what dropout takes time for.

    Compilers draw in kernels of their own.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        is_plain = type(input) is torch.Tensor and input.device.type == "cpu" and not self.inplace
        if self.training and 0 < self.p < 1 and is_plain and not torch.compiler.is_compiling():
            return input * dropout_mask(input, self.p) / (1 - self.p)
        return super().forward(input)


# ----------------------------------------------------------------------------------------------------------
# Loss. Logits are the largest tensor of a small language model by far (64 x 1,024 x 50,304 in float32 is
# 13 GB), and training needs only their gradient. So they are built a few rows at a time.

# More rows per matrix product are faster, fewer take less memory: at most this many chunks …
LOSS_CHUNKS = 8
# … of at least this many rows, below which matrix products lose their speed; a GPU's lose it earlier.
LOSS_CHUNK_ROWS, LOSS_CHUNK_ROWS_ON_GPU = 256, 4096


def _loss_chunks(hidden_states, targets, ignore_index):
    """Cut N rows into few runs of n: states (n, C), targets (n, 1) with 0 for ignored, who counts (n, 1)."""
    counts = (targets != ignore_index).unsqueeze(1)
    targets = targets.unsqueeze(1).masked_fill(~counts, 0)
    chunk_rows = LOSS_CHUNK_ROWS_ON_GPU if hidden_states.device.type == "cuda" else LOSS_CHUNK_ROWS
    n_chunks = max(1, min(LOSS_CHUNKS, hidden_states.shape[0] // chunk_rows))
    return zip(*(tensor.chunk(n_chunks) for tensor in (hidden_states, targets, counts)), strict=True)


def _chunk_losses(hidden_states, weight, targets, counts):
    """Cross-entropy of one chunk, in float32 and in a single (n, V) buffer.

    Returns the losses (n, 1), zero where ignored; softmax's numerators (n, V) and what makes them
    probabilities, or zero where ignored (n, 1).
    """
    logits = linear(hidden_states, weight).float()
    logits.sub_(logits.amax(dim=1, keepdim=True))
    target_logits = logits.gather(1, targets)
    numerators = logits.exp_()
    sums = numerators.sum(dim=1, keepdim=True)
    return (sums.log() - target_logits) * counts, numerators, counts / sums


def _sum_and_gradients(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    weight_needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed cross-entropy, its gradients by `hidden_states` and, float32 or empty, by `weight`."""
    loss = hidden_states.new_zeros((), dtype=torch.float32)
    # Sums over chunks are kept in float32 whatever the products are in.
    grad_weight = weight.new_zeros(weight.shape if weight_needs_grad else 0, dtype=torch.float32)
    grad_hidden: list[torch.Tensor] = []
    w = weight.to(dtype)
    is_fused = torch.compiler.is_compiling()
    for x, y, counts in _loss_chunks(hidden_states, targets, ignore_index):
        x = x.to(dtype)
        if is_fused and grad_hidden:
            # A compiler would take the products of all chunks first, and hold all of the logits after all.
            x = x + 0 * grad_hidden[-1][-1, -1]
        losses, softmax, factors = _chunk_losses(x, w, y, counts)
        loss = loss + losses.sum()
        # d loss / d logits = softmax - one_hot, made in the buffer that the logits were in.
        if is_fused:  # in one kernel, which never writes the softmax
            softmax = softmax * factors - (torch.arange(w.shape[0], device=y.device) == y) * counts
        else:
            softmax.mul_(factors).scatter_add_(1, y, -counts.float())
        grad_logits = softmax.to(dtype)
        del softmax
        grad_hidden.append((grad_logits @ w).to(hidden_states.dtype))
        if weight_needs_grad and dtype == torch.float32:
            grad_weight.addmm_(grad_logits.T, x)
        elif weight_needs_grad:  # in slices: adding mixed types first copies the lower one, whole, to float32
            slices = LOSS_CHUNKS if x.device.type == "cpu" else 1
            parts = zip(grad_weight.chunk(slices), grad_logits.chunk(slices, dim=1), strict=True)
            for rows, columns in parts:
                rows += columns.T @ x
        del grad_logits  # or it would live through the next chunk's logits
    return loss, torch.cat(grad_hidden), grad_weight


# On a CPU compilers leave it as it is, an operator of our own: they would keep each chunk's part of the
# weight's gradient and add them up in the end.
_sum_and_gradients_on_cpu = torch.library.custom_op(
    f"gpt_scratch::summed_linear_cross_entropy_{COPY}", _sum_and_gradients, mutates_args=()
)


@_sum_and_gradients_on_cpu.register_fake
def _(hidden_states, weight, targets, ignore_index, dtype, weight_needs_grad):
    grad_weight = weight.new_empty(weight.shape if weight_needs_grad else 0, dtype=torch.float32)
    return hidden_states.new_empty((), dtype=torch.float32), torch.empty_like(hidden_states), grad_weight


class _SummedLinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden_states @ weight.T`; gradients are taken while a chunk is at hand.

    Nothing is recomputed in backward: both gradients of the sum are known after the forward pass, and
    backward only multiplies them by what comes in.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, targets, ignore_index, dtype, weight_needs_grad):
        on_cpu = hidden_states.device.type == "cpu" and torch.compiler.is_compiling()
        compute = _sum_and_gradients_on_cpu if on_cpu else _sum_and_gradients
        loss, grad_hidden, grad_weight = compute(
            hidden_states, weight, targets, ignore_index, dtype, weight_needs_grad
        )
        ctx.save_for_backward(grad_hidden, grad_weight if weight_needs_grad else None)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        # Scaled in float32: with float16 and a loss scaler, the factor alone may leave float16's range.
        grad_hidden = (grad_hidden.float() * grad_loss).to(grad_hidden.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def linear_cross_entropy(hidden_states, weight, targets, num_items_in_batch=None, ignore_index=-100):
    """Cross-entropy of `softmax(hidden_states @ weight.T)` without ever holding the whole logits.

    Matrix products run in the autocast type where autocast is on, else in the type of `hidden_states`;
    log-softmax, the sum over targets and the weight's gradient are float32.

    Args:
        hidden_states: (N, C).
        weight: (V, C), the output embedding.
        targets: (N,) int64, already shifted; `ignore_index` does not count.
        num_items_in_batch: the sum is divided by this number (int or 0-d tensor): the targets of the whole
            global step. None divides by the targets at hand: a mean, NaN if there are none.

    Returns:
        A 0-d float32 tensor, in nats per target.
    """
    device_type, dtype = hidden_states.device.type, hidden_states.dtype
    without_autocast: AbstractContextManager = nullcontext()
    if device_type != "meta":  # which autocast does not know
        without_autocast = torch.autocast(device_type, enabled=False)
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
    # The products are in `dtype` by our own hand; autocast would only cast, and cache, the weight once more.
    with without_autocast:
        if torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad):
            loss = _SummedLinearCrossEntropy.apply(
                hidden_states, weight, targets, ignore_index, dtype, weight.requires_grad
            )
        else:
            loss = hidden_states.new_zeros((), dtype=torch.float32)
            w = weight.to(dtype)
            for x, y, counts in _loss_chunks(hidden_states, targets, ignore_index):
                loss = loss + _chunk_losses(x.to(dtype), w, y, counts)[0].sum()
        if num_items_in_batch is None:
            num_items_in_batch = (targets != ignore_index).sum()
        elif torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch


# ----------------------------------------------------------------------------------------------------------
# Attention.

# On a CPU torch's fused attention multiplies bfloat16 several times slower than its matrix products do, so
# there training takes causal attention as products of this many queries with the keys that they see …
ATTENTION_BLOCK = 128
# … in rows up to this length: the weights stay for the backward, and their memory grows with the square.
ATTENTION_BLOCKS_LONGEST = 512


class AttentionInBlocks(torch.autograd.Function):
    """`query`, `key`, `value` (B, H, T, D) to (B, T, H, D).

    Each position sees itself and those before or, with `visible` (B or 1, H or 1, T, T) bool, where that is
    true; one that sees nothing gets zeros.
    """

    @staticmethod
    def forward(ctx, query, key, value, scaling, visible, dropout):
        B, H, T, D = query.shape
        q, k, v = ((x.reshape(B * H, T, D)) for x in (query * scaling, key, value))
        future = q.new_full((ATTENTION_BLOCK, ATTENTION_BLOCK), -math.inf).triu(1)
        attended, kept, spans = q.new_empty(B, T, H, D), [], _spans(T, visible)
        for start, end, first, last in spans:
            scores = q[:, start:end] @ k[:, first:last].mT
            if visible is None:
                scores[:, :, start:] += future[: end - start, : end - start]
            else:
                unseen = ~visible[:, :, start:end, first:last]
                scores.view(B, H, *scores.shape[1:]).masked_fill_(unseen, torch.finfo(scores.dtype).min)
            weights = scores.softmax(-1)
            if visible is not None and (blind := unseen.all(-1, keepdim=True)).any():
                weights.view(B, H, *weights.shape[1:]).masked_fill_(blind, 0)
            stays = dropout_mask(weights, dropout) if dropout else None
            dropped = weights if stays is None else weights * stays / (1 - dropout)
            attended[:, start:end] = (dropped @ v[:, first:last]).view(B, H, -1, D).transpose(1, 2)
            kept += [weights, stays]
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scaling, ctx.dropout, ctx.spans = scaling, dropout, spans
        return attended

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_attended):
        q, k, v, *kept = ctx.saved_tensors
        B, T, H, D = grad_attended.shape
        grad = grad_attended.transpose(1, 2).reshape(B * H, T, D)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros_like(k, dtype=torch.float32) for _ in range(2))  # sums over blocks
        for (start, end, first, last), weights, stays in zip(ctx.spans, kept[::2], kept[1::2], strict=True):
            grad_weights, dropped = grad[:, start:end] @ v[:, first:last].mT, weights
            if stays is not None:
                grad_weights, dropped = (x * stays / (1 - ctx.dropout) for x in (grad_weights, weights))
            grad_v[:, first:last] += dropped.mT @ grad[:, start:end]
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_q[:, start:end] = grad_scores @ k[:, first:last]
            grad_k[:, first:last] += grad_scores.mT @ q[:, start:end]
        grads = (grad_q * ctx.scaling, grad_k.to(k.dtype), grad_v.to(v.dtype))
        return *(x.view(B, H, T, D) for x in grads), None, None, None


def _spans(T, visible):
    """Of each block of queries its first and last + 1, and those of the keys that any of them sees."""
    blocks = [(start, min(start + ATTENTION_BLOCK, T)) for start in range(0, T, ATTENTION_BLOCK)]
    if visible is None:
        return [(start, end, 0, end) for start, end in blocks]
    spans = []
    for start, end in blocks:
        keys = visible[:, :, start:end].any(0).flatten(0, 1).any(0).nonzero().flatten().tolist() or [0, T - 1]
        spans.append((start, end, keys[0], keys[-1] + 1))
    return spans
