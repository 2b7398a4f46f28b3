"""Where documents come from: one function per kind of source.

A source is a name in NAMED_SOURCES, `hub:OWNER/NAME`, or files: a path, a folder (read recursively) or a
glob, also on object stores through fsspec (`s3://…`, `gs://…`). A source splits into *parts* by its files
alone, so that the work can be shared out and resumed, and always gives the same documents in the same order.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet
import zstandard

from data.python_docs import python_documents

PYTHON_DOCS = "python-docs"
HUB_PREFIX = "hub:"
COMPRESSIONS = (".gz", ".zst", ".xz")
PART_BYTES = 512 * 2**20  # small files are read together until they fill a part
PARQUET_ROWS_AT_ONCE = 1024
READ_BYTES = 1 << 20


class SourceError(ValueError):
    """A source that cannot be read; the message names the file and what to do."""


@dataclass(frozen=True)
class Document:
    """`text` is valid Unicode and not blank; `id` says where it came from."""

    text: str
    id: str


@dataclass(frozen=True)
class SourceSpec:
    """What to read: see the module's head for `source`; `config`, `split` and `revision` are a Hub
    dataset's.
    """

    source: str
    text_column: str = "text"
    config: str | None = None
    split: str = "train"
    revision: str | None = None


@dataclass(frozen=True)
class Part:
    """A share of a source: files of one or several kinds, read one after the other. `bytes` as stored, 0
    unknown.
    """

    paths: tuple[str, ...]
    bytes: int


def read_documents(spec: SourceSpec, counts: Counter[str] | None = None) -> Iterator[Document]:
    """Every document of the source, in order. `counts` collects what was left out or repaired; see
    `read_part`.
    """
    for part in list_parts(spec):
        yield from read_part(spec, part, counts)


def list_parts(spec: SourceSpec) -> list[Part]:
    """The shares of a source, decided by its files alone.

    Raises:
        SourceError: if there is no such source, or nothing in it can be read.
    """
    if spec.source == PYTHON_DOCS or spec.source.startswith(HUB_PREFIX):
        return [Part((spec.source,), 0)]
    parts: list[Part] = []
    paths: list[str] = []
    filled = 0
    for path, size in _find_files(spec.source):
        if paths and filled + size > PART_BYTES:
            parts.append(Part(tuple(paths), filled))
            paths, filled = [], 0
        paths.append(path)
        filled += size
    return [*parts, Part(tuple(paths), filled)]


def read_part(spec: SourceSpec, part: Part, counts: Counter[str] | None = None) -> Iterator[Document]:
    """Documents of one part, in order.

    Blank and null texts are left out, and invalid UTF-8 is replaced by U+FFFD; `counts` says how often, under
    "blank" and "repaired".

    Raises:
        SourceError: naming the file, if it is damaged or lacks the text column.
    """
    counts = Counter() if counts is None else counts
    for path in part.paths:
        for text, name in _read_one(spec, path, counts):
            if text is None or not text.strip():
                counts["blank"] += 1
                continue
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:  # lone surrogates, which JSON can spell and UTF-8 cannot
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                counts["repaired"] += 1
            yield Document(text, name)


def _read_one(spec: SourceSpec, path: str, counts: Counter[str]) -> Iterator[tuple[str | None, str]]:
    if path == PYTHON_DOCS:
        for name, text in python_documents():
            yield text, name
    elif path.startswith(HUB_PREFIX):
        yield from _read_hub(spec)
    else:
        yield from READERS[_kind(path)](spec, path, counts)


# ---- files


def _kind(path: str) -> str:
    """A file's extension in lower case, without that of its compression: ".jsonl" for "a.JSONL.zst"."""
    stem, extension = os.path.splitext(path.lower())
    if extension in COMPRESSIONS:
        extension = os.path.splitext(stem)[1]
    return extension


def _find_files(source: str) -> list[tuple[str, int]]:
    """(path, bytes) of every readable file of a path, folder or glob, sorted by path."""
    try:
        filesystem, path = fsspec.core.url_to_fs(source)
        if any(character in path for character in "*?["):
            found = filesystem.glob(path, detail=True)
        elif filesystem.isdir(path):
            found = filesystem.find(path, detail=True)
        elif filesystem.exists(path):
            found = {path: filesystem.info(path)}
        else:
            found = {}
    except (ImportError, OSError, ValueError) as error:
        raise SourceError(f"Cannot look into the source {source!r}: {error}") from error
    files = {name: info for name, info in found.items() if info["type"] == "file"}
    if not files:
        raise SourceError(
            f"No source {source!r}: it is no file, folder or glob with matches here. Other sources are "
            f"{PYTHON_DOCS!r} and {HUB_PREFIX}OWNER/NAME."
        )
    readable = {name: info for name, info in files.items() if _kind(name) in READERS}
    if not readable:
        kinds = sorted({os.path.splitext(name)[1] or "(none)" for name in files})
        raise SourceError(
            f"Nothing in {source!r} can be read: its {len(files):,} files end in {', '.join(kinds[:10])}; "
            "readable are "
            f"{', '.join(READERS)}, the text kinds also with {', '.join(COMPRESSIONS)}."
        )
    return sorted(
        (filesystem.unstrip_protocol(name), int(info["size"] or 0)) for name, info in readable.items()
    )


def _open(path: str) -> BinaryIO:
    """The file's bytes, decompressed by its extension."""
    file = fsspec.open(path, "rb").open()
    extension = os.path.splitext(path.lower())[1]
    if extension == ".gz":
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if extension == ".xz":
        return lzma.LZMAFile(file)  # type: ignore[return-value]
    if extension == ".zst":
        return io.BufferedReader(_ZstdFile(file), READ_BYTES)
    return file


class _ZstdFile(io.RawIOBase):
    """Zstandard frames one after the other; unlike the library's own reader, a cut-off frame is an error."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._frame: Any = None
        self._input = b""
        self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input:
                self._input = self._file.read(READ_BYTES)
                if not self._input:
                    if self._frame is not None:
                        raise EOFError("the last Zstandard frame is cut off")
                    return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._output = self._frame.decompress(self._input)
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size


def _decode(content: bytes, counts: Counter[str]) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        counts["repaired"] += 1
        return content.decode("utf-8", "replace")


DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error, zstandard.ZstdError)


def _read_text(spec: SourceSpec, path: str, counts: Counter[str]) -> Iterator[tuple[str, str]]:
    try:
        with _open(path) as file:
            content = file.read()
    except DAMAGED as error:
        raise SourceError(f"{path} cannot be read to its end ({error}); it is damaged or cut off.") from error
    yield _decode(content, counts), path


def _read_jsonl(spec: SourceSpec, path: str, counts: Counter[str]) -> Iterator[tuple[str | None, str]]:
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(_decode(line, counts))
                except ValueError as error:
                    raise SourceError(f"{where} is not one JSON object a line ({error}).") from error
                if not isinstance(row, dict):
                    raise SourceError(f"{where} holds a {type(row).__name__}, not a JSON object.")
                yield _text_of(row, spec.text_column, where), where
    except DAMAGED as error:
        raise SourceError(f"{path} cannot be read to its end ({error}); it is damaged or cut off.") from error


def _text_of(row: dict[str, Any], column: str, where: str) -> str | None:
    if column not in row:
        raise SourceError(f"{where} has no column {column!r}; it has {', '.join(map(repr, row)) or 'none'}.")
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise SourceError(f"{where}: the column {column!r} holds a {type(text).__name__}, not text.")
    return text


def _read_parquet(spec: SourceSpec, path: str, counts: Counter[str]) -> Iterator[tuple[str | None, str]]:
    try:
        with fsspec.open(path, "rb") as file:
            parquet = pyarrow.parquet.ParquetFile(file)
            _check_column(parquet.schema_arrow, spec.text_column, path)
            batches = parquet.iter_batches(
                PARQUET_ROWS_AT_ONCE, columns=[spec.text_column], use_threads=False
            )
            yield from _rows(batches, path, counts)
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{path} is not a whole Parquet file ({error}).") from error


def _read_arrow(spec: SourceSpec, path: str, counts: Counter[str]) -> Iterator[tuple[str | None, str]]:
    """Arrow IPC, in the stream format (as `datasets` caches it) or the file format."""
    try:
        with fsspec.open(path, "rb") as file:
            magic = file.read(6)
            file.seek(0)
            if magic == b"ARROW1":
                reader = pa.ipc.open_file(file)
                batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            else:
                reader = pa.ipc.open_stream(file)
                batches = iter(reader)
            _check_column(reader.schema, spec.text_column, path)
            yield from _rows((batch.select([spec.text_column]) for batch in batches), path, counts)
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{path} is not a whole Arrow file ({error}).") from error


def _check_column(schema: pa.Schema, column: str, path: str) -> None:
    if column not in schema.names:
        raise SourceError(f"{path} has no column {column!r}; it has {', '.join(map(repr, schema.names))}.")
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise SourceError(f"{path}: the column {column!r} holds {kind}, not text.")


def _rows(
    batches: Iterator[pa.RecordBatch], path: str, counts: Counter[str]
) -> Iterator[tuple[str | None, str]]:
    row = 0
    for batch in batches:
        column = batch.column(0)
        try:
            texts = column.to_pylist()
        except UnicodeDecodeError:  # Arrow trusts whoever wrote the file to have written UTF-8
            binary = column.cast(pa.large_binary())
            texts = [None if value is None else _decode(value, counts) for value in binary.to_pylist()]
        for text in texts:
            yield text, f"{path}:{row}"
            row += 1


Reader = Callable[[SourceSpec, str, "Counter[str]"], Iterator[tuple["str | None", str]]]
READERS: dict[str, Reader] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".rst": _read_text,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_jsonl,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


# ---- the Hub


def _read_hub(spec: SourceSpec) -> Iterator[tuple[str | None, str]]:
    """Any dataset of the Hub, streamed: nothing is stored but what is asked for."""
    import datasets  # heavy, and only this source needs it

    name = spec.source.removeprefix(HUB_PREFIX)
    try:
        rows = datasets.load_dataset(
            name, spec.config, split=spec.split, revision=spec.revision, streaming=True
        )
        columns = rows.column_names
    except (OSError, ValueError) as error:
        raise SourceError(
            f"Cannot open the Hub dataset {name!r} (config {spec.config!r}, split {spec.split!r}): {error}"
        ) from error
    if columns is not None:
        if spec.text_column not in columns:
            raise SourceError(
                f"{name} has no column {spec.text_column!r}; it has {', '.join(map(repr, columns))}."
            )
        rows = rows.select_columns([spec.text_column])
    for number, row in enumerate(rows):
        yield _text_of(row, spec.text_column, f"{name}:{number}"), f"{name}:{number}"
