"""How fast text becomes shards, and shards batches, beside other ways of doing it on the same documents.

    python -m benchmarks.preparation --data prose.jsonl … [--megabytes 100] [--copies 4] [--rounds 3]

Every way starts from the same Parquet files, except the first, which has the texts in memory and writes
nothing: it is the ceiling. Each runs in a process of its own, without the time for its imports; ways take
turns, so that a busy machine slows all of them. The medians of the rounds count.
"""

from __future__ import annotations

import contextlib
import io
import json
import lzma
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))

import tiktoken

from benchmarks.harness import Result, benchmark_parser, reported, table_from_markdown
from data.encoder import byte_of_character
from data.loader import build_loader, collate_blocks
from data.prepare import PrepareSettings, prepare
from data.shards import Manifest, ShardEntry, TokenBlocks, read_manifest, write_manifest
from data.tokenizer import gpt2_tokenizer
from data.verify import verify

PROCESSES = 2
DOCUMENT_CHARACTERS = 5000  # books are cut to about the length of FineWeb-Edu's pages
ROWS_PER_GROUP = 1000  # as in FineWeb-Edu's files
FILES = 4
BLOCK = 1024
MICRO_BATCH = 16
LOADER_TOKENS = 400_000_000
OPENED_SHARDS, OPENED_SHARD_TOKENS = 100, 100_000_000  # as many as FineWeb-Edu's sample-10BT makes
SAMPLE_SECONDS = 0.1  # of the CPU time of all processes that a way starts
CEILING = "bare tiktoken in threads, texts in memory"
OURS = "data.prepare: Parquet to hashed shards"
POOL = "pool of processes to .npy (fineweb.py's scheme)"
MAP = "datasets.map(num_proc=2) + save_to_disk"


def read_texts(paths: list[str], megabytes: float) -> Iterator[str]:
    size = 0
    for path in paths:
        opener = lzma.open if path.endswith(".xz") else open
        with opener(path, "rt", encoding="utf-8") as file:
            for line in file:
                text = json.loads(line)["text"]
                for start in range(0, len(text), DOCUMENT_CHARACTERS):
                    yield text[start : start + DOCUMENT_CHARACTERS]
                    size += DOCUMENT_CHARACTERS
                    if size >= megabytes * 1e6:
                        return


def write_parquet(texts: list[str], copies: int, folder: Path) -> int:
    """Parquet files of FineWeb-Edu's shape; a number in front tells the copies of a text apart."""
    folder.mkdir()
    characters = 0
    for number in range(FILES):
        some = [f"{copy} {text}" for copy in range(copies) for text in texts[number::FILES]]
        characters += sum(map(len, some))
        table = pa.table({"text": some})
        pa.parquet.write_table(table, folder / f"{number}.parquet", row_group_size=ROWS_PER_GROUP)
    return characters


# ---- the ways: each returns the tokens that it made, and is timed from its call to its return


def bare_tiktoken(source: Path, folder: Path, tokenizer: Path) -> Callable[[], int]:
    """Texts in memory, ids thrown away: what nothing that also reads and writes can be expected to beat."""
    texts = [text for path in sorted(source.iterdir()) for text in _column(path)]
    encoding = _encoding(tokenizer)
    size = len(texts) // (PROCESSES * 64) + 1
    chunks = [texts[start : start + size] for start in range(0, len(texts), size)]

    def run() -> int:
        with ThreadPoolExecutor(PROCESSES) as pool:
            counts = pool.map(
                lambda chunk: sum(len(encoding.encode_to_numpy(t, disallowed_special=())) + 1 for t in chunk),
                chunks,
            )
            return sum(counts)

    return run


def ours(source: Path, folder: Path, tokenizer: Path) -> Callable[[], int]:
    """Read, drop copies, encode, split, write, hash."""
    settings = PrepareSettings(str(source), str(folder / "ours"), tokenizer=str(tokenizer), workers=PROCESSES)

    def run() -> int:
        with contextlib.redirect_stdout(io.StringIO()):
            return read_manifest(prepare(settings, progress=False)).tokens()

    return run


def datasets_map(source: Path, folder: Path, tokenizer: Path) -> Callable[[], int]:
    """`datasets.map` over the `tokenizers` tokenizer, then `save_to_disk`."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # two processes of one thread, as everywhere here
    fast = AutoTokenizer.from_pretrained(tokenizer)
    end = fast.eos_token_id

    def encode(rows):
        ids = fast(rows["text"], return_attention_mask=False)["input_ids"]
        return {"input_ids": [[*row, end] for row in ids]}

    def run() -> int:
        files, cache = str(source / "*.parquet"), str(folder / "cache")
        table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
        encoded = table.map(encode, batched=True, num_proc=PROCESSES, remove_columns=table.column_names)
        encoded.save_to_disk(str(folder / "map"))
        return pa.compute.sum(pa.compute.list_value_length(encoded.data.column("input_ids"))).as_py()

    return run


ENCODING: tiktoken.Encoding


def _start_worker(tokenizer: Path) -> None:
    global ENCODING
    ENCODING = _encoding(tokenizer)


def _encode_one(row: dict[str, str]) -> np.ndarray:
    ids = np.array([50256, *ENCODING.encode_ordinary(row["text"])])
    assert (ids >= 0).all() and (ids < 2**16).all()
    return ids.astype(np.uint16)


def pool_to_npy(source: Path, folder: Path, tokenizer: Path) -> Callable[[], int]:
    """The scheme of build-nanogpt's fineweb.py: a pool over the rows of `load_dataset`, uint16 arrays, .npy
    shards. (It would start half as many processes as there are cores; here they are as many as elsewhere.)
    """
    import datasets

    datasets.disable_progress_bars()

    def run() -> int:
        files, cache = str(source / "*.parquet"), str(folder / "cache")
        rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
        shard = np.empty(100_000_000, dtype=np.uint16)
        filled = total = number = 0
        context = multiprocessing.get_context("fork")
        with context.Pool(PROCESSES, initializer=_start_worker, initargs=(tokenizer,)) as pool:
            for ids in pool.imap(_encode_one, rows, chunksize=16):
                if filled + len(ids) > len(shard):
                    np.save(folder / f"{number}.npy", shard[:filled])
                    number, filled = number + 1, 0
                shard[filled : filled + len(ids)] = ids
                filled, total = filled + len(ids), total + len(ids)
        np.save(folder / f"{number}.npy", shard[:filled])
        return total

    return run


WAYS = {CEILING: bare_tiktoken, OURS: ours, POOL: pool_to_npy, MAP: datasets_map}


def _column(path: Path) -> Iterator[str]:
    for batch in pa.parquet.ParquetFile(path).iter_batches(columns=["text"]):
        yield from batch.column(0).to_pylist()


def _encoding(tokenizer: Path) -> tiktoken.Encoding:
    """tiktoken with GPT-2's words; the pattern is the one that it ships for GPT-2."""
    vocab = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    byte_of = byte_of_character()
    ranks = {bytes(byte_of[c] for c in word): i for word, i in vocab.items() if set(word) <= byte_of.keys()}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


# ---- measuring


class CpuTime:
    """CPU seconds of this process and all it starts, also of those that nobody waits for."""

    def __enter__(self) -> CpuTime:
        self.spent: dict[int, float] = {}
        self.stop = threading.Event()
        self.process = psutil.Process()
        self._look()
        self.before = dict(self.spent)
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(SAMPLE_SECONDS):
            self._look()

    def _look(self) -> None:
        for process in [self.process, *self.process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self.spent[process.pid] = times.user + times.system

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self._look()
        self.seconds = sum(self.spent.values()) - sum(self.before.values())


def measure(way: str, source: Path, tokenizer: Path) -> dict[str, float]:
    """One run in a process of its own; {"tokens", "seconds", "cpu_seconds"}."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        arguments = [way, os.fspath(source), folder, os.fspath(tokenizer)]
        command = [sys.executable, "-m", "benchmarks.preparation", "--way", *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_one(way: str, source: str, folder: str, tokenizer: str) -> None:
    run = WAYS[way](Path(source), Path(folder), Path(tokenizer))
    with CpuTime() as cpu:
        started = time.perf_counter()
        tokens = run()
        seconds = time.perf_counter() - started
    print(json.dumps({"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu.seconds}))


def loader_rate(folder: Path, enough: int) -> float:
    """Tokens/s of batches in permuted order, from the page cache, in one process."""
    batches = iter(
        build_loader(TokenBlocks(folder, BLOCK), collate_blocks, micro_batch_size=MICRO_BATCH, seed=0)
    )
    for _ in range(1000):
        next(batches)
    started, tokens = time.perf_counter(), 0
    while tokens < enough:
        tokens += next(batches)["input_ids"].numel()
    return tokens / (time.perf_counter() - started)


def opening_seconds(folder: Path) -> float:
    """Of a loader on OPENED_SHARDS full-size shards, which are holes of that size in the disk: opening reads
    nothing of them.
    """
    folder.mkdir()
    size = 2 * OPENED_SHARD_TOKENS
    names = [f"train-{number:05d}.arrow" for number in range(OPENED_SHARDS)]
    for name in names:
        (folder / name).touch()
        os.truncate(folder / name, size)
    entries = tuple(ShardEntry("train", name, size, "0" * 64, 1, OPENED_SHARD_TOKENS) for name in names)
    write_manifest(folder, Manifest("none", "0" * 64, 50_257, 50_256, "uint16", entries, {"source": "holes"}))
    started = time.perf_counter()
    assert len(TokenBlocks(folder, BLOCK)) == OPENED_SHARDS * OPENED_SHARD_TOKENS // BLOCK
    return time.perf_counter() - started


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.2f} ({min(values):,.2f}–{max(values):,.2f})"


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Medians of the rounds with the extremes, and the ratios that are promised."""
    rates = {way: [r["tokens"] / r["seconds"] / 1e6 for r in rounds] for way, rounds in results.items()}
    cpu = {way: [r["cpu_seconds"] for r in rounds] for way, rounds in results.items()}
    lines = [
        "| | million tokens/s | data.prepare is | CPU seconds | its CPU seconds beside data.prepare's |",
        "|---|---|---|---|---|",
    ]
    for way in results:
        # Ratios of runs that stood next to one another, then their median: what slows one slows the other.
        ratios = [mine / other for mine, other in zip(rates[OURS], rates[way], strict=True)]
        by_cpu = [other / mine for mine, other in zip(cpu[OURS], cpu[way], strict=True)]
        lines.append(
            f"| {way} | {spread(rates[way])} | {statistics.median(ratios):.2f}× | {spread(cpu[way])} "
            f"| {statistics.median(by_cpu):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = benchmark_parser(str(__doc__))
    parser.add_argument("--data", required=True, nargs="+", help="JSON lines with a `text` column, also .xz")
    parser.add_argument("--megabytes", type=float, default=110.0, help="of text to read")
    parser.add_argument("--copies", type=int, default=1, help="times that each text is taken, told apart")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--without_map", action="store_true", help="leave out datasets.map, the slowest")
    arguments = parser.parse_args()
    loader_tokens = LOADER_TOKENS
    if arguments.quick:
        arguments.megabytes, arguments.rounds, arguments.without_map, loader_tokens = 0.5, 1, True, 10**6
    ways = [way for way in WAYS if not (arguments.without_map and way == MAP)]
    result = Result(
        "preparation",
        "Text to shards, shards to batches",
        f"Medians of {arguments.rounds} rounds (extremes); each with {PROCESSES} processes or threads.",
        not_run=[] if MAP in ways else [[MAP, "asked to be left out"]],
    )
    results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with reported(result, arguments.json), tempfile.TemporaryDirectory() as scratch:
        texts = list(read_texts(arguments.data, arguments.megabytes))
        base = Path(scratch)
        source, tokenizer = base / "texts", base / "tokenizer"
        characters = write_parquet(texts, arguments.copies, source)
        gpt2_tokenizer().save_pretrained(tokenizer)
        for number in range(arguments.rounds):
            for way in ways:
                results[way].append(measure(way, source, tokenizer))
                last = results[way][-1]
                print(
                    f"round {number + 1}: {last['tokens'] / last['seconds'] / 1e6:5.2f} million tokens/s in "
                    f"{last['seconds']:5.1f} s, {last['cpu_seconds']:5.1f} CPU s: {way}",
                    file=sys.stderr,
                )
        settings = PrepareSettings(str(source), str(base / "set"), tokenizer=str(tokenizer))
        with contextlib.redirect_stdout(io.StringIO()):
            shards = prepare(settings, progress=False)
            verify(shards)
        loader = [loader_rate(shards, loader_tokens) / 1e6 for _ in range(arguments.rounds)]
        title = (
            f"{len(texts) * arguments.copies:,} documents of {characters / 1e6:,.0f} million characters, "
            f"{results[OURS][0]['tokens'] / 1e6:,.1f} million tokens, {FILES} Parquet files\n\n"
        )
        result.tables.append(table_from_markdown(title + table(results)))
        if arguments.copies > 1:
            result.about += (
                f" Each text stands {arguments.copies} times, a number in front telling the copies apart: "
                "few words are new, which suits an encoder that remembers words, as data.prepare's does, "
                "more than a corpus of this size would."
            )
        opening = [1000 * opening_seconds(base / f"holes-{number}") for number in range(arguments.rounds)]
        result.about += (
            f" A loader on {OPENED_SHARDS} shards of {OPENED_SHARD_TOKENS / 1e6:,.0f} million tokens opened "
            f"in {spread(opening)} ms."
        )
        result.about += (
            f" The loader then gave {spread(loader)} million tokens/s, blocks of {BLOCK:,} in permuted "
            f"order, {MICRO_BATCH} a batch."
        )
        result.figures = [{"way": way, **one} for way in ways for one in results[way]]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--way"]:
        run_one(*sys.argv[2:])
    else:
        main()
