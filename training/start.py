"""Between settings and the first step: the run's folder, its newest checkpoint, the prepared model."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from transformers import PreTrainedTokenizerBase

from training.checkpoint import TrainState, checkpoint_to_resume, restore_checkpoint
from training.export import EXPORT_FOLDER, how_to_load, pretrained_companions, set_aside
from training.optimizer import build_optimizer
from training.recipe import TrainSettings, check_prompts
from training.run_directory import RunDirectory, data_fingerprint, data_receipt, on_main_process
from training.settings import settings_as_yaml
from training.sharding import prepare


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
        SettingsError: if the run cannot start, or cannot go on; nothing of it has changed then, but that
            damaged checkpoints are set aside.
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
    # Of the main process's choice: another machine's view of a shared folder may be of a moment ago.
    resumed_from = on_main_process(accelerator, lambda: checkpoint_to_resume(run_dir, warn=print))

    companions = pretrained_companions(model, tokenizer)
    companions["settings.yaml"] = settings_as_yaml(settings).encode()
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = build_optimizer(model, settings)
    model, optimizer = prepare(accelerator, model, optimizer)
    state = TrainState(model, optimizer, data_fingerprint=fingerprint, companions=companions)
    set_seed(settings.seed + accelerator.process_index)  # each process draws its own dropout
    if resumed_from is not None:
        restore_checkpoint(accelerator, resumed_from, state)
        _align(accelerator, settings, state)
    state.elapsed_seconds = max(state.elapsed_seconds, run.begin(state.step))
    return run, state


def rows_per_step(settings: TrainSettings) -> int:
    """Rows that all processes together read for one step."""
    return settings.batch_tokens // settings.block_size


def _align(accelerator: Accelerator, settings: TrainSettings, state: TrainState) -> None:
    """Let the data go on where it was, at the next row that is the first of a process's micro-batch.

    Rows are only passed over where the batch was changed between two starts of the run.
    """
    if not state.rows:  # a checkpoint of before they were counted
        state.rows = state.step * rows_per_step(settings)
    together = settings.micro_batch_size * accelerator.num_processes
    passed_over = -state.rows % together
    if passed_over:
        accelerator.print(
            f"The batch was another one before: the data goes on {passed_over:,} rows further, at the next "
            f"multiple of {together:,} (micro_batch_size x processes)."
        )
    state.rows += passed_over


def is_complete(accelerator: Accelerator, run_dir: Path, *, has_all_steps: bool) -> bool:
    """Whether the run has ended, with its export. Every process calls this, and is told the same.

    An export of a run that goes on is set aside: it is not the one of its end.
    """

    def look() -> bool:
        export_dir = run_dir / EXPORT_FOLDER
        if export_dir.exists() and not has_all_steps:
            print(
                f"The run goes on: {export_dir} is of its earlier end, and now {set_aside(export_dir).name}."
            )
        return export_dir.exists()

    return on_main_process(accelerator, look)


def say_complete(run_dir: Path, state: TrainState) -> str:
    """What to tell who starts a run that has ended."""
    return (
        f"The run in {run_dir} is complete ({state.step:,} steps). For a new run give another --run_dir; "
        "to train this one on, a higher --max_steps and --allow_change.\n"
        + how_to_load(run_dir / EXPORT_FOLDER)
    )


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model that is not yet sharded; those that are tied count once."""
    return sum(parameter.numel() for parameter in model.parameters())
