"""Between settings and the first step: the run's folder, its newest checkpoint, the prepared model."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from transformers import PreTrainedTokenizerBase

from training.checkpoint import TrainState, checkpoint_to_resume, latest_checkpoint, restore_checkpoint
from training.export import how_to_load, pretrained_companions
from training.optimizer import build_optimizer
from training.recipe import TrainSettings, check_prompts
from training.run_directory import RunDirectory, data_fingerprint, data_receipt, on_main_process
from training.settings import settings_as_yaml


def open_run(
    accelerator: Accelerator,
    settings: TrainSettings,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    train_set: Any,
) -> tuple[RunDirectory, TrainState]:
    """The run of `settings`, new (`state.step` is 0) or as its newest good checkpoint has it.

    Model and optimizer come back in the state, prepared by Accelerate. Every process calls this.

    Raises:
        SettingsError: if the run cannot start, or cannot go on; nothing of it has changed then.
    """
    check_prompts(tokenizer, settings, model.config)
    run_dir = Path(settings.run_dir)
    fingerprint = data_fingerprint(train_set)
    run = RunDirectory(
        accelerator,
        run_dir,
        settings,
        fingerprint,
        allow_change=settings.allow_change,
        receipt=data_receipt(train_set),
    )
    on_main_process(accelerator, lambda: checkpoint_to_resume(run_dir, warn=print))  # sets damaged ones aside
    resumed_from = latest_checkpoint(run_dir)

    companions = pretrained_companions(model, tokenizer)
    companions["settings.yaml"] = settings_as_yaml(settings).encode()
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model, optimizer = accelerator.prepare(model, build_optimizer(model, settings))
    state = TrainState(model, optimizer, data_fingerprint=fingerprint, companions=companions)
    set_seed(settings.seed + accelerator.process_index)  # each process draws its own dropout
    if resumed_from is not None:
        restore_checkpoint(accelerator, resumed_from, state)
    state.elapsed_seconds = max(state.elapsed_seconds, run.continue_metrics(state.step))
    return run, state


def say_complete(run_dir: Path, state: TrainState) -> str:
    """What to tell who starts a run that has ended."""
    return (
        f"The run in {run_dir} is complete ({state.step:,} steps). For a new run give another --run_dir; "
        "to train this one on, a higher --max_steps and --allow_change.\n" + how_to_load(run_dir / "export")
    )


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model that is not yet sharded; those that are tied count once."""
    return sum(parameter.numel() for parameter in model.parameters())
