"""The preparation's engine: datatrove runs one task per part, on this machine, on Slurm or on Ray.

A task is reader → encoder. Completed tasks are skipped on a rerun; what a killed task leaves behind has a
temporary name that nothing reads. The results do not depend on how many tasks run at once, nor where.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import socket
import sys
import types
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import multiprocess
import multiprocess.forkserver
from datatrove.data import Document as PipedDocument
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger

from data.contamination import load_question_ngrams
from data.encoder import FastEncoder
from data.near_duplicates import MINHASH, WholeOrNot, clustering, comparing, filtering, signing
from data.parts import HasText, encode_part
from data.progress import Report, Task, Watch, read_statistics
from data.sources import Document, Part, SourceSpec, read_part


def encoder_for(tokenizer_file: Path, why_slow: str | None) -> FastEncoder:
    """Made once a process, because it takes as long as some million tokens do."""
    return _encoder_of(tokenizer_file.read_text(encoding="utf-8"), why_slow)


# By content: the next preparation of this process may have another tokenizer in the same place.
@functools.lru_cache(maxsize=1)
def _encoder_of(tokenizer_json: str, why_slow: str | None) -> FastEncoder:
    return FastEncoder(tokenizer_json, checked=True, why_slow=why_slow)


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
        for document in _counted(self.spec, self.parts[rank], counts):
            yield PipedDocument(text=document.text, id=document.id)
        self.stat_update("documents", value=counts["read"])


def _counted(spec: SourceSpec, part: Part, counts: Counter[str]) -> Iterator[Document]:
    for document in read_part(spec, part, counts):
        counts["read"] += 1
        yield document


class EncodePart(PipelineStep):
    """Encodes what comes in into the folder of part number `rank`; see `parts.encode_part`."""

    name = "encode"
    type = "WRITER"

    def __init__(self, job: Job, counts: dict[int, Counter[str]], owner: tuple[str, int] | None):
        super().__init__()
        self.job, self.counts, self.owner = job, counts, owner

    def run(
        self, data: Iterable[PipedDocument], rank: int = 0, world_size: int = 1
    ) -> Iterator[PipedDocument]:
        job, folder = self.job, self.job.folders[rank]
        if not folder.exists():
            counts = self.counts.setdefault(rank, Counter())
            report = Report(_report_of(folder), self.owner)
            _encode(job, data, counts, folder, job.limit_tokens, report)
            report.path.unlink(missing_ok=True)
        yield from ()


def _encode(
    job: Job,
    documents: Iterable[HasText],
    counts: Counter[str],
    folder: Path,
    limit_tokens: int | None,
    report: Report | None = None,
) -> None:
    encode_part(
        documents,
        counts,
        folder,
        encoder_for(job.tokenizer_file, job.why_slow),
        job.end_of_text,
        limit_tokens=limit_tokens,
        ngrams=load_question_ngrams(job.questions)[0] if job.questions else None,
        advance=lambda documents, tokens: report.advance(documents, tokens, counts) if report else None,
    )


def _report_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.progress")


@dataclass(frozen=True)
class Job:
    """What every task knows; paths are absolute, for tasks that run elsewhere.

    `tokenizer_file` is the tokenizer's JSON; `why_slow`, if set, is the reason not to use the fast encoder.
    """

    spec: SourceSpec
    parts: list[Part]
    work: Path
    tokenizer_file: Path
    end_of_text: int
    why_slow: str | None
    limit_tokens: int | None = None
    questions: Path | None = None
    near_deduplicate: bool = False

    @property
    def folders(self) -> list[Path]:
        """Where each part's ids go."""
        return [self.work / "parts" / f"{number:05d}" for number in range(len(self.parts))]


@dataclass(frozen=True)
class Stage:
    """Tasks that may run side by side; a stage begins when the one before it is complete."""

    name: str
    steps: list[PipelineStep]
    tasks: list[Task]
    log: Path


def stages(job: Job, owner: tuple[str, int] | None) -> list[Stage]:
    """All that leads from the source to encoded parts, in order; the last stage is the encoding."""
    job.work.joinpath("parts").mkdir(exist_ok=True)
    counts: dict[int, Counter[str]] = {}
    log = job.work / "log"
    for number, folder in enumerate(job.folders):
        if not folder.exists():  # as where one was deleted: datatrove would pass over what it marked as done
            (log / "encoding" / "completions" / f"{number:05d}").unlink(missing_ok=True)
    reader = ReadPart(job.spec, job.parts, counts)
    found: list[Stage] = []
    if job.near_deduplicate:
        near = job.work / "near"
        shares = [(os.path.basename(part.paths[0]), part.bytes) for part in job.parts]
        buckets = [(f"bucket {number}", 0) for number in range(MINHASH.num_buckets)]
        for name, first, step, results, work in (
            ("signing", [reader], signing(near), near / "signatures", shares),
            ("comparing", [], comparing(near), near / "pairs", buckets),
            ("clustering", [], clustering(near), near / "remove", [("clusters", 0)]),
        ):
            reports = near / f"{name}-progress"
            tasks = [
                Task(reports / f"{n:05d}.progress", log / name / "completions" / f"{n:05d}", label, size)
                for n, (label, size) in enumerate(work)
            ]
            guarded = WholeOrNot(step, results, reports, counts, owner)
            found.append(Stage(name, [*first, guarded], tasks, log / name))
    steps = [reader, *([filtering(near)] if job.near_deduplicate else [])]
    tasks = [
        Task(
            _report_of(folder),
            folder,
            f"part {folder.name}",
            part.bytes,
            tuple(map(os.path.basename, part.paths)),
        )
        for folder, part in zip(job.folders, job.parts, strict=True)
    ]
    steps.append(EncodePart(job, counts, owner))
    return [*found, Stage("encoding", steps, tasks, log / "encoding")]


class QuietLocalExecutor(LocalPipelineExecutor):
    """Local processes without a page of log lines each: what goes wrong comes back as the exception."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1):
        logger.disable("datatrove")
        if multiprocess.parent_process() is not None:
            # A terminal sends Ctrl-C to all: the run's own process takes it, and ends this one.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        return super()._run_for_rank(rank, local_rank, node_rank)


def start_early() -> None:
    """Let the server that workers are forked from load this module while the caller does other things."""
    # Each worker would take seconds to do it itself.
    multiprocess.set_forkserver_preload([__name__])
    with _no_main_module():
        multiprocess.forkserver.ensure_running()


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Workers start by importing the program that was started, and torch with it; they need this module
    alone.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@functools.cache
def _forks_end_with_us() -> None:
    """datatrove forks a server of counters, which would outlive a preparation that is killed, for good.

    Linux ends it with us; elsewhere nothing is known that would.
    """
    if sys.platform == "linux":
        libc, set_parent_death_signal = ctypes.CDLL(None), 1
        os.register_at_fork(after_in_child=lambda: libc.prctl(set_parent_death_signal, signal.SIGKILL))


def encode_locally(job: Job, *, workers: int, progress: bool) -> list[Path]:
    """Encode every part that is not there yet, `workers` at a time; returns the parts' folders in order.

    With `limit_tokens`, parts are taken in order until together they have so many tokens, of the last one as
    much as it takes; the rest stays unread.
    """
    logger.disable("datatrove")
    _forks_end_with_us()
    owner = (socket.gethostname(), os.getpid())
    *before, encoding = stages(job, owner)
    for stage in before:
        with Watch(stage.name, stage.tasks, progress), _no_main_module():
            _executor(stage, workers).run()
    with Watch(encoding.name, encoding.tasks, progress), _no_main_module():
        if job.limit_tokens is not None:
            return _encode_up_to(job, job.limit_tokens, encoding, workers)
        _executor(encoding, workers).run()
    return job.folders


def _encode_up_to(job: Job, limit_tokens: int, encoding: Stage, workers: int) -> list[Path]:
    """The folders of the first parts, which have exactly what one reader after another would have taken."""
    tokens = done = 0
    while done < len(job.parts):
        # As many at once as it will take, by the size of those that are done; the first alone.
        likely = (limit_tokens - tokens) * done // tokens + 1 if tokens else 1
        at_once = min(workers, likely, len(job.parts) - done)
        _executor(encoding, at_once, done, at_once).run()
        for folder in job.folders[done : done + at_once]:
            more = read_statistics(folder)["tokens"]
            if tokens + more >= limit_tokens:
                return [*job.folders[:done], _cut(job, done, limit_tokens - tokens)]
            tokens, done = tokens + more, done + 1
    return job.folders


def _cut(job: Job, number: int, limit_tokens: int) -> Path:
    """The beginning of a part, encoded again, so that the receipt speaks of nothing behind the limit."""
    folder = job.folders[number]
    if limit_tokens == job.limit_tokens:  # by which it was encoded
        return folder
    folder = folder.with_name(f"{folder.name}-{limit_tokens}")
    if not folder.exists():
        counts: Counter[str] = Counter()
        _encode(job, _counted(job.spec, job.parts[number], counts), counts, folder, limit_tokens)
    return folder


def _executor(stage: Stage, workers: int, first: int = 0, tasks: int = -1) -> QuietLocalExecutor:
    return QuietLocalExecutor(
        stage.steps,
        tasks=len(stage.tasks),
        workers=min(workers, len(stage.tasks)),
        logging_dir=os.fspath(stage.log),
        local_tasks=tasks,
        local_rank_offset=first,
    )
