"""How fast text becomes shards, and shards batches, beside other ways of doing it on the same documents.

    python benchmarks/preparation.py --data prose.jsonl [--megabytes 24] [--rounds 3]

Every way starts from the same Parquet file, except the first, which has the texts in memory and writes
nothing: it is the ceiling. Ways take turns, so that a busy machine slows all of them; the median of the
rounds counts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import lzma
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tiktoken

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))

from data.loader import build_loader, collate_blocks
from data.prepare import PrepareSettings, prepare
from data.shards import TokenBlocks, read_manifest
from data.tokenizer import gpt2_tokenizer, tiktoken_encoding

PROCESSES = 2
DOCUMENT_CHARACTERS = 5000  # books are cut to about the length of FineWeb-Edu's pages
ROWS_PER_GROUP = 1000  # as in FineWeb-Edu's files
BLOCK = 1024
MICRO_BATCH = 16
LOADER_TOKENS = 400_000_000


def read_texts(path: str, megabytes: float) -> list[str]:
    opener = lzma.open if path.endswith(".xz") else open
    texts: list[str] = []
    size = 0
    with opener(path, "rt", encoding="utf-8") as file:
        for line in file:
            text = json.loads(line)["text"]
            for start in range(0, len(text), DOCUMENT_CHARACTERS):
                texts.append(text[start : start + DOCUMENT_CHARACTERS])
                size += len(texts[-1].encode())
                if size >= megabytes * 1e6:
                    return texts
    return texts


# ---- the ways


def bare_tiktoken(texts: list[str], encoding: tiktoken.Encoding) -> int:
    """Texts in memory, ids thrown away: what nothing that also reads and writes can be expected to beat."""
    size = len(texts) // (PROCESSES * 8) + 1
    chunks = [texts[start : start + size] for start in range(0, len(texts), size)]
    with ThreadPoolExecutor(PROCESSES) as pool:
        counts = pool.map(
            lambda chunk: sum(len(encoding.encode_to_numpy(t, disallowed_special=())) + 1 for t in chunk),
            chunks,
        )
        return sum(counts)


def ours(parquet: Path, folder: Path, tokenizer: Path) -> int:
    """Read, drop copies, encode, split, write, hash."""
    settings = PrepareSettings(str(parquet), str(folder / "ours"), tokenizer=str(tokenizer))
    with contextlib.redirect_stdout(io.StringIO()):
        return read_manifest(prepare(settings, progress=False)).tokens()


def datasets_map(parquet: Path, folder: Path, tokenizer: Path) -> int:
    """`datasets.map` over the `tokenizers` tokenizer, then `save_to_disk`."""
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(tokenizer)
    end = fast.eos_token_id

    def encode(rows):
        return {
            "input_ids": [[*ids, end] for ids in fast(rows["text"], return_attention_mask=False)["input_ids"]]
        }

    table = datasets.load_dataset(
        "parquet", data_files=str(parquet), split="train", cache_dir=str(folder / "cache")
    )
    encoded = table.map(encode, batched=True, num_proc=PROCESSES, remove_columns=table.column_names)
    encoded.save_to_disk(str(folder / "map"))
    return sum(len(ids) for ids in encoded.data.column("input_ids").to_pylist())


ENCODING: tiktoken.Encoding


def _start_worker(tokenizer: str) -> None:
    from transformers import AutoTokenizer

    global ENCODING
    ENCODING = tiktoken_encoding(AutoTokenizer.from_pretrained(tokenizer))  # type: ignore[arg-type]


def _encode_one(text: str) -> np.ndarray:
    return np.array([50256, *ENCODING.encode_ordinary(text)]).astype(np.uint16)


def pool_to_npy(parquet: Path, folder: Path, tokenizer: Path) -> int:
    """The scheme of build-nanogpt's fineweb.py: a pool over documents, uint16 arrays, .npy shards."""
    folder.joinpath("npy").mkdir()
    shard = np.empty(10_000_000, dtype=np.uint16)
    filled = total = number = 0
    texts = (
        text
        for batch in pa.parquet.ParquetFile(parquet).iter_batches(columns=["text"])
        for text in batch.column(0).to_pylist()
    )
    context = multiprocessing.get_context("fork")
    with context.Pool(PROCESSES, initializer=_start_worker, initargs=(str(tokenizer),)) as pool:
        for ids in pool.imap(_encode_one, texts, chunksize=16):
            if filled + len(ids) > len(shard):
                np.save(folder / "npy" / f"{number}.npy", shard[:filled])
                number, filled = number + 1, 0
            shard[filled : filled + len(ids)] = ids
            filled, total = filled + len(ids), total + len(ids)
    np.save(folder / "npy" / f"{number}.npy", shard[:filled])
    return total


def loader_rate(folder: Path) -> float:
    """Tokens/s of batches in permuted order, from the page cache, in one process."""
    batches = iter(
        build_loader(TokenBlocks(folder, BLOCK), collate_blocks, micro_batch_size=MICRO_BATCH, seed=0)
    )
    for _ in range(1000):
        next(batches)
    started, tokens = time.perf_counter(), 0
    while tokens < LOADER_TOKENS:
        tokens += next(batches)["input_ids"].numel()
    return tokens / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="JSON lines with a `text` column, also .xz")
    parser.add_argument("--megabytes", type=float, default=24.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    texts = read_texts(arguments.data, arguments.megabytes)
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        parquet, tokenizer = base / "texts.parquet", base / "tokenizer"
        pa.parquet.write_table(pa.table({"text": texts}), parquet, row_group_size=ROWS_PER_GROUP)
        gpt2_tokenizer().save_pretrained(tokenizer)
        encoding = tiktoken_encoding(gpt2_tokenizer())
        ways: dict[str, Callable[[Path], int]] = {
            "bare tiktoken in threads, texts in memory": lambda folder: bare_tiktoken(texts, encoding),
            "data.prepare: Parquet to verified shards": lambda folder: ours(parquet, folder, tokenizer),
            "pool of processes to .npy (fineweb.py's scheme)": lambda folder: pool_to_npy(
                parquet, folder, tokenizer
            ),
            "datasets.map(num_proc=2) + save_to_disk": lambda folder: datasets_map(
                parquet, folder, tokenizer
            ),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for round_number in range(arguments.rounds):
            for name, way in ways.items():
                with tempfile.TemporaryDirectory(dir=scratch) as folder:
                    started = time.perf_counter()
                    tokens = way(Path(folder))
                    rates[name].append(tokens / (time.perf_counter() - started))
            print(
                f"round {round_number + 1}: " + ", ".join(f"{rates[n][-1] / 1e6:.2f}" for n in rates),
                file=sys.stderr,
            )
        ceiling = statistics.median(rates["bare tiktoken in threads, texts in memory"])
        print(
            f"{len(texts):,} documents, {sum(map(len, texts)) / 1e6:.1f} million characters, "
            f"{os.cpu_count()} cores\n"
        )
        print("| | million tokens/s, median | of bare tiktoken |\n|---|---|---|")
        for name, values in rates.items():
            rate = statistics.median(values)
            print(f"| {name} | {rate / 1e6:.2f} | {rate / ceiling:.2f} |")
        settings = PrepareSettings(str(parquet), str(base / "set"), tokenizer=str(tokenizer))
        with contextlib.redirect_stdout(io.StringIO()):
            shards = prepare(settings, progress=False)
        print(
            f"\nLoader, blocks of {BLOCK:,} in permuted order, {MICRO_BATCH} a batch: "
            f"{loader_rate(shards) / 1e6:,.0f} million tokens/s"
        )


if __name__ == "__main__":
    main()
