"""MAUVE: how near the distribution of generated texts is to that of written ones."""

import importlib.util
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from evaluation.isolation import bare_model, undisturbed
from evaluation.loading import load_causal_model


def require_mauve() -> None:
    """Raises: ValueError: if the package is not installed."""
    if importlib.util.find_spec("mauve") is None:
        raise ValueError("MAUVE needs a package: pip install mauve-text")


def mauve_scores(
    texts: Mapping[str, Sequence[str | None]],
    reference: str,
    feature_model: str,
    accelerator: Accelerator,
    *,
    trust_remote_code: bool = False,
) -> dict[str, float]:
    """For each writer but the `reference`, how near its texts are to that one's; 1 is the same.

    `feature_model` is a folder or Hub id of any causal language model. Scores compare only under one feature
    model and one number of texts; the authors (Pillutla et al. 2021) used GPT-2 large and 5,000 a side. Empty
    and missing texts are left out, and a writer of nothing else scores 0.

    Raises:
        ValueError: if the package is missing, the model does not load or the reference has no text.
    """
    require_mauve()
    from mauve import compute_mauve  # slow to import, and optional

    model, tokenizer = load_causal_model(
        feature_model, dtype="float32", device=accelerator.device, trust_remote_code=trust_remote_code
    )
    written = last_hidden_states(model, tokenizer, texts[reference], accelerator)
    if not len(written):
        raise ValueError(f"MAUVE needs texts of {reference!r} to compare with, and all of them are empty")
    scores = {}
    for writer, generated in texts.items():
        if writer == reference:
            continue
        features = last_hidden_states(model, tokenizer, generated, accelerator)
        if len(features):
            compared = compute_mauve(p_features=written, q_features=features, verbose=False)
            scores[writer] = float(compared.mauve)
        else:
            scores[writer] = 0.0
    return scores


def last_hidden_states(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | None],
    accelerator: Accelerator,
) -> np.ndarray:
    """The last layer's state at each text's last token, float32 (texts that are neither empty nor None, C).

    A text longer than the model's context is cut at its end.
    """
    context = getattr(bare_model(model).config, "max_position_embeddings", None)
    states = []
    with undisturbed(model):
        for text in filter(None, texts):
            ids = tokenizer(text)["input_ids"][:context]
            if not ids:
                continue
            input_ids = torch.tensor([ids], device=accelerator.device)
            output = model(input_ids=input_ids, output_hidden_states=True, use_cache=False)
            states.append(output.hidden_states[-1][0, -1].float().cpu())
    return torch.stack(states).numpy() if states else np.zeros((0, 0), dtype=np.float32)
