"""GPT-2, bottom up: loss, attention, MLP, block, model, heads. This file travels with every checkpoint.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3. Next to
GPT-1: LayerNorm moved before each sub-block, one more after the last block, residual projections scaled at
initialisation. Weights map exactly onto transformers' GPT2LMHeadModel.

Shapes: B batch, T tokens, C model width (n_embd), H heads, D = C // H width per head, V vocabulary,
N = B * T, S tokens attended to (the cache's and the new ones).
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

try:  # as a package, and as a checkpoint's remote code
    from .configuration_gpt_scratch import GPTScratchConfig
except ImportError:  # with this folder on sys.path
    from configuration_gpt_scratch import GPTScratchConfig  # type: ignore[no-redef]

logger = logging.get_logger(__name__)

# ----------------------------------------------------------------------------------------------------------
# Loss. Logits are the largest tensor of a small language model by far (64 x 1,024 x 50,304 in float32 is
# 13 GB), and training needs only their gradient. So they are built a few rows at a time.

# More rows per matrix product are faster, fewer take less memory: at most this many chunks …
LOSS_CHUNKS = 8
# … of at least this many rows, below which matrix products lose their speed.
LOSS_CHUNK_ROWS = 256


def _loss_chunks(hidden_states, targets, ignore_index):
    """Cut N rows into few runs of n: states (n, C), targets (n, 1) with 0 for ignored, who counts (n, 1)."""
    counts = (targets != ignore_index).unsqueeze(1)
    targets = targets.unsqueeze(1).masked_fill(~counts, 0)
    n_chunks = max(1, min(LOSS_CHUNKS, hidden_states.shape[0] // LOSS_CHUNK_ROWS))
    return zip(*(tensor.chunk(n_chunks) for tensor in (hidden_states, targets, counts)), strict=True)


def _chunk_losses(hidden_states, weight, targets, counts):
    """Cross-entropy of one chunk, in float32 and in a single (n, V) buffer.

    Returns the losses (n, 1), zero where ignored; softmax's numerators (n, V) and what makes them
    probabilities, or zero where ignored (n, 1).
    """
    logits = (hidden_states @ weight.T).float()
    logits.sub_(logits.amax(dim=1, keepdim=True))
    target_logits = logits.gather(1, targets)
    numerators = logits.exp_()
    sums = numerators.sum(dim=1, keepdim=True)
    return (sums.log() - target_logits) * counts, numerators, counts / sums


class _SummedLinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden_states @ weight.T`; gradients are taken while a chunk is at hand.

    Nothing is recomputed in backward: both gradients of the sum are known after the forward pass, and
    backward only multiplies them by what comes in.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, targets, ignore_index, dtype, weight_needs_grad):
        loss = hidden_states.new_zeros((), dtype=torch.float32)
        # Sums over chunks are kept in float32 whatever the products are in.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if weight_needs_grad else None
        grad_hidden = []
        w = weight.to(dtype)
        for x, y, counts in _loss_chunks(hidden_states, targets, ignore_index):
            x = x.to(dtype)
            losses, softmax, factors = _chunk_losses(x, w, y, counts)
            loss = loss + losses.sum()
            # d loss / d logits = softmax - one_hot, made in the buffer that the logits were in.
            softmax.mul_(factors).scatter_add_(1, y, -counts.float())
            grad_logits = softmax.to(dtype)
            del softmax
            grad_hidden.append((grad_logits @ w).to(hidden_states.dtype))
            if grad_weight is not None:
                if dtype == torch.float32:
                    grad_weight.addmm_(grad_logits.T, x)
                else:  # in slices: adding mixed types first copies the lower one, whole, to float32
                    for rows, columns in zip(
                        grad_weight.chunk(LOSS_CHUNKS), grad_logits.chunk(LOSS_CHUNKS, dim=1), strict=True
                    ):
                        rows += columns.T @ x
            del grad_logits  # or it would live through the next chunk's logits
        ctx.save_for_backward(torch.cat(grad_hidden), grad_weight)
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
    if torch.amp.is_autocast_available(device_type):  # not on the meta device
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
# Attention, MLP, block.


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention spelled out: the reference for every faster implementation, and the one that shows weights.

    `query` (B, H, T, D), `key` and `value` (B, H, S, D), `attention_mask` (B, 1, T, S) added to the scores.
    Returns (B, T, H, D) and the weights (B, H, T, S).
    """
    scores = (query @ key.transpose(2, 3)) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


# On a CPU torch's fused attention multiplies bfloat16 several times slower than its matrix products do, so
# there training takes causal attention as products of this many queries with the keys that they see …
ATTENTION_BLOCK = 128
# … in rows up to this length: the weights stay for the backward, and their memory grows with the square.
ATTENTION_BLOCKS_LONGEST = 512


class _CausalAttentionInBlocks(torch.autograd.Function):
    """`query`, `key`, `value` (B, H, T, D), each position seeing itself and those before, to (B, T, H, D)."""

    @staticmethod
    def forward(ctx, query, key, value, scaling):
        B, H, T, D = query.shape
        q, k, v = ((x.reshape(B * H, T, D)) for x in (query * scaling, key, value))
        future = q.new_full((ATTENTION_BLOCK, ATTENTION_BLOCK), -math.inf).triu(1)
        attended, kept = q.new_empty(B, T, H, D), []
        for start in range(0, T, ATTENTION_BLOCK):
            end = min(start + ATTENTION_BLOCK, T)
            scores = q[:, start:end] @ k[:, :end].mT
            scores[:, :, start:] += future[: end - start, : end - start]
            weights = scores.softmax(-1)
            attended[:, start:end] = (weights @ v[:, :end]).view(B, H, -1, D).transpose(1, 2)
            kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scaling = scaling
        return attended

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_attended):
        q, k, v, *kept = ctx.saved_tensors
        B, T, H, D = grad_attended.shape
        grad = grad_attended.transpose(1, 2).reshape(B * H, T, D)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros_like(k, dtype=torch.float32) for _ in range(2))  # sums over blocks
        for start, weights in zip(range(0, T, ATTENTION_BLOCK), kept, strict=True):
            end = min(start + ATTENTION_BLOCK, T)
            grad_v[:, :end] += weights.mT @ grad[:, start:end]
            grad_weights = grad[:, start:end] @ v[:, :end].mT
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_q[:, start:end] = grad_scores @ k[:, :end]
            grad_k[:, :end] += grad_scores.mT @ q[:, start:end]
        grads = (grad_q * ctx.scaling, grad_k.to(k.dtype), grad_v.to(v.dtype))
        return *(x.view(B, H, T, D) for x in grads), None


class GPTScratchAttention(nn.Module):
    """Causal multi-head self-attention. The product itself is one of transformers' attention functions."""

    def __init__(self, config: GPTScratchConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.num_key_value_groups = 1  # every query head has its own keys; paged attention asks
        # Three projections rather than GPT-2's fused one: tensor parallelism, LoRA and quantisers know them.
        self.q_proj = nn.Linear(config.n_embd, config.n_embd)
        self.k_proj = nn.Linear(config.n_embd, config.n_embd)
        self.v_proj = nn.Linear(config.n_embd, config.n_embd)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd)
        self.o_proj._is_residual_proj = True  # type: ignore[assignment]
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        B, T = hidden_states.shape[:2]
        heads = (B, T, -1, self.head_dim)  # -1: under tensor parallelism a device has a share of the heads
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)  # (B, H, T, D)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, H, S, D)

        if past_key_values is None and self._blocks_are_faster(query, attention_mask):
            attended = _CausalAttentionInBlocks.apply(query, key, value, self.scaling)
            return self.resid_dropout(self.o_proj(attended.flatten(2))), None

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attn_pdrop if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )  # (B, T, H, D)
        attended = attended.reshape(B, T, -1).contiguous()
        return self.resid_dropout(self.o_proj(attended)), weights

    def _blocks_are_faster(self, query, attention_mask) -> bool:
        """Whether this is plain causal training in bfloat16 on a CPU, in rows that are not too long."""
        return (
            query.device.type == "cpu"
            and query.dtype == torch.bfloat16
            and query.shape[2] <= ATTENTION_BLOCKS_LONGEST
            and self.training
            and attention_mask is None
            and self.is_causal
            and self.config.attn_pdrop == 0.0
            and self.config._attn_implementation == "sdpa"
        )


class GPTScratchMLP(nn.Module):
    def __init__(self, config: GPTScratchConfig):
        super().__init__()
        n_inner = 4 * config.n_embd if config.n_inner is None else config.n_inner
        self.c_fc = nn.Linear(config.n_embd, n_inner)
        self.act = nn.GELU(
            approximate="tanh"
        )  # GPT-2's approximation (Hendrycks & Gimpel 2016), kept for parity
        self.c_proj = nn.Linear(n_inner, config.n_embd)
        self.c_proj._is_residual_proj = True  # type: ignore[assignment]
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.resid_dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class GPTScratchBlock(GradientCheckpointingLayer):
    """Attention, then MLP, each on a normalised copy of the residual stream and added back to it."""

    def __init__(self, config: GPTScratchConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPTScratchAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPTScratchMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        attended, _ = self.attn(
            self.ln_1(hidden_states), attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.ln_2(hidden_states))


# ----------------------------------------------------------------------------------------------------------
# The model and its heads.


class GPTScratchPreTrainedModel(PreTrainedModel):
    config: GPTScratchConfig
    config_class = GPTScratchConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    _no_split_modules = ["GPTScratchBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": GPTScratchBlock, "attentions": GPTScratchAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # `init` leaves alone what a checkpoint has filled in.
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            # Residual branches add up 2 * n_layer times; shrinking each keeps the variance flat.
            if getattr(module, "_is_residual_proj", False):
                std = std / math.sqrt(2 * self.config.n_layer)
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class GPTScratchModel(GPTScratchPreTrainedModel):
    """Token and position embeddings, `n_layer` blocks, a last LayerNorm: (B, T) ids to (B, T, C) states."""

    def __init__(self, config: GPTScratchConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([GPTScratchBlock(config, layer_idx) for layer_idx in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the last LayerNorm.

        Args:
            input_ids: (B, T) token ids; or `inputs_embeds` (B, T, C) in their place.
            attention_mask: (B, S) with 0 at padding, or (B, 1, T, S) as the attention function takes it.
            position_ids: (B, T); counted from the cache's length if not given. Where they restart, a new
                document begins, and none sees another (only without a mask and without a cache).
            past_key_values: keys and values of the tokens before. Made here if `use_cache`, but never in
                training mode nor for packed documents: a cache would make one document see the next.

        Raises:
            ValueError: both or neither of ids and embeddings; a position of `n_positions` or more.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)  # (B, T, C)

        document_starts = None
        if position_ids is not None:
            self._check_positions(position_ids)
            if attention_mask is None and past_key_values is None:
                document_starts = _find_document_starts(position_ids)
        if use_cache and past_key_values is None and not self.training and document_starts is None:
            past_key_values = DynamicCache(config=self.config)

        mask = self._causal_mask(inputs_embeds, attention_mask, past_key_values, position_ids)
        if document_starts is not None and "flash" in self.config._attn_implementation:
            kwargs.update(_flash_document_lengths(document_starts, inputs_embeds.shape[0]))
        if position_ids is None:
            position_ids = self._positions(inputs_embeds, past_key_values)

        hidden_states = inputs_embeds
        # A later stage of a pipeline is handed states that hold the positions already; the stages that vLLM
        # leaves out are PPMissingLayer.
        if type(self.h[0]).__name__ != "PPMissingLayer":
            hidden_states = self.drop(hidden_states + self.wpe(position_ids))
        for block in self.h:
            hidden_states = block(
                hidden_states,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                use_cache=use_cache,
                **kwargs,
            )
        hidden_states = self.ln_f(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)

    def _causal_mask(self, inputs_embeds, attention_mask, past_key_values, position_ids):
        if (
            self.config._attn_implementation == "sdpa"
            and attention_mask is None
            and past_key_values is None
            and position_ids is None
            and getattr(self.config, "is_causal", True)
        ):
            # SDPA's own is_causal reaches the flash kernels. create_causal_mask finds that out by itself, but
            # not while compiling, where it would hand over a whole matrix.
            return None
        return create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,  # only the caller's: documents are told apart by their restarts
        )

    def _positions(self, inputs_embeds, past_key_values):
        T = inputs_embeds.shape[1]
        past_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
        # A static cache counts in a tensor; reading it would wait for the device.
        if isinstance(past_tokens, int) and past_tokens + T > self.config.n_positions:
            raise ValueError(
                f"{past_tokens + T} tokens ({past_tokens} in the cache, {T} new) do not fit into "
                f"n_positions={self.config.n_positions}; shorten the input (tokenizer(..., truncation=True, "
                f"max_length={self.config.n_positions}))."
            )
        return (torch.arange(T, device=inputs_embeds.device) + past_tokens).unsqueeze(0)

    def _check_positions(self, position_ids):
        # On an accelerator the look costs a wait, so training and single-token steps go without.
        on_cpu = position_ids.device.type == "cpu"
        if is_tracing(position_ids) or position_ids.is_meta or position_ids.numel() == 0:
            return
        if (on_cpu or (not self.training and position_ids.shape[-1] > 1)) and (
            (last := int(position_ids.max())) >= self.config.n_positions
        ):
            raise ValueError(
                f"position_ids reach {last}, but n_positions={self.config.n_positions} allows 0 to "
                f"{self.config.n_positions - 1}; shorten the input or restart positions at each document."
            )


def _find_document_starts(position_ids):
    """(B, T) bool, true where a packed document begins, or None if each row is one run of positions."""
    starts = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1
    # While compiling nobody can look: taken as packed, which is right for either.
    if not is_tracing(starts) and not starts.is_meta and not starts.any():
        return None
    return starts


def _flash_document_lengths(document_starts, batch_size):
    """FlashAttention's variable-length arguments, once per forward rather than once per layer.

    By itself it tells documents apart only in a batch of one row.
    """
    starts = document_starts.expand(batch_size, -1).clone()
    starts[:, 0] = True
    flat = starts.flatten()
    ends = torch.tensor([flat.numel()], device=flat.device)
    cu_seq_lens = torch.cat([flat.nonzero().flatten(), ends]).to(torch.int32)
    max_length = int(cu_seq_lens.diff().max())
    return {
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": max_length,
        "max_length_k": max_length,
    }


class GPTScratchForCausalLM(GPTScratchPreTrainedModel, GenerationMixin):
    """GPT-2 with its language-modelling head, tied to the token embedding."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]
    # No _fsdp_plan: sharded as a module of its own, the head's weight is out of the chunked loss's reach.

    def __init__(self, config: GPTScratchConfig):
        super().__init__(config)
        self.transformer = GPTScratchModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), and the loss in nats per target if `labels` are given.

        Args:
            labels: (B, T); the model shifts them, and -100 does not count. With `shift_labels` among the
                keyword arguments, those are taken as they are.
            logits_to_keep: logits, and loss, of the last so many positions, or of these indices; 0 is all.
            skip_logits: return no logits, only the loss, and never build them whole. By default so in
                training mode with labels.
            kwargs: `num_items_in_batch` divides the summed loss (see `linear_cross_entropy`); the rest goes
                to the attention function.

        Raises:
            ValueError: as GPTScratchModel; `skip_logits` without labels.
        """
        loss_kwargs = {
            name: kwargs.pop(name)
            for name in ("num_items_in_batch", "shift_labels", "ignore_index")
            if name in kwargs
        }
        targets = loss_kwargs.pop("shift_labels", None)
        if skip_logits is None:
            skip_logits = self.training and not (labels is None and targets is None)
        if skip_logits and labels is None and targets is None:
            raise ValueError(
                "skip_logits=True leaves nothing to return without labels; pass labels or drop it"
            )

        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        assert outputs.last_hidden_state is not None
        hidden_states = outputs.last_hidden_state[:, kept]  # (B, kept, C)
        if targets is None and labels is not None:
            # Position t predicts token t + 1; the last one has nothing to predict.
            targets = F.pad(labels[:, 1:], (0, 1), value=loss_kwargs.get("ignore_index", -100))
        if targets is not None:
            targets = targets[:, kept].to(hidden_states.device).contiguous()

        loss = logits = None
        if skip_logits and targets is not None and self._head_is_plain():
            loss = linear_cross_entropy(
                hidden_states.flatten(0, 1), self.lm_head.weight, targets.flatten(), **loss_kwargs
            )
        else:
            logits = self.lm_head(hidden_states)
            if targets is not None:
                loss = self.loss_function(
                    logits=logits,
                    labels=labels,
                    vocab_size=logits.shape[-1],
                    shift_labels=targets,
                    **loss_kwargs,
                )
            if skip_logits:
                logits = None
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _head_is_plain(self) -> bool:
        """Whether `lm_head.weight` alone says what the head does.

        Adapters, tensor parallelism and offloading wrap the module or its forward, and a user may have set
        another loss; then the head is called as a module and the loss as a function.
        """
        head = self.lm_head
        return (
            type(head) is nn.Linear
            and "forward" not in vars(head)
            and not head._forward_pre_hooks
            and not head._forward_hooks
            and self.loss_function is ForCausalLMLoss
        )

    def _prepare_generated_length(self, generation_config, **kwargs):  # type: ignore[override]
        """Generation ends at `n_positions`, with a warning; a prompt as long as that is refused.

        Learned positions end there: the next token would be an index error from deep inside.
        """
        n_positions = self.config.n_positions
        input_ids_length = kwargs["input_ids_length"]
        prompt_tokens = max(input_ids_length, kwargs["inputs_tensor"].shape[1])
        if prompt_tokens >= n_positions:
            raise ValueError(
                f"the prompt has {prompt_tokens} tokens, padding included; n_positions={n_positions} leaves "
                f"no room for a new one; shorten it to {n_positions - 1} or fewer (tokenizer(..., "
                f"truncation=True, max_length={n_positions - 1}))."
            )
        generation_config = super()._prepare_generated_length(generation_config, **kwargs)  # type: ignore[misc]
        # With inputs_embeds, max_length counts new tokens only.
        longest = n_positions - (prompt_tokens - input_ids_length)
        if generation_config.max_length > longest:
            logger.warning_once(
                f"Generation will end after {n_positions} tokens in all (n_positions); "
                f"{generation_config.max_length - longest} fewer than asked for."
            )
            generation_config.max_length = longest
        return generation_config


class GPTScratchForSequenceClassification(GenericForSequenceClassification, GPTScratchPreTrainedModel):
    base_model_prefix = "transformer"


class GPTScratchForTokenClassification(GenericForTokenClassification, GPTScratchPreTrainedModel):
    base_model_prefix = "transformer"


class GPTScratchForQuestionAnswering(GenericForQuestionAnswering, GPTScratchPreTrainedModel):
    base_model_prefix = "transformer"

    def get_input_embeddings(self):
        return self.transformer.wte  # type: ignore[union-attr]

    def set_input_embeddings(self, value):
        self.transformer.wte = value  # type: ignore[union-attr]


__all__ = [
    "GPTScratchForCausalLM",
    "GPTScratchForQuestionAnswering",
    "GPTScratchForSequenceClassification",
    "GPTScratchForTokenClassification",
    "GPTScratchModel",
    "GPTScratchPreTrainedModel",
]
