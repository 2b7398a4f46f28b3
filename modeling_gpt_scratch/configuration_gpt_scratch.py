"""What a GPT-2 is made of: sizes, dropout, token ids. This file travels with every checkpoint."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# GPT-2's four published sizes (Radford et al. 2019, table 2, with the parameter counts as later corrected)
# and two for a laptop. Everything not named here is the default below.
PRESETS: dict[str, dict[str, int]] = {
    "gpt2-124m": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-350m": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-774m": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-1558m": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    "demo": {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_positions": 256, "vocab_size": 4096},
    "tiny": {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 128, "vocab_size": 512},
}

# Auto classes find the code beside the weights through these names, with trust_remote_code=True.
AUTO_MAP = {
    "AutoConfig": "configuration_gpt_scratch.GPTScratchConfig",
    "AutoModel": "modeling_gpt_scratch.GPTScratchModel",
    "AutoModelForCausalLM": "modeling_gpt_scratch.GPTScratchForCausalLM",
    "AutoModelForSequenceClassification": "modeling_gpt_scratch.GPTScratchForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_gpt_scratch.GPTScratchForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_gpt_scratch.GPTScratchForQuestionAnswering",
}


@strict
class GPTScratchConfig(PreTrainedConfig):
    """Configuration of a GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

    Args:
        vocab_size: rows of the token embedding.
        n_positions: longest sequence in tokens; rows of the position embedding.
        n_embd: width of the residual stream; a multiple of `n_head`.
        n_layer: number of blocks.
        n_head: attention heads per block, each `n_embd // n_head` wide.
        n_inner: width of the MLP's hidden layer; None means `4 * n_embd`.
        resid_pdrop, embd_pdrop, attn_pdrop: dropout probability after each projection into the residual
            stream, on the embeddings, and on attention weights. Zero by default: a language model that sees
            each token once does not overfit, and fine-tuning can set them.
        layer_norm_epsilon: added to the variance in every LayerNorm.
        initializer_range: standard deviation of the normal initialisation.
        bos_token_id, eos_token_id, pad_token_id: token ids; GPT-2 has one `<|endoftext|>` for the first two.
        use_cache: return keys and values of past tokens in evaluation mode.
        tie_word_embeddings: one matrix embeds the tokens and predicts them.

    Raises:
        StrictDataclassFieldValidationError: a field has the wrong type.
        StrictDataclassClassValidationError: the fields do not fit one another; the message has the numbers.
    """

    model_type = "gpt_scratch"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # one thing, by its older and its newer name
    attribute_map = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    # How the base model is cut over devices. `wte` is named because transformers only guesses `embed_tokens`.
    base_model_tp_plan = {
        "wte": "embedding_rowwise",
        "h.*.attn.q_proj": "colwise",
        "h.*.attn.k_proj": "colwise",
        "h.*.attn.v_proj": "colwise",
        "h.*.attn.o_proj": "rowwise",
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    }
    base_model_pp_plan = {
        "wte": (["input_ids"], ["inputs_embeds"]),
        "wpe": (["position_ids"], ["inputs_embeds"]),
        "h": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "ln_f": (["hidden_states"], ["hidden_states"]),
    }
    base_model_fsdp_plan = {
        "wte": "free_full_weight",
        "h.*": "free_full_weight",
        "ln_f": "keep_full_weight",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    resid_pdrop: float | int = 0.0
    embd_pdrop: float | int = 0.0
    attn_pdrop: float | int = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float | int = 0.02
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        # Saving a causal model would name only its own class, and AutoModel could not open the folder.
        if kwargs.get("auto_map") is None:
            kwargs["auto_map"] = dict(AUTO_MAP)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Called by `@strict` on construction and before saving."""
        problems = [
            f"{name}={value} must be at least 1"
            for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        problems += [
            f"{name}={value} is a probability and must be at least 0 and below 1"
            for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")
            if not 0 <= (value := getattr(self, name)) < 1
        ]
        if self.layer_norm_epsilon <= 0:
            problems.append(f"layer_norm_epsilon={self.layer_norm_epsilon} must be above 0")
        if self.initializer_range < 0:
            problems.append(f"initializer_range={self.initializer_range} must not be negative")
        if self.n_head >= 1 and self.n_embd % self.n_head:
            problems.append(
                f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}: "
                f"a head would be {self.n_embd / self.n_head:.2f} wide"
            )
        if problems:
            raise ValueError("; ".join(problems))

    @classmethod
    def preset(cls, name: str, **overrides) -> "GPTScratchConfig":
        """The configuration of a published size (`gpt2-124m`, …) or a small one (`demo`, `tiny`).

        The small ones have no GPT-2 vocabulary, so `bos_token_id` and `eos_token_id` are their last id.

        Raises:
            ValueError: no preset has this name.
        """
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        fields: dict = {**PRESETS[name], **overrides}
        if "vocab_size" in fields:
            fields.setdefault("bos_token_id", fields["vocab_size"] - 1)
            fields.setdefault("eos_token_id", fields["vocab_size"] - 1)
        return cls(**fields)


__all__ = ["PRESETS", "GPTScratchConfig"]
