"""Documents that nearly repeat another one, found by datatrove's MinHash stages before anything is encoded.

Sign every document (a task a part), compare the signatures (a task a bucket), join the pairs to clusters
(one task); then the encoding's tasks pass over all of a cluster but one. The split is chosen from those that
remain, so that near duplicates do not cross it.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from datatrove.data import Document as PipedDocument
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.utils.text import simplify_text

from data.encoder import split_long
from data.progress import Report

# datatrove's defaults, which made FineWeb: 5 words in a row, 14 buckets of 8 hashes; two documents that share
# 80% of their 5-grams are found with a probability of 92%, two that share half of them with 5%.
MINHASH = MinhashConfig()
# Languages are told apart by their cutting into words alone; this one's needs no further package to be made.
LANGUAGE_WITHOUT_PACKAGES = "ace_Arab"
PIECE_CHARACTERS = 1_000_000
SHINGLES_AT_ONCE = 10_000  # each is multiplied by 112 numbers
SIGNATURES_AT_ONCE = 1000


class SignPart(MinhashDedupSignature):
    """datatrove's first stage, with words as blanks separate them, and in pieces: a long document takes no
    memory.
    """

    def __init__(self, folder: Path):
        super().__init__(os.fspath(folder), MINHASH, language=LANGUAGE_WITHOUT_PACKAGES)

    def get_shingles(self, text: str) -> np.ndarray:
        """(n, 1) uint64: the hash of each n-gram of words, without case, punctuation and numbers."""
        size = self.config.n_grams
        found = [np.empty(0, np.uint64)]
        for piece in split_long(text, PIECE_CHARACTERS):
            words = simplify_text(piece, self.config.norm_config).split()
            ngrams = (" ".join(words[at : at + size]).encode() for at in range(len(words) - size + 1))
            found.append(np.fromiter(map(self._hash_func, ngrams), dtype=np.uint64))
        return np.concatenate(found).reshape((-1, 1))

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        runs = np.split(shingles, range(SHINGLES_AT_ONCE, len(shingles), SHINGLES_AT_ONCE))
        signatures = [np.concatenate(super(SignPart, self).get_signature(run)) for run in runs]
        return np.min(signatures, axis=0).reshape(self.config.num_buckets, -1).tolist()


class WholeOrNot(PipelineStep):
    """Runs one of the stages; what it writes appears in `folder` file by file, each of them whole.

    A task whose run was killed may live on for a moment beside the one that repeats it.
    """

    name = "near duplicates"
    type = "DEDUP"

    def __init__(
        self,
        stage: MinhashDedupSignature | MinhashDedupBuckets | MinhashDedupCluster,
        folder: Path,
        progress: Path,
        counts: dict[int, Counter[str]],
        owner: tuple[str, int] | None,
    ):
        super().__init__()
        self.stage, self.folder, self.progress = stage, folder, progress
        self.counts, self.owner = counts, owner

    def run(self, data: Iterable[PipedDocument] | None, rank: int = 0, world_size: int = 1) -> None:
        # A task of the second stage has a file of every part open at once.
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with suppress(ValueError, OSError):  # macOS takes no limit without end
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        report = Report(self.progress / f"{rank:05d}.progress", self.owner)
        temporary = self.folder.with_name(f"{self.folder.name}.{rank}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        self.stage.output_folder = get_datafolder(os.fspath(temporary))
        documents = data and _reported(data, report, self.counts.setdefault(rank, Counter()))
        self.stage.run(documents, rank, world_size)
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                target = self.folder / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
        shutil.rmtree(temporary)


def _reported(
    documents: Iterable[PipedDocument], report: Report, counts: Counter[str]
) -> Iterator[PipedDocument]:
    for document in documents:
        report.advance(1, 0, counts)
        yield document


def signing(folder: Path) -> MinhashDedupSignature:
    return SignPart(folder / "signatures")


def comparing(folder: Path) -> MinhashDedupBuckets:
    folder.joinpath("signatures").mkdir(parents=True, exist_ok=True)
    return MinhashDedupBuckets(
        os.fspath(folder / "signatures"),
        os.fspath(folder / "pairs"),
        config=MINHASH,
        lines_to_buffer=SIGNATURES_AT_ONCE,
    )


def clustering(folder: Path) -> MinhashDedupCluster:
    return MinhashDedupCluster(
        os.fspath(folder / "pairs"),
        os.fspath(folder / "remove"),
        config=MINHASH,
        lines_to_buffer=SIGNATURES_AT_ONCE,
    )


def filtering(folder: Path) -> MinhashDedupFilter:
    return MinhashDedupFilter(os.fspath(folder / "remove"))
