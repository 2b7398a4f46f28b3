"""The model that fine-tuning starts from, whatever its architecture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from training.finetuning import FinetuneSettings
from training.settings import SettingsError

# Tokens of the context that the export's default length leaves free.
PLACE_FOR_A_PROMPT = 64
DROPOUT_RATES = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def will_be_converted(settings: FinetuneSettings) -> bool:
    """Whether the base is a stock GPT-2 that becomes ours.

    Raises:
        SettingsError: if there is no model, or conversion is insisted on and it is not a stock GPT-2.
    """
    kind = _model_type(settings.model)
    if settings.convert == "yes" and kind != "gpt2":
        raise SettingsError(
            f"--convert yes: {settings.model} holds a model of type {kind!r}, and only stock GPT-2 ('gpt2') "
            "can become ours. Leave --convert out to train it as it is."
        )
    return kind == "gpt2" and settings.convert != "no"


def load_base(settings: FinetuneSettings, convert: Callable[..., Any]) -> Any:
    """The base in float32, a stock GPT-2 through `convert` if the settings do not say otherwise.

    Raises:
        SettingsError: if it cannot be loaded, or does not know the settings' dropout.
    """
    rates = dict.fromkeys(DROPOUT_RATES, settings.dropout)
    options: dict[str, Any] = {"dtype": torch.float32}
    try:
        if will_be_converted(settings):
            return convert(settings.model, **options, **rates)
        if _model_type(settings.model) in ("gpt_scratch", "gpt2"):
            options |= rates
        elif settings.dropout:
            raise SettingsError(f"--dropout {settings.dropout} is for GPT-2s, not for {settings.model}")
        return AutoModelForCausalLM.from_pretrained(
            settings.model,
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,  # nothing from elsewhere is unpickled
            **options,
        )
    except (OSError, ImportError) as error:
        raise SettingsError(f"--model {settings.model} cannot be loaded: {error}") from error


def context_of(model: Any, otherwise: int) -> int:
    """Tokens that the model can read at once; `otherwise` where it does not say."""
    return getattr(model.config, "max_position_embeddings", None) or otherwise


def writing_config(settings: FinetuneSettings, model: Any, tokenizer: Any, longest: int) -> GenerationConfig:
    """How the export writes if not told otherwise; `longest`, in tokens, is that of what it was shown."""
    room_left = context_of(model, settings.block_size) - PLACE_FOR_A_PROMPT
    return GenerationConfig(
        do_sample=True,
        temperature=settings.sample_temperature,
        top_p=settings.sample_top_p,
        repetition_penalty=settings.repetition_penalty,
        max_new_tokens=max(1, min(longest, room_left)),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _model_type(name: str) -> str:
    advice = "Train the demo first (accelerate launch train_accelerate.py) or name another --model."
    if (Path(name) / "adapter_config.json").exists():
        raise SettingsError(
            f"--model {name} is an adapter without its base. Merge it (run finetune.py with the same "
            "--run_dir and --merge) and start from the result."
        )
    try:
        found, _ = PreTrainedConfig.get_config_dict(name)
    except OSError as error:
        raise SettingsError(f"no model at --model {name}. {advice} ({error})") from error
    if not found:
        raise SettingsError(f"no model at --model {name}: there is no config.json. {advice}")
    return str(found.get("model_type"))
