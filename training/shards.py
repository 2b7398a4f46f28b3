"""The shards of a run: made while all processes wait, named in one line, and those that were asked for."""

import os
from collections.abc import Callable, Collection
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from training.device import start_processes
from training.recipe import TrainSettings
from training.run_directory import on_main_process
from training.settings import SettingsError

# The largest corpora take days on one machine.
PREPARATION_PATIENCE = timedelta(days=7)


def make_if_missing(manifest_file: Path, make: Callable[[], object]) -> None:
    """Call `make` on the main process if `manifest_file` is not there. Every process calls this.

    Raises:
        SettingsError: on every process, if it fails for a reason that is the user's to mend.
    """

    def make_or_explain() -> None:
        try:
            make()
        except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: a worker was killed
            raise SettingsError(f"{manifest_file.parent} could not be prepared: {error}") from error

    processes = start_processes()
    if broadcast_object_list([not manifest_file.exists()])[0]:
        on_main_process(processes, make_or_explain, patience=PREPARATION_PATIENCE)


def words_to_train(settings: TrainSettings, given: Collection[str]) -> int | None:
    """Size of the tokenizer to train: a flag that names a finished one wins over a recipe's wish for it."""
    is_overruled = "tokenizer" in given and "train_tokenizer" not in given
    return None if is_overruled else settings.train_tokenizer


def announce_shards(settings: TrainSettings, given: Collection[str], manifest: Any) -> None:
    """Say what the shards are; refuse them if a flag asks for others.

    Only settings `given` as flags count: a recipe or a default speaks for shards that are yet to be made.

    Raises:
        SettingsError: naming each flag that these shards do not follow.
    """
    recorded = manifest.settings
    if start_processes().is_main_process:
        print(
            f"Training on {settings.shards}: {recorded.get('source')}, tokenizer {manifest.tokenizer}, "
            f"{manifest.tokens():,} tokens."
        )
    words = recorded.get("train_tokenizer")
    made_with = (
        f"a tokenizer of {words:,} words trained on them" if words else f"{recorded.get('tokenizer')!r}"
    )
    unlike = []
    if "source" in given and not _may_be_from(settings.source, str(recorded.get("source"))):
        unlike.append(f"--source {settings.source}, but they were made from {recorded.get('source')!r}")
    if "train_tokenizer" in given:
        if settings.train_tokenizer != words:
            unlike.append(f"--train_tokenizer {settings.train_tokenizer}, but they have {made_with}")
    elif "tokenizer" in given and (words or settings.tokenizer != recorded.get("tokenizer")):
        unlike.append(f"--tokenizer {settings.tokenizer}, but they have {made_with}")
    if unlike:
        raise SettingsError(
            f"the shards in {settings.shards} are not those asked for: {'; '.join(unlike)}. Leave the flag "
            "out to train on them as they are, or name another folder with --shards to have new ones made."
        )


def _may_be_from(source: str, recorded: str) -> bool:
    # Finished shards, taken from the Hub or from a folder, keep the record of how they were made.
    is_taken = source.startswith("hub:") or (Path(source) / "manifest.json").exists()
    return is_taken or source == recorded or os.path.realpath(source) == os.path.realpath(recorded)
