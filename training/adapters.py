"""LoRA (Hu et al. 2021) through PEFT: attached to any causal model, or refused with what it could fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from transformers.pytorch_utils import Conv1D

from training.base import will_be_converted
from training.export import export_model, set_aside
from training.finetuning import FinetuneSettings
from training.settings import SettingsError

# In the run directory: the adapter of a merged export, and the stock GPT-2 that was converted, which the
# adapter needs in that form.
ADAPTER_FOLDER, BASE_FOLDER = "adapter", "base"


def attach_lora(settings: FinetuneSettings, model: Any) -> Any:
    """`model` with trainable low-rank updates beside its frozen weights, the same on every process.

    Raises:
        SettingsError: if PEFT is not installed, or some target names no layer; the message has what there is.
    """
    try:
        import peft
    except ImportError as error:
        raise SettingsError("--method lora needs a package: pip install peft") from error
    targets = settings.lora_targets
    candidates = sorted(
        {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    )
    names = [name for name, _ in model.named_modules()]
    is_all = list(targets) == ["all-linear"]
    unknown = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    if not targets or (unknown and not is_all):
        raise SettingsError(
            f"--lora_targets {' '.join(unknown) or '(none)'}: no layer of this {type(model).__name__} is "
            f"called so. It has {', '.join(candidates)}; all-linear takes each but the head."
        )
    # Where the adapter will look for its base, from whatever folder it is loaded; an id of the Hub stays one.
    base = settings.model
    if will_be_converted(settings):
        base = str(Path(settings.run_dir, BASE_FOLDER).absolute())
    elif Path(base).exists():
        base = str(Path(base).absolute())
    set_seed(settings.seed)
    config = peft.LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if is_all else list(targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        # Stock GPT-2's layers are transposed.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    model.name_or_path = base  # which PEFT writes down
    adapted = peft.get_peft_model(model, config)
    return adapted


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds an adapter, not a whole model."""
    return (folder / "adapter_config.json").is_file()


def with_adapter(base: Any, folder: Path, *, merge: bool) -> Any:
    """`base` with the adapter of `folder` beside its weights, or added to them.

    Raises:
        SettingsError: if the adapter belongs to a model of another shape or architecture.
    """
    import peft

    try:
        adapted = peft.PeftModel.from_pretrained(base, folder)
    except (ValueError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(
            f"the adapter in {folder} does not fit this {type(base).__name__}: {reason} An adapter can be "
            "merged only into the model that it was trained on; give that one with --model."
        ) from error
    return adapted.merge_and_unload() if merge else adapted


def finish_lora(
    settings: FinetuneSettings,
    load_base: Callable[[FinetuneSettings], Any],
    tokenizer: Any,
    generation_config: Any,
    say: Callable[[str], object],
) -> None:
    """Give a run that ended with an adapter as its export what belongs to it.

    That is the base, if it was converted, and an export of whole weights with the adapter beside it, unless
    `merge` is false. Every process calls this. An adapter of an earlier end of the run is renamed, not
    overwritten. A kill after that leaves no export: the same command exports the adapter again and merges it.

    Raises:
        SettingsError: as `with_adapter` and `export_model` do.
    """
    accelerator, run_dir = Accelerator(), Path(settings.run_dir)
    export, adapter, base = run_dir / "export", run_dir / ADAPTER_FOLDER, run_dir / BASE_FOLDER
    is_alone, is_converted = is_adapter(export), will_be_converted(settings)
    if is_converted and not base.exists():
        converted = load_base(settings)
        converted.generation_config = generation_config  # where transformers looks for an adapter's
        export_model(accelerator, converted, tokenizer, base)
    if is_alone and settings.merge:
        merged = with_adapter(load_base(settings), export, merge=True)
        merged.generation_config = generation_config
        accelerator.wait_for_everyone()  # all have read the adapter
        if accelerator.is_main_process:
            if adapter.exists():
                set_aside(adapter)
            export.rename(adapter)
        export_model(accelerator, merged, tokenizer, export)
    elif is_alone and not is_converted:
        say("An adapter alone writes by its base's generation config; --merge makes one model of the two.")
    accelerator.wait_for_everyone()
