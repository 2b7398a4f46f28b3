"""A trained model as a folder for `from_pretrained`; also what makes checkpoints such folders."""

import copy
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging as transformers_logging

from training.files import explain_write_error, flush_folder, flush_tree
from training.settings import SettingsError
from training.weights import bare_model, is_adapted, named_weights, whole


def pretrained_companions(model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Every file but the weights that `from_pretrained` wants, by name: config, code, tokenizer.

    Ids that only pad the vocabulary are never generated from such a folder. Of a model with adapters, whose
    checkpoints hold no base, it is the adapter's configuration and the tokenizer.
    """
    tokenizer = ready_for_batches(tokenizer)
    with tempfile.TemporaryDirectory() as temporary:
        if is_adapted(model):
            model.peft_config[model.active_adapter].save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            return _contents(Path(temporary))
        model.config.save_pretrained(temporary)
        if getattr(model, "_auto_class", None) is not None:
            custom_object_save(model, temporary, config=model.config)
        if getattr(model, "generation_config", None) is not None:
            generation_config = copy.deepcopy(model.generation_config)
            padding_ids = list(range(len(tokenizer), model.config.vocab_size))
            generation_config.suppress_tokens = padding_ids or None
            generation_config.pad_token_id = tokenizer.pad_token_id
            generation_config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        return _contents(Path(temporary))


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def export_model(
    accelerator: Accelerator, model: nn.Module, tokenizer: PreTrainedTokenizerBase, out_dir: Path
) -> None:
    """Write weights, config, code, generation config and tokenizer; `out_dir` appears when all is there.

    The vocabulary is cut to the tokenizer's: rows that only padded it go, and other logits stay the same bit
    for bit. Of a model with adapters (PEFT) the adapter is written. An `out_dir` that exists is renamed, not
    overwritten. Every process calls this; the main process writes.

    Raises:
        SettingsError: if it cannot be written (disk full, no permission); nothing is left behind then.
    """
    bare: Any = bare_model(accelerator, model)
    # Gathering a sharded tensor takes every process; only the main one keeps the result.
    tokenizer = ready_for_batches(tokenizer)
    weights = {}
    for name, tensor in named_weights(bare).items():
        tensor = whole(tensor)
        if accelerator.is_main_process:
            weights[name] = tensor.cpu()
    if not accelerator.is_main_process:
        return
    transformers_logging.disable_progress_bar()  # two bars for a write of seconds
    exported, state_dict = bare, weights or None
    generation_config = copy.deepcopy(bare.generation_config)
    generation_config.pad_token_id = tokenizer.pad_token_id
    if bare.config.vocab_size > len(tokenizer) and not is_adapted(bare):
        config = copy.deepcopy(bare.config)
        config.vocab_size = len(tokenizer)
        embeddings = {
            id(m.weight) for m in (bare.get_input_embeddings(), bare.get_output_embeddings()) if m is not None
        }
        rows_per_token = {
            name for name, p in bare.named_parameters(remove_duplicate=False) if id(p) in embeddings
        }
        weights = {n: t[: len(tokenizer)] if n in rows_per_token else t for n, t in weights.items()}
        exported = type(bare).from_pretrained(None, config=config, state_dict=weights)
        state_dict = None
    temporary = out_dir.with_name(f".tmp-{out_dir.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        # PEFT would look for the base, even on the Hub, to see whether its vocabulary grew: here it does not.
        options = {"save_embedding_layers": False} if is_adapted(bare) else {}
        exported.save_pretrained(temporary, state_dict=state_dict, **options)
        (temporary / "README.md").unlink(missing_ok=True)  # PEFT's card is an empty form
        generation_config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for path in temporary.rglob("*"):  # safetensors files come out readable by their owner alone
            if path.is_file():
                path.chmod(0o644)
        flush_tree(temporary)
        set_aside(out_dir)
        temporary.rename(out_dir)
        flush_folder(out_dir.parent)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # The safetensors library reports a full disk as an error of its own, with the number in its text.
        cause = error if isinstance(error, OSError) else _os_error_in(error)
        if cause is None:
            raise
        raise SettingsError(explain_write_error(cause, "The export", out_dir)) from error


def set_aside(folder: Path) -> None:
    """Rename `folder`, if it is there, to its name with `-previous-` and the first number that is free."""
    if folder.exists():
        number = 1
        while (previous := folder.with_name(f"{folder.name}-previous-{number}")).exists():
            number += 1
        folder.rename(previous)


def ready_for_batches(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that pads prompts, on the left, so that a batch of them can be continued.

    A tokenizer without a padding token pads with its end token: padding is masked, its id never matters.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def how_to_load(export_dir: Path) -> str:
    """The path of an export and the lines that use it."""
    return (
        f"The model is in {export_dir}. To use it:\n\n"
        "    from transformers import pipeline\n"
        f'    generate = pipeline("text-generation", model="{export_dir}", trust_remote_code=True)\n'
        '    print(generate("The", max_new_tokens=50)[0]["generated_text"])\n'
    )


def _os_error_in(error: Exception) -> OSError | None:
    match = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(match[1]), os.strerror(int(match[1]))) if match else None
