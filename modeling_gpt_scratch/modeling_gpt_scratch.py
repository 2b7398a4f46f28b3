"""GPT-2, bottom up: attention, MLP, block, model, heads. This file travels with every checkpoint.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3. Next to
GPT-1: LayerNorm moved before each sub-block, one more after the last block, residual projections scaled at
initialisation. Weights map exactly onto transformers' GPT2LMHeadModel.

Shapes: B batch, T tokens, C model width (n_embd), H heads, D = C // H width per head, V vocabulary,
N = B * T, S tokens attended to (the cache's and the new ones).
"""

import math
from collections.abc import Callable
from typing import Any

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
    from .kernels_gpt_scratch import (
        ATTENTION_BLOCKS_LONGEST,
        AttentionInBlocks,
        Dropout,
        in_product_type,
        linear_cross_entropy,
        project,
    )
except ImportError:  # with this folder on sys.path
    from configuration_gpt_scratch import GPTScratchConfig  # type: ignore[no-redef]
    from kernels_gpt_scratch import (  # type: ignore[no-redef]
        ATTENTION_BLOCKS_LONGEST,
        AttentionInBlocks,
        Dropout,
        in_product_type,
        linear_cross_entropy,
        project,
    )

logger = logging.get_logger(__name__)

# transformers' name for past keys and values, in arguments and in outputs: `past_key_values` before 5.24.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

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
        self.resid_dropout = Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        B, T = hidden_states.shape[:2]
        heads = (B, T, -1, self.head_dim)  # -1: under tensor parallelism a device has a share of the heads
        hidden_states = in_product_type(hidden_states)
        # Called by name, not through `project` as the others: else servers do not see that they may be fused.
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)  # (B, H, T, D)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if past_key_values is not None:
            # Paged caches change the keyword arguments of the attention function.
            key, value = past_key_values.update(key, value, self.layer_idx, kwargs=kwargs)  # (B, H, S, D)

        if past_key_values is None and self._blocks_are_faster(query, attention_mask):
            dropout = self.config.attn_pdrop
            attended = AttentionInBlocks.apply(query, key, value, self.scaling, attention_mask, dropout)
            return self.resid_dropout(project(self.o_proj, attended.flatten(2))), None

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
        return self.resid_dropout(project(self.o_proj, attended)), weights

    def _blocks_are_faster(self, query, attention_mask) -> bool:
        """Whether this is training in bfloat16 on a CPU, in rows that are not too long."""
        T = query.shape[2]
        if (
            query.device.type != "cpu"
            or query.dtype != torch.bfloat16
            or T > ATTENTION_BLOCKS_LONGEST
            or not self.training
            or self.config._attn_implementation != "sdpa"
        ):
            return False
        # A compiler may neither look into a mask nor draw numbers in there.
        is_eager = not torch.compiler.is_compiling()
        if attention_mask is None:
            return self.is_causal and (is_eager or self.config.attn_pdrop == 0.0)
        has_all_pairs = attention_mask.dtype == torch.bool and attention_mask.shape[-2:] == (T, T)
        return has_all_pairs and is_eager


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
        self.resid_dropout = Dropout(config.resid_pdrop)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.resid_dropout(project(self.c_proj, self.act(project(self.c_fc, hidden_states))))


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
        past_key_values = kwargs.pop(CACHE, past_key_values)
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
    _skip_keys_device_placement = ["past_key_values", "cache"]
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
        self.drop = Dropout(config.embd_pdrop)
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
            past_key_values: keys and values of the tokens before; from transformers 5.24 on also called
                `cache`. Made here if `use_cache`, but never in training mode nor for packed documents: a
                cache would make one document see the next.

        Raises:
            ValueError: both or neither of ids and embeddings; a position of `n_positions` or more.
        """
        past_key_values = kwargs.pop(CACHE, past_key_values)
        if strangers := [name for name, value in kwargs.items() if isinstance(value, Cache)]:
            # Going on without it would give other tokens.
            raise TypeError(f"{strangers[0]}: past keys and values are taken as past_key_values or {CACHE}")
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
        is_flash = "flash" in self.config._attn_implementation
        if is_flash and document_starts is not None and "cu_seq_lens_q" not in kwargs:
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
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE: past_key_values},  # by this name checkpointing of activations leaves it out
                **kwargs,
            )
        hidden_states = self.ln_f(hidden_states)
        cache: dict[str, Any] = {CACHE: past_key_values}
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **cache)

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
            position_ids=position_ids,  # only the caller's: documents are told apart by their restarts
            **{CACHE: past_key_values},
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
            past_key_values=kwargs.pop(CACHE, past_key_values),
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
            logits = self.logits_of(hidden_states)
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
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def logits_of(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The head alone: last hidden states (..., C) to logits (..., V)."""
        return project(self.lm_head, hidden_states)

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

    def generate_batch(self, inputs, generation_config=None, **kwargs):  # type: ignore[override]
        """transformers' continuous batching: every prompt of `inputs`, lists of ids, is continued.

        Without `max_new_tokens`, here or in the configuration, as far as the longest prompt allows.

        Raises:
            ValueError: a prompt would run past `n_positions`; found in the midst, it would end all of them.
        """
        config = self.generation_config if generation_config is None else generation_config
        longest = max(map(len, inputs), default=0)
        room = self.config.n_positions - longest
        if kwargs.get("max_new_tokens") is None:
            kwargs["max_new_tokens"] = config.max_new_tokens or room
        if kwargs["max_new_tokens"] > room or room < 1:
            raise ValueError(
                f"a prompt of {longest} tokens and max_new_tokens={kwargs['max_new_tokens']} do not fit into "
                f"n_positions={self.config.n_positions}; shorten the prompt or ask for fewer."
            )
        return super().generate_batch(inputs, generation_config, **kwargs)


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
