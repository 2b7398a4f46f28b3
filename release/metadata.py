"""The part of a model card that the Hub reads: what the model is, and its results as a `model-index`."""

import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from release.record import Record, is_number, wilson_interval

# Sources with a name of their own, as datasets of the Hub.
HUB_DATASETS = {"fineweb-edu": "HuggingFaceFW/fineweb-edu"}


def card_metadata(record: Record, name: str, license: str | None, language: str | None) -> ModelCardData:
    """The card's metadata; `license` and `language` as the owner says, or nothing."""
    dataset = _hub_dataset(record.settings.get("source") or record.receipt.get("source"))
    base = record.settings.get("model") if record.is_dungeons else None
    is_hub_id = isinstance(base, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    tags = ["gpt2", "gpt-scratch", *(["custom_code"] if "auto_map" in record.config else [])]
    tags += [] if record.config else ["lora"]
    return ModelCardData(
        language=language,
        license=license,
        library_name="transformers" if record.config else "peft",
        pipeline_tag="text-generation",
        tags=[*tags, *(["dungeons"] if record.is_dungeons else [])],
        datasets=[dataset] if dataset and not record.is_dungeons else None,
        base_model=base if is_hub_id else None,
        model_name=name,
        eval_results=None if record.quantisation else _eval_results(record) or None,
    )


def _eval_results(record: Record) -> list[EvalResult]:
    results = []
    validation, source = record.validation, record.receipt.get("source")
    if validation:
        shown = (
            "dungeon rooms" if record.is_dungeons else without_path(source) or "the training data's source"
        )
        loss, bits = validation["validation_loss"], validation.get("bits_per_byte")
        numbers = {"loss": ("Validation loss (nats per token)", loss)}
        if loss < 30:  # past that e to its power says nothing
            numbers["perplexity"] = ("Validation perplexity", math.exp(loss))
        if is_number(bits):
            numbers["bits_per_byte"] = ("Validation bits per byte", bits)
        for metric, (metric_name, value) in numbers.items():
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=_hub_dataset(source) or "text",
                    dataset_name=f"{shown}, held out",
                    dataset_split="validation",
                    metric_type=metric,
                    metric_name=metric_name,
                    metric_value=round(value, 4),
                )
            )
    index = record.hellaswag.get("model-index")
    if index:
        results += model_index_to_eval_results(index)[1]
    elif found := hellaswag_in_training(record):
        share, total, (low, high) = found
        asked = record.settings.get("hellaswag_questions") or "unknown origin"
        is_hub = asked == "hub"
        results.append(
            EvalResult(
                task_type="text-generation",
                # A local file may hold anything.
                dataset_type="Rowan/hellaswag" if is_hub else "text",
                dataset_name="HellaSwag" if is_hub else f"HellaSwag questions of {Path(str(asked)).name}",
                dataset_split="validation" if is_hub else None,
                metric_type="acc_norm",
                metric_name="HellaSwag acc_norm",
                metric_value=round(share, 4),
                metric_args={"interval_95": [round(low, 4), round(high, 4)], "questions": total},
            )
        )
    return results


def hellaswag_in_training(record: Record) -> tuple[float, int, tuple[float, float]] | None:
    """The newest score of training, of how many questions, and its interval."""
    share, total = record.last("hellaswag_acc_norm"), record.last("hellaswag_questions")
    return (share, int(total), wilson_interval(share, int(total))) if is_number(share) and total else None


def _hub_dataset(source: Any) -> str | None:
    if not isinstance(source, str):
        return None
    return HUB_DATASETS.get(source) or (source.removeprefix("hub:") if source.startswith("hub:") else None)


def without_path(value: Any) -> str:
    """Of a path of this machine, the last part: nobody else's business, and no use to them."""
    if not isinstance(value, str):
        return ""
    return re.sub(r"(?<!\S)/\S*/([^/\s]+)/?", r"\1", value)
