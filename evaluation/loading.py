"""A model and its tokenizer from a folder or the Hub, ready to be evaluated; what tells it from others."""

import hashlib
import json
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {
    "no": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}


def load_causal_model(
    name: str, *, dtype: str, device: torch.device, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model called `name` with its weights in `dtype` (a key of DTYPES), and its tokenizer.

    Raises:
        ValueError: if nothing of that name loads; the message says what transformers found missing.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=DTYPES[dtype],
            trust_remote_code=trust_remote_code,
            use_safetensors=True,  # nothing from elsewhere is unpickled
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load the model {name!r}, neither as a folder nor from the Hub: {error}"
        ) from error
    return model.eval().to(device), tokenizer  # type: ignore[arg-type]


def identify(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """All that decides a model's scores and texts: hashes of weights, configuration, tokenizer; the dtype.

    Where the model came from is no part of it, nor is the version of transformers.
    """
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    # What saving writes into a configuration says nothing about what the model computes.
    left_out = ("_name_or_path", "transformers_version", "architectures", "dtype")
    config = {
        name: value
        for name, value in model.config.to_dict().items()  # type: ignore[operator, union-attr]
        if name not in left_out
    }
    return {
        "weights_sha256": weights.hexdigest(),
        "config_sha256": _hash(config),
        "tokenizer_sha256": _hash(_tokenizer_state(tokenizer)),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides the ids of a text: in a fast tokenizer also merges, normaliser and post-processor."""
    added = {name: value for name, value in tokenizer.init_kwargs.items() if name.startswith("add_")}
    state = {"class": type(tokenizer).__name__, "special": tokenizer.special_tokens_map, **added}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return state | {"vocabulary": tokenizer.get_vocab()}
    # Each call may set these two anew.
    whole = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
    return state | {"backend": whole}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
