"""A model and its tokenizer from a folder or the Hub, ready to be evaluated."""

import torch
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
