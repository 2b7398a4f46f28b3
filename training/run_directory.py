"""The folder of one run: whose it is, whether it may be continued, and its metrics."""

import errno
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from training.files import explain_write_error, replace_file, temporary_name
from training.settings import SettingsError, changed_settings, settings_as_yaml

try:
    import fcntl
except ImportError:  # Windows: two runs in one directory go unnoticed there
    fcntl = None  # type: ignore[assignment]

SETTINGS_FILE = "settings.yaml"
DATA_FILE = "data.json"
METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
SAMPLES_FILE = "samples.jsonl"
LENGTH_FILE = "length.json"
LOCK_FILE = ".lock"
# All that is there when a start was cut short. They are written in this order: the settings make it a run.
OF_A_START = {LOCK_FILE, temporary_name(DATA_FILE), DATA_FILE, temporary_name(SETTINGS_FILE), SETTINGS_FILE}
# How some network file systems say that they have no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)

T = TypeVar("T")


def on_main_process(
    accelerator: Accelerator | PartialState, work: Callable[[], T], patience: timedelta | None = None
) -> T:
    """What `work` returns, done on the main process while the others wait; its failure is everyone's.

    Work that may take longer than collectives do, ten minutes on GPUs, needs a `patience` of its own.

    Raises:
        SettingsError: on every process, with the message of the one that it raised; on the others also after
            any other error, which the main process raises as it is.
    """
    answer: list[Any] = ["", None]  # what went wrong, what came out
    group = None
    if patience is not None and torch.distributed.is_initialized():
        # A group of its own: a long timeout for all collectives would have a training whose network hangs
        # wait as long, on every GPU.
        group = torch.distributed.new_group(backend="gloo", timeout=patience)
    try:
        if accelerator.is_main_process:
            answer[1] = work()
    except BaseException as error:
        is_ours = isinstance(error, SettingsError)
        answer[0] = str(error) if is_ours else f"the main process failed: {error!r}"
        raise
    finally:  # also then: nobody is to wait for an answer that never comes
        if group is not None:
            torch.distributed.broadcast_object_list(answer, src=0, group=group, device=torch.device("cpu"))
            torch.distributed.destroy_process_group(group)
        else:
            broadcast_object_list(answer)
    problem, result = answer
    if problem:
        raise SettingsError(problem)
    return result


def data_fingerprint(train_set: Any) -> str:
    """What the training data is, whatever folder it lies in: of its tokenizer and of every shard's hash.

    A dataset without a manifest says so itself, with an attribute `fingerprint`; or else its rows are read.
    """
    if hasattr(train_set, "fingerprint"):
        return train_set.fingerprint
    if not hasattr(train_set, "manifest"):
        digest = hashlib.sha256()
        for index in range(len(train_set)):
            row = train_set[index]
            digest.update(json.dumps({name: torch.as_tensor(row[name]).tolist() for name in row}).encode())
        return digest.hexdigest()
    manifest = train_set.manifest
    content = [manifest.tokenizer_fingerprint, *((shard.split, shard.sha256) for shard in manifest.shards)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def data_receipt(train_set: Any) -> dict[str, Any]:
    """What the training data is, for people: empty where the dataset has no manifest that says so."""
    manifest = getattr(train_set, "manifest", None)
    if manifest is None:
        return {}
    asked = manifest.settings
    return {
        "source": asked.get("source"),
        "config": asked.get("config"),
        "tokenizer": manifest.tokenizer,
        "vocab_size": manifest.vocab_size,
        "tokens": manifest.tokens(),
        "training_tokens": manifest.tokens("train"),
        "validation_tokens": manifest.tokens("validation"),
        "documents": manifest.documents(),
        "duplicates_dropped": manifest.counts.get("duplicates"),
        "contamination": manifest.contamination,
        "manifest_sha256": manifest.sha256,
    }


def is_held(path: Path) -> bool | None:
    """Whether a run, of this process or another, is in progress in the folder; None where no lock says so."""
    if not (path / LOCK_FILE).exists():
        return False
    if fcntl is None:
        return None
    try:
        with open(path / LOCK_FILE, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks, or somebody else's folder
        return None
    return False


class RunDirectory:
    """One run's folder, held until this process ends.

    Every process has one; only the main process touches the disk.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        path: Path,
        settings: Any,
        data_fingerprint: str,
        *,
        allow_change: bool,
        receipt: dict[str, Any] | None = None,
    ):
        """Create the folder, or take the one of the same run up again, without changing what it holds.

        Raises:
            SettingsError: if it cannot be written, another process is using it, it holds something else, or
                it is of a run with other settings or data (each named), unless `allow_change`.
        """
        self.path, self._accelerator, self._is_main = path, accelerator, accelerator.is_main_process
        self._settings, self._data = settings, {"data_fingerprint": data_fingerprint, **(receipt or {})}
        self._unwritten: dict[str, str] = {}  # by file
        self._on_main_process(lambda: self._open(allow_change))

    def begin(self, last_step: int) -> float:
        """Take note of settings and data; forget metrics and samples of steps after `last_step`, which come
        again, and lines that a crash cut off.

        Returns the seconds that the run had taken when it last said so: what a kill undid was paid for too.

        Raises:
            SettingsError: if it cannot be written.
        """
        return self._on_main_process(lambda: self._begin(last_step))

    def _on_main_process(self, work: Callable[[], T]) -> T:
        def work_or_explain() -> T:
            try:
                return work()
            except OSError as error:
                raise SettingsError(explain_write_error(error, "The run directory", self.path)) from error

        return on_main_process(self._accelerator, work_or_explain)

    def _open(self, allow_change: bool) -> None:
        path = self.path
        if path.exists() and not path.is_dir():
            raise SettingsError(f"--run_dir {path} is a file; choose a folder")
        names = {entry.name for entry in path.iterdir()} if path.exists() else set()
        is_new = names <= OF_A_START
        is_ours = SETTINGS_FILE in names
        if not is_ours and not (is_new and (DATA_FILE not in names or self._recorded_data())):
            raise SettingsError(
                f"--run_dir {path} holds files but no {SETTINGS_FILE}, so it is no run's; choose another"
            )
        path.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        problems = self._changes(is_new) if is_ours else []
        if problems and not allow_change:
            changes = "\n".join(f"  - {problem}" for problem in problems)
            raise SettingsError(
                f"{path} is a run with other settings:\n{changes}\n"
                "Give the old values to continue it, --allow_change to continue it with the new ones, or "
                "another --run_dir to start a new run."
            )

    def _begin(self, last_step: int) -> float:
        replace_file(self.path / DATA_FILE, json.dumps(self._data).encode())
        replace_file(self.path / SETTINGS_FILE, settings_as_yaml(self._settings).encode())
        for name in (METRICS_FILE, SAMPLES_FILE, EVENTS_FILE):
            mend_last_line(self.path / name)
        lines = [*_json_lines(self.path / METRICS_FILE), *_json_lines(self.path / EVENTS_FILE)]
        elapsed = max((line.get("elapsed_seconds") or 0.0 for line in lines), default=0.0)
        for name in (METRICS_FILE, SAMPLES_FILE):
            _forget_after(self.path / name, last_step)
        return elapsed

    def _take_lock(self) -> Any:
        """The kernel lets go of it when this process ends, however it ends."""
        lock = open(self.path / LOCK_FILE, "a+")  # noqa: SIM115 (held open on purpose)
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                owner = lock.read().strip() or "unknown"
                raise SettingsError(
                    f"another run is using {self.path} (process {owner}); wait for it, stop it, or choose "
                    "another --run_dir"
                ) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                print(
                    f"The file system of {self.path} has no locks ({error.strerror}): nothing will notice a "
                    "second run in this folder, so do not start one."
                )
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {os.uname().nodename}")
        lock.flush()
        return lock

    def _recorded_data(self) -> str:
        """The fingerprint of the data that the run was started with, empty where there is none of ours."""
        try:
            return str(json.loads((self.path / DATA_FILE).read_text(encoding="utf-8"))["data_fingerprint"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def _changes(self, is_new: bool) -> list[str]:
        """What differs from the settings and the data of then; `is_new`: nothing was done with those yet."""
        try:
            text = (self.path / SETTINGS_FILE).read_text(encoding="utf-8")
            problems = changed_settings(self._settings, yaml.safe_load(text))
        except (OSError, ValueError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
            return [f"what it was started with cannot be read ({type(error).__name__}: {error})"]
        then, now = self._recorded_data(), self._data["data_fingerprint"]
        if not then and is_new and text == settings_as_yaml(self._settings):
            return []  # an earlier version wrote the settings first, and was cut short
        if then != now:
            was = then[:12] if then else f"unknown, for {DATA_FILE} cannot be read,"
            problems.append(f"training data: {was} then, {now[:12]} now (hash of the shards)")
        return problems

    def append_metrics(self, lines: list[dict[str, Any]]) -> None:
        """One JSON object per line; a number that is not finite is null, which JSON can say."""
        self._append(METRICS_FILE, lines)

    def append_samples(self, lines: list[dict[str, Any]]) -> None:
        """What the model wrote at a step: `step`, `prompt`, `text`."""
        self._append(SAMPLES_FILE, lines)

    def append_event(self, event: str, **details: Any) -> None:
        """Something worth knowing later that is no metric.

        Started, resumed, stopped, skipped steps, a spike.
        """
        self._append(EVENTS_FILE, [{"event": event, "unix_time": round(time.time(), 3), **details}])

    def _append(self, name: str, lines: list[dict[str, Any]]) -> None:
        """What finds no room on the disk is kept, and written before the next lines of the same file."""
        if self._is_main:
            finite = [{key: _finite(value) for key, value in line.items()} for line in lines]
            self._write(name, "".join(json.dumps(line, allow_nan=False) + "\n" for line in finite))

    def _write(self, name: str, text: str) -> None:
        is_first_failure = not self._unwritten
        text = self._unwritten.pop(name, "") + text
        path = self.path / name
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            if is_first_failure:
                print(explain_write_error(error, "Metrics", self.path) + " They are kept until then.")
            self._unwritten[name] = text
            if path.exists():
                os.truncate(path, size)  # a part of a line may have found room

    def close(self) -> None:
        """Write what has found no room so far; what still finds none is said to be lost."""
        for name in list(self._unwritten):
            self._write(name, "")
        for name, text in self._unwritten.items():
            lines = text.count("\n")
            print(f"{lines:,} lines of {self.path / name} found no room until the end, and are lost.")


def _forget_after(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    kept = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            pass  # cut off in the middle: its step comes again
    if len(kept) != len(lines):
        replace_file(path, "".join(line + "\n" for line in kept).encode())


def mend_last_line(path: Path) -> None:
    """End a last line that a crash cut off before its newline, or remove it if more than that is missing."""
    if not path.exists():
        return
    whole, newline, last = path.read_bytes().rpartition(b"\n")
    if not last:
        return
    try:
        json.loads(last)
        with open(path, "ab") as file:
            file.write(b"\n")
    except ValueError:
        os.truncate(path, len(whole + newline))


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """What is whole of a file of JSON objects."""
    lines = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        with suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
