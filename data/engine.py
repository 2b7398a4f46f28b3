"""The preparation's engine: datatrove runs one task per part, on this machine, on Slurm or on Ray.

A task is reader → encoder. Completed tasks are skipped on a rerun; what a killed task leaves behind has a
temporary name that nothing reads. The results do not depend on how many tasks run at once, nor where.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import multiprocess
from datatrove.data import Document as PipedDocument
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger
from tqdm import tqdm

from data.contamination import question_ngrams
from data.parts import encode_part, read_statistics
from data.sources import Document, Part, SourceSpec, read_part
from data.tokenizer import FastEncoder, load_tokenizer

REPORT_SECONDS = 1.0  # how often tasks say how far they are


@functools.cache
def encoder_for(tokenizer_folder: Path, threads: int | None) -> tuple[FastEncoder, int]:
    """The encoder and the end-of-text id; made once a process, because it takes as long as a million tokens
    do.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    return FastEncoder(tokenizer, threads), tokenizer.eos_token_id


class ReadPart(PipelineStep):
    """Yields the documents of part number `rank`."""

    name = "read"
    type = "READER"

    def __init__(self, spec: SourceSpec, parts: list[Part], counts: dict[int, Counter[str]]):
        super().__init__()
        self.spec, self.parts, self.counts = spec, parts, counts

    def run(
        self, data: Iterable[PipedDocument] | None, rank: int = 0, world_size: int = 1
    ) -> Iterator[PipedDocument]:
        counts = self.counts.setdefault(rank, Counter())
        for document in read_part(self.spec, self.parts[rank], counts):
            self.stat_update("documents")
            yield PipedDocument(text=document.text, id=document.id)


class EncodePart(PipelineStep):
    """Encodes what comes in into the folder of part number `rank`; see `parts.encode_part`."""

    name = "encode"
    type = "WRITER"

    def __init__(
        self,
        folders: list[Path],
        tokenizer_folder: Path,
        threads: int | None,
        why_slow: str | None,
        limit_tokens: int | None,
        questions: str | None,
        counts: dict[int, Counter[str]],
        owner: tuple[str, int] | None,
    ):
        super().__init__()
        self.folders, self.tokenizer_folder, self.threads = folders, tokenizer_folder, threads
        self.limit_tokens, self.questions = limit_tokens, questions
        self.counts, self.owner, self.why_slow = counts, owner, why_slow

    def run(
        self, data: Iterable[PipedDocument], rank: int = 0, world_size: int = 1
    ) -> Iterator[PipedDocument]:
        folder = self.folders[rank]
        if not folder.exists():
            encoder, end_of_text = encoder_for(self.tokenizer_folder, self.threads)
            encoder.why_slow = encoder.why_slow or self.why_slow
            counts = self.counts.setdefault(rank, Counter())
            report = Report(folder.parent / f"{folder.name}.progress", self.owner)
            encode_part(
                (Document(document.text, document.id) for document in data),
                counts,
                folder,
                encoder,
                end_of_text,
                limit_tokens=self.limit_tokens,
                ngrams=question_ngrams(self.questions)[0] if self.questions else None,
                advance=lambda documents, tokens: report.advance(documents, tokens, counts),
            )
            report.path.unlink(missing_ok=True)
        yield from ()


class Report:
    """A task's word to the process that shows the progress: a small file, rewritten now and then."""

    def __init__(self, path: Path, owner: tuple[str, int] | None):
        self.path, self.owner = path, owner
        self.host = socket.gethostname()
        self.state: dict = {"pid": os.getpid(), "host": self.host, "owner": owner and owner[1]}
        self.state |= {"documents": 0, "tokens": 0, "bytes": 0}
        self.last = 0.0
        self.write()

    def advance(self, documents: int, tokens: int, counts: Counter[str]) -> None:
        self.state["documents"] += documents
        self.state["tokens"] += tokens
        self.state["bytes"] = counts["bytes"]
        if time.monotonic() - self.last > REPORT_SECONDS:
            self.write()
            if self.owner and self.owner[0] == self.host and not _is_alive(self.owner[1]):
                # Whoever started this task was killed: a new run may be encoding the same part by now.
                raise SystemExit("The preparation that this task belonged to is gone.")

    def write(self) -> None:
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.state))
        os.replace(temporary, self.path)
        self.last = time.monotonic()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class QuietLocalExecutor(LocalPipelineExecutor):
    """Local processes without a page of log lines each: what goes wrong comes back as the exception."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1):
        logger.disable("datatrove")
        return super()._run_for_rank(rank, local_rank, node_rank)


def part_folders(work: Path, parts: list[Part]) -> list[Path]:
    """Where each part's ids go; absolute, for tasks that run elsewhere."""
    (work / "parts").mkdir(exist_ok=True)
    return [work.absolute() / "parts" / f"{number:05d}" for number in range(len(parts))]


def threads_per_worker(workers: int) -> int:
    return max(1, (os.cpu_count() or 1) // workers)


def encode_locally(
    spec: SourceSpec,
    parts: list[Part],
    tokenizer_folder: Path,
    work: Path,
    *,
    workers: int,
    why_slow: str | None,
    limit_tokens: int | None,
    questions: str | None,
    progress: bool,
) -> list[Path]:
    """Encode every part that is not there yet, `workers` at a time; returns the parts' folders in order.

    `why_slow`, if set, is the reason not to use the fast encoder.

    With `limit_tokens`, parts are taken in order until together they have so many tokens; the rest stays
    unread.
    """
    logger.disable("datatrove")
    # The server that workers are forked from imports this module once; each would take seconds to do it
    # itself.
    multiprocess.set_forkserver_preload([__name__])
    folders = part_folders(work, parts)
    counts: dict[int, Counter[str]] = {}
    workers = min(workers, len(parts))
    threads = threads_per_worker(workers)
    owner = (socket.gethostname(), os.getpid())
    pipeline = [
        ReadPart(spec, parts, counts),
        EncodePart(folders, tokenizer_folder, threads, why_slow, limit_tokens, questions, counts, owner),
    ]
    at_once = len(parts) if limit_tokens is None else workers
    with Watch(parts, folders, progress):
        for first in range(0, len(parts), at_once):
            QuietLocalExecutor(
                pipeline,
                tasks=len(parts),
                workers=workers,
                logging_dir=str(work / "log"),
                local_tasks=min(at_once, len(parts) - first),
                local_rank_offset=first,
            ).run()
            if limit_tokens is not None:
                done = folders[: first + at_once]
                if sum(read_statistics(folder)["tokens"] for folder in done) >= limit_tokens:
                    return done
    return folders


class Watch:
    """Shows the tasks' progress, and ends the run when one of them was killed: its pool would wait for
    ever.
    """

    def __init__(self, parts: list[Part], folders: list[Path], show: bool):
        self.parts, self.folders = parts, folders
        self.finished: dict[Path, dict] = {}
        self.stop = threading.Event()
        self.lost: str | None = None
        size = sum(part.bytes for part in parts) or None
        self.bar = tqdm(
            total=size, unit="B", unit_scale=True, desc="encoding", disable=not show, smoothing=0.1
        )
        self.started = time.monotonic()
        self.tokens_at_start: int | None = None

    def __enter__(self) -> Watch:
        self.main_thread = threading.main_thread().ident or 0
        self.on_interrupt = None
        if threading.current_thread() is threading.main_thread():  # the only one that signals can end
            self.on_interrupt = signal.signal(signal.SIGINT, self._interrupted)
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.stop.set()
        self.thread.join()
        if self.on_interrupt is not None:
            signal.signal(signal.SIGINT, self.on_interrupt)
        self._look()
        self.bar.close()
        if kind is KeyboardInterrupt and self.lost:
            raise RuntimeError(
                f"{self.lost} Other parts are kept: run the same command again to go on, with fewer "
                "--workers if "
                "memory ran out."
            ) from None

    def _watch(self) -> None:
        while not self.stop.wait(REPORT_SECONDS):
            self._look()
            if self.lost:
                # A real signal: `_thread.interrupt_main` wakes nobody who waits for a lock, as the pool does.
                signal.pthread_kill(self.main_thread, signal.SIGINT)
                return

    def _interrupted(self, number, frame) -> None:
        """In place of the handler for Ctrl-C, which runs under nohup or a shell's `&` do not have."""
        if self.lost or self.on_interrupt is signal.SIG_DFL:
            raise KeyboardInterrupt
        if callable(self.on_interrupt):
            self.on_interrupt(number, frame)

    def _look(self) -> None:
        documents = tokens = size = 0
        current = ""
        for part, folder in zip(self.parts, self.folders, strict=True):
            state = self.finished.get(folder)
            if state is None and folder.exists():
                state = self.finished[folder] = {**read_statistics(folder), "bytes": part.bytes}
            if state is None:
                try:
                    state = json.loads((folder.parent / f"{folder.name}.progress").read_text())
                except (OSError, ValueError):
                    continue
                current = os.path.basename(part.paths[0])
                if state["owner"] != os.getpid():  # left by an earlier run
                    continue
                # The folder is looked for once more: the task may have finished since the first look.
                if not _is_alive(state["pid"]) and not folder.exists() and not self.stop.is_set():
                    self.lost = f"The process that encoded part {folder.name} ({current}, …) was killed."
            documents, tokens = documents + state["documents"], tokens + state["tokens"]
            size += state["bytes"]
        if self.tokens_at_start is None:
            self.tokens_at_start = sum(state["tokens"] for state in self.finished.values())
        rate = (tokens - self.tokens_at_start) / max(time.monotonic() - self.started, 1e-9)
        self.bar.set_postfix_str(
            f"{documents:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s, {current}", refresh=False
        )
        self.bar.update(size - self.bar.n)
