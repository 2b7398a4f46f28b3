"""Checkpoints that are whole or do not exist: written in the background, verified before use.

A checkpoint is a folder `checkpoints/step-0000500` that `from_pretrained` loads, with the optimizer, the
random states and the progress beside the weights. It counts only with its marker, written last, which lists
every file's SHA-256.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from training.files import (
    explain_write_error,
    file_sha256,
    flush_folder,
    replace_file,
    write_file,
    write_safetensors,
)
from training.random_state import all_random_states, restore_random_state
from training.settings import SettingsError
from training.weights import (
    bare_model,
    load_optimizer_state,
    load_weights,
    named_optimizer_state,
    named_weights,
    whole,
)

CHECKPOINTS_FOLDER = "checkpoints"
MARKER = "COMPLETE"
WEIGHTS_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_STATE_FILE = "random_states.safetensors"
PROGRESS_FILE = "training_state.json"
FORMAT_VERSION = 1
FAILED_SAVES_THAT_END_A_RUN = 3
STEP_FOLDER = re.compile(r"step-(\d+)")


class NonFiniteWeightsError(ValueError):
    """Weights or optimizer state hold NaN or infinity; they are not saved."""


@dataclass
class TrainState:
    """All that a step changes, and the small files that make a checkpoint loadable on its own.

    `tokens` are those consumed, `rows` those of the data's order that were read; `validation_loss` is that of
    `validation_step`, nats/token, NaN before the first. `companions` are further files of each checkpoint by
    name: config, tokenizer, settings.
    """

    model: nn.Module
    optimizer: Any
    step: int = 0
    tokens: int = 0
    rows: int = 0
    elapsed_seconds: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    validation_loss: float = float("nan")
    validation_step: int = -1
    data_fingerprint: str = ""
    companions: dict[str, bytes] = field(default_factory=dict, repr=False)

    def progress(self) -> dict[str, int | float | str]:
        """The plain numbers, for JSON."""
        names = ("step", "tokens", "rows", "elapsed_seconds", "skipped_steps", "skipped_in_a_row")
        numbers: dict[str, int | float | str] = {name: getattr(self, name) for name in names}
        if self.validation_step >= 0:
            numbers |= {"validation_loss": self.validation_loss, "validation_step": self.validation_step}
        return numbers | {"data_fingerprint": self.data_fingerprint}


@dataclass(frozen=True)
class Keep:
    """Which complete checkpoints stay.

    The `last` newest, multiples of `every_steps` (0: none), the best one.
    """

    last: int = 2
    every_steps: int = 0
    best: bool = True


class BackgroundWriter:
    """Writes one checkpoint at a time on another thread, from host buffers that it keeps for the next.

    A write that fails for want of room or of the disk is told to `warn` and tried again with the next
    checkpoint; `cannot_go_on` says when that has gone on too long, or when no later one can succeed.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._pending: Future[None] | None = None
        self._buffers: dict[str, Tensor] = {}
        self._failures_in_a_row = 0
        self._last_failure = ""
        self._is_hopeless = False

    def snapshot(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole copies in host memory. Call only after `settle`: the last snapshot's buffers are used again.

        Sharded tensors are gathered one after the other, so that a GPU holds no second model.
        """
        copies = {}
        is_on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        for name, sharded in tensors.items():
            tensor = whole(sharded)
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                # Pinned memory takes a GPU's copies at the full speed of the bus, all in flight at once.
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers[name] = buffer
            # Only CUDA is waited for below: from other devices the bytes might come after the return.
            copies[name] = buffer.copy_(tensor, non_blocking=tensor.is_cuda)
        if is_on_gpu:
            torch.cuda.synchronize()
        return copies

    def start(self, work: Callable[[], None]) -> None:
        """Run `work` on the other thread."""
        assert self._pending is None, "at most one checkpoint is in flight"
        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = thread.submit(work)
        # It ends with its work: one that stayed would keep OpenMP threads, and with more of those than cores
        # all of them sleep between products. Steps took half as long again.
        thread.shutdown(wait=False)

    def settle(self, *, wait: bool = True) -> None:
        """Take note of how the last write ended; without `wait`, only if it has."""
        if self._pending is None or not (wait or self._pending.done()):
            return
        pending, self._pending = self._pending, None
        error = pending.exception()
        self._last_failure = ""
        if error is None:
            self._failures_in_a_row = 0
        elif isinstance(error, OSError):
            self._failures_in_a_row += 1
            self._last_failure = explain_write_error(
                error, "A checkpoint", Path(error.filename or ".").parent
            )
            self._is_hopeless = self._failures_in_a_row >= FAILED_SAVES_THAT_END_A_RUN
            self._warn(
                f"{self._last_failure} Until then training goes on, and the next checkpoint tries again."
            )
        else:
            self._is_hopeless = True
            self._last_failure = (
                f"A checkpoint was refused: {error}. The same command goes on from the one before, which is "
                "good. If it ends here again, lower the learning rate."
            )

    def cannot_go_on(self) -> bool:
        """Whether the run should end because its checkpoints fail. Waits for nothing."""
        self.settle(wait=False)
        return self._is_hopeless

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            SettingsError: if it is not, because its write failed.
        """
        self.settle()
        if self._last_failure:
            raise SettingsError(self._last_failure)

    def close(self) -> None:
        """Wait for what is being written, whatever comes of it."""
        wait([self._pending] if self._pending else [])


def save_checkpoint(
    accelerator: Accelerator,
    run_dir: Path,
    state: TrainState,
    *,
    keep: Keep,
    writer: BackgroundWriter | None = None,
) -> Path:
    """Save `state` to `run_dir/checkpoints`, then drop what `keep` does not name. Every process calls this.

    Without a `writer` the checkpoint is on disk on return. With one, only the copy to host memory is waited
    for, and the writer tells of errors.

    Raises:
        OSError: if it cannot be written; nothing of it stays then, and older checkpoints are untouched.
        NonFiniteWeightsError: if weights or optimizer state are not finite.
    """
    folder = run_dir / CHECKPOINTS_FOLDER / f"step-{state.step:07d}"
    model = bare_model(accelerator, state.model)
    tensors = {f"weights/{name}": tensor for name, tensor in named_weights(model).items()}
    moments = named_optimizer_state(model, state.optimizer.optimizer)
    tensors |= {f"optimizer/{name}": tensor for name, tensor in moments.items()}
    random_states = all_random_states(accelerator)
    if accelerator.is_main_process:
        if writer is not None:
            writer.settle()
            copies = writer.snapshot(tensors)
        else:
            copies = {name: whole(tensor).cpu() for name, tensor in tensors.items()}
        progress = state.progress() | {
            "format_version": FORMAT_VERSION,
            "num_processes": accelerator.num_processes,
            "torch": torch.__version__,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        }
        companions = dict(state.companions)
        if writer is not None:
            writer.start(lambda: _write(folder, copies, random_states, progress, companions, keep))
        else:
            _write(folder, copies, random_states, progress, companions, keep)
    else:
        for tensor in tensors.values():
            whole(tensor)
    return folder


def _write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    random_states: Mapping[str, Tensor],
    progress: Mapping[str, Any],
    companions: Mapping[str, bytes],
    keep: Keep,
) -> None:
    if (folder / MARKER).exists():
        return
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NonFiniteWeightsError(f"{name.partition('/')[2]} holds values that are not finite")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        listing = {name: write_file(temporary / name, [content]) for name, content in companions.items()}
        progress_text = json.dumps(progress, indent=1).encode()
        listing[PROGRESS_FILE] = write_file(temporary / PROGRESS_FILE, [progress_text])
        for file, part in ((WEIGHTS_FILE, "weights/"), (OPTIMIZER_FILE, "optimizer/")):
            chosen = {name.removeprefix(part): t for name, t in tensors.items() if name.startswith(part)}
            listing[file] = write_safetensors(temporary / file, chosen)
        listing[RANDOM_STATE_FILE] = write_safetensors(temporary / RANDOM_STATE_FILE, random_states)
        flush_folder(temporary)
        temporary.rename(folder)
        flush_folder(folder.parent)
        replace_file(folder / MARKER, json.dumps({"files": listing}, indent=1).encode())
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not (folder / MARKER).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise
    prune_checkpoints(folder.parent.parent, keep)


def complete_checkpoints(run_dir: Path) -> dict[int, Path]:
    """Checkpoints that carry the marker, by step, oldest first."""
    found = {}
    for path in (run_dir / CHECKPOINTS_FOLDER).glob("step-*"):
        match = STEP_FOLDER.fullmatch(path.name)
        if match and (path / MARKER).exists():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint, by name; its content is not looked at."""
    return next(reversed(complete_checkpoints(run_dir).values()), None)


def best_checkpoint(run_dir: Path) -> Path | None:
    """The complete checkpoint with the lowest validation loss, among those saved right after a validation."""
    losses = {}
    for path in complete_checkpoints(run_dir).values():
        try:
            progress = json.loads((path / PROGRESS_FILE).read_text())
            if progress.get("validation_step") == progress["step"]:
                losses[path] = float(progress["validation_loss"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged: verification says so where it matters
    return min(losses, key=losses.__getitem__, default=None)


def prune_checkpoints(run_dir: Path, keep: Keep) -> None:
    """Delete complete checkpoints that `keep` does not name.

    A deletion cut short leaves nothing that is resumed.
    """
    complete = complete_checkpoints(run_dir)
    staying = set(list(complete.values())[-keep.last :])
    if keep.every_steps:
        staying |= {path for step, path in complete.items() if step % keep.every_steps == 0}
    if keep.best:
        staying |= {path for path in (best_checkpoint(run_dir),) if path is not None}
    for path in complete.values():
        if path not in staying:
            leaving = path.with_name(f".deleting-{path.name}")
            path.rename(leaving)
            shutil.rmtree(leaving, ignore_errors=True)


def verify_checkpoint(folder: Path) -> list[str]:
    """What is wrong with a complete checkpoint, file by file; empty if nothing is. Reads all of it."""
    try:
        listing = json.loads((folder / MARKER).read_text())["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in listing.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MARKER} cannot be read ({type(error).__name__})"]
    problems = []
    for name, (size, sha256) in expected.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != size:
            problems.append(f"{name} has {path.stat().st_size:,} bytes instead of {size:,}")
        elif file_sha256(path) != sha256:
            problems.append(f"{name} is not what was written (its SHA-256 differs)")
    return problems


def checkpoint_to_resume(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that passes verification, after setting aside what does not. Main process only.

    What a crash left half written is removed; a folder without its marker or with damaged files is renamed,
    so that nothing is lost that its owner may want to look at.
    """
    root = run_dir / CHECKPOINTS_FOLDER
    for leftover in [*root.glob(".tmp-step-*"), *root.glob(".deleting-step-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    for path in sorted(root.glob("step-*")):
        if STEP_FOLDER.fullmatch(path.name) and not (path / MARKER).exists():
            aside = _set_aside(path, "incomplete")
            warn(
                f"Checkpoint {path.name} has no {MARKER} marker, so it is unfinished; it is now {aside.name}."
            )
    while (newest := latest_checkpoint(run_dir)) is not None:
        problems = verify_checkpoint(newest)
        if not problems:
            return newest
        aside = _set_aside(newest, "damaged")
        warn(f"Checkpoint {newest.name} is damaged: {'; '.join(problems)}. Set aside as {aside.name}.")
    return None


def _set_aside(path: Path, why: str) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.{why}" + (f"-{number}" if number > 1 else ""))).exists():
        number += 1
    path.rename(aside)
    return aside


def restore_checkpoint(accelerator: Accelerator, folder: Path, state: TrainState) -> None:
    """Fill `state` from a verified checkpoint. Every process calls this and reads the folder.

    On another number of processes than it was saved with, random states start from the seed again.

    Raises:
        SettingsError: if the checkpoint is of another model or format, or cannot be read.
    """
    progress = json.loads((folder / PROGRESS_FILE).read_text())
    if progress["format_version"] != FORMAT_VERSION:
        raise SettingsError(
            f"{folder} has checkpoint format {progress['format_version']}; this code reads {FORMAT_VERSION}. "
            "Continue it with the code that wrote it, or start a new run with another --run_dir."
        )
    model = bare_model(accelerator, state.model)
    try:
        load_weights(model, load_file(folder / WEIGHTS_FILE))
        load_optimizer_state(model, state.optimizer.optimizer, load_file(folder / OPTIMIZER_FILE))
        if progress["num_processes"] == accelerator.num_processes:
            restore_random_state(load_file(folder / RANDOM_STATE_FILE), accelerator)
    except SafetensorError as error:
        raise SettingsError(f"{folder} cannot be read: {error}") from error
    except ValueError as error:
        raise SettingsError(
            f"{folder} does not fit the model of these settings: {error}. Give the model's settings as "
            f"{folder / 'settings.yaml'} has them, or another --run_dir to start a new run."
        ) from error
    if accelerator.scaler is not None and progress["scaler"] is not None:
        accelerator.scaler.load_state_dict(progress["scaler"])
    for name in state.progress().keys() | {"validation_loss", "validation_step"}:
        if name != "data_fingerprint" and name in progress:
            setattr(state, name, progress[name])
