"""How each kind of file gives its texts: text, JSON lines, Parquet, Arrow; compressed or not; here or far
away.

A reader takes (path, column, counts) and yields (text or None, where it stands). It counts "repaired" texts,
and in "bytes" how much of its file it has gone through, for the progress bar.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet
import zstandard

from data.mud import room_texts

COMPRESSIONS = (".gz", ".zst", ".xz")
PARQUET_ROWS_AT_ONCE = 1024
READ_BYTES = 1 << 20
LINES_A_REPORT = 256
# A book in one file must be divisible between training and validation, and shuffled by its parts.
PIECE_OF_TEXT_CHARACTERS = 20_000
BLANK_LINE = re.compile(r"\n[ \t\r]*\n")
# Whose exceptions stand for the network's moods, besides OSError.
NETWORK_MODULES = (
    "aiohttp",
    "botocore",
    "fsspec",
    "gcsfs",
    "httpcore",
    "httpx",
    "httpx2",
    "requests",
    "urllib3",
)
# Waits before a failed read of a remote file is tried again; together they outlast a server's restart.
RETRY_SECONDS = (1, 2, 4, 8, 16, 32, 64, 128)


class SourceError(ValueError):
    """A source that cannot be read; the message names the file and what to do."""


def kind_of(path: str) -> str:
    """A file's extension in lower case, without that of its compression: ".jsonl" for "a.JSONL.zst"."""
    stem, extension = os.path.splitext(path.lower())
    if extension in COMPRESSIONS:
        extension = os.path.splitext(stem)[1]
    return extension


def open_file(path: str) -> BinaryIO:
    """The file's stored bytes; a remote one outlives failures on the way."""
    filesystem, _ = fsspec.core.url_to_fs(path)
    if "file" in filesystem.protocol or "memory" in filesystem.protocol:
        return fsspec.open(path, "rb").open()
    return io.BufferedReader(PatientFile(path), READ_BYTES)


class PatientFile(io.RawIOBase):
    """A remote file that is read on from where it was after timeouts, refusals (429) and server errors
    (5xx).
    """

    def __init__(self, path: str):
        self._path = path
        self._position = 0
        self._file: Any = None
        self._size = int(self._patiently(lambda file: file.size))

    def _patiently(self, action: Callable[[Any], Any]) -> Any:
        def attempt() -> Any:
            if self._file is None:
                self._file = fsspec.open(self._path, "rb").open()
            try:
                return action(self._file)
            except BaseException:
                self._file = None  # its connection may be what is broken
                raise

        return patiently(attempt)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        )
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0

        def read(file: Any) -> bytes:
            file.seek(self._position)
            content: bytes = file.read(wanted)
            if len(content) != wanted:
                raise OSError(f"{len(content):,} bytes came instead of {wanted:,}")
            return content

        buffer[:wanted] = self._patiently(read)
        self._position += wanted
        return wanted


def patiently(action: Callable[[], Any]) -> Any:
    """The action's result, trying again with growing pauses while its failures are such as may pass."""
    for wait in RETRY_SECONDS:
        try:
            return action()
        except Exception as error:
            if not _may_pass(error):
                raise
            time.sleep(wait)
    return action()


def _may_pass(error: Exception) -> bool:
    """Whether trying again can help: not for files that are missing, forbidden or asked for wrongly."""
    if isinstance(error, (FileNotFoundError, PermissionError, NotImplementedError, ImportError)):
        return False
    if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in NETWORK_MODULES:
        return False
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    return not (isinstance(status, int) and 400 <= status < 500 and status not in (408, 429))


def decompressed(file: BinaryIO, path: str) -> BinaryIO:
    """What a stored file's bytes stand for, by its name; damaged ones raise one of DAMAGED when read."""
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


def _read_text(path: str, column: str, counts: Counter[str]) -> Iterator[tuple[str, str]]:
    try:
        with open_file(path) as stored, decompressed(stored, path) as file:
            content = file.read()
            counts["bytes"] += stored.tell()
    except DAMAGED as error:
        raise SourceError(f"{path} cannot be read to its end ({error}); it is damaged or cut off.") from error
    pieces = cut_text(_decode(content, counts))
    for number, piece in enumerate(pieces, start=1):
        yield piece, path if len(pieces) == 1 else f"{path}:{number}"


def cut_text(text: str, limit: int = PIECE_OF_TEXT_CHARACTERS) -> list[str]:
    """Pieces of at most `limit` characters that join to the text, cut after a blank line where there is one.

    Without a blank line in a piece's second half the cut is at its last line end; a line longer than `limit`
    stays whole.
    """
    pieces, start = [], 0
    while len(text) - start > limit:
        end = start + limit
        cut = max((match.end() for match in BLANK_LINE.finditer(text, start + limit // 2, end)), default=0)
        cut = cut or text.rfind("\n", start, end) + 1 or text.find("\n", end) + 1
        if not cut:
            break
        pieces.append(text[start:cut])
        start = cut
    if start < len(text) or not pieces:
        pieces.append(text[start:])
    return pieces


def _read_jsonl(path: str, column: str, counts: Counter[str]) -> Iterator[tuple[str | None, str]]:
    try:
        with open_file(path) as stored, decompressed(stored, path) as file:
            reported = 0
            for number, line in enumerate(file, start=1):
                if number % LINES_A_REPORT == 0:
                    counts["bytes"] += stored.tell() - reported
                    reported = stored.tell()
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(_decode(line, counts))
                except ValueError as error:
                    raise SourceError(f"{where} is not one JSON object a line ({error}).") from error
                if not isinstance(row, dict):
                    raise SourceError(f"{where} holds a {type(row).__name__}, not a JSON object.")
                yield text_of(row, column, where), where
    except DAMAGED as error:
        raise SourceError(f"{path} cannot be read to its end ({error}); it is damaged or cut off.") from error


def text_of(row: dict[str, Any], column: str, where: str) -> str | None:
    if column not in row:
        raise SourceError(f"{where} has no column {column!r}; it has {', '.join(map(repr, row)) or 'none'}.")
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise SourceError(f"{where}: the column {column!r} holds a {type(text).__name__}, not text.")
    return text


def _read_parquet(path: str, column: str, counts: Counter[str]) -> Iterator[tuple[str | None, str]]:
    try:
        with open_file(path) as file:
            size = file.seek(0, io.SEEK_END)
            parquet = pyarrow.parquet.ParquetFile(file)
            _check_column(parquet.schema_arrow, column, path)
            batches = parquet.iter_batches(PARQUET_ROWS_AT_ONCE, columns=[column], use_threads=False)
            yield from _rows(batches, path, counts, size / max(1, parquet.metadata.num_rows))
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{path} is not a whole Parquet file ({error}).") from error


def _read_arrow(path: str, column: str, counts: Counter[str]) -> Iterator[tuple[str | None, str]]:
    """Arrow IPC, in the stream format (as `datasets` caches it) or the file format."""
    try:
        with open_file(path) as file:
            magic = file.read(6)
            file.seek(0)
            if magic == b"ARROW1":
                reader = pa.ipc.open_file(file)
                batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            else:
                reader = pa.ipc.open_stream(file)
                batches = iter(reader)
            _check_column(reader.schema, column, path)
            yield from _rows((batch.select([column]) for batch in batches), path, counts, 0)
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{path} is not a whole Arrow file ({error}).") from error


def _check_column(schema: pa.Schema, column: str, path: str) -> None:
    if column not in schema.names:
        raise SourceError(f"{path} has no column {column!r}; it has {', '.join(map(repr, schema.names))}.")
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise SourceError(f"{path}: the column {column!r} holds {kind}, not text.")


def _rows(
    batches: Iterable[pa.RecordBatch], path: str, counts: Counter[str], bytes_per_row: float
) -> Iterator[tuple[str | None, str]]:
    row = 0
    for batch in batches:
        values = batch.column(0)
        try:
            texts = values.to_pylist()
        except UnicodeDecodeError:  # Arrow trusts whoever wrote the file to have written UTF-8
            binary = values.cast(pa.large_binary()).to_pylist()
            texts = [None if value is None else _decode(value, counts) for value in binary]
        for text in texts:
            yield text, f"{path}:{row}"
            row += 1
        counts["bytes"] += int(len(texts) * bytes_per_row)


def _read_rooms(path: str, column: str, counts: Counter[str]) -> Iterator[tuple[str | None, str]]:
    """MUD world files; they are older than UTF-8, so bytes that are none are Latin-1."""
    with open_file(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    for number, room in room_texts(text, area=kind_of(path) == ".are"):
        yield room, f"{path}#{number}"
    counts["bytes"] += len(content)


Reader = Callable[[str, str, "Counter[str]"], Iterator[tuple["str | None", str]]]
READERS: dict[str, Reader] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".rst": _read_text,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_jsonl,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".wld": _read_rooms,
    ".are": _read_rooms,
}
