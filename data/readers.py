"""How each kind of file gives its texts: text, JSON lines, Parquet, Arrow; compressed or not; here or far
away.

A reader takes (path, column, counts) and yields (text or None, where it stands). It counts "repaired" texts,
and in "bytes", before it yields, how much of its stored file it has gone through.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet
import zstandard

from data.mud import room_texts
from data.remote import SourceError, open_file

COMPRESSIONS = (".gz", ".zst", ".xz")
PARQUET_ROWS_AT_ONCE = 1024
TEXT_BYTES = 1 << 18  # of a text file, decoded together
COMPRESSED_BYTES = 1 << 16  # given to Zstandard together; they may become a thousand times as many
# A book in one file must be divisible between training and validation, and shuffled by its parts.
PIECE_OF_TEXT_CHARACTERS = 20_000
BLANK_LINE = re.compile(r"\n[ \t\r]*\n")


def kind_of(path: str) -> str:
    """A file's extension in lower case, without that of its compression: ".jsonl" for "a.JSONL.zst"."""
    stem, extension = os.path.splitext(path.lower())
    if extension in COMPRESSIONS:
        extension = os.path.splitext(stem)[1]
    return extension


def decompressed(file: BinaryIO, path: str) -> BinaryIO:
    """What a stored file's bytes stand for, by its name; damaged ones raise one of DAMAGED or an OSError when
    read.
    """
    extension = os.path.splitext(path.lower())[1]
    if extension == ".gz":
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if extension == ".xz":
        return lzma.LZMAFile(file)  # type: ignore[return-value]
    if extension == ".zst":
        return io.BufferedReader(_ZstdFile(file), TEXT_BYTES)
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
                self._input = self._file.read(COMPRESSED_BYTES)
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


DAMAGED = (EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError, pa.ArrowException)


@contextlib.contextmanager
def _naming(path: str, kind: str = "") -> Iterator[None]:
    """Raises SourceError, with the file's name, for what goes wrong in reading it."""
    try:
        yield
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's: parsers' have none
            raise SourceError(f"{path} cannot be read: {error.strerror}.") from error
        if kind:
            raise SourceError(f"{path} is not a whole {kind} file ({error}).") from error
        raise SourceError(f"{path} cannot be read to its end ({error}); it is damaged or cut off.") from error


def _read_text(path: str, column: str, counts: Counter[str]) -> Iterator[tuple[str, str]]:
    with _naming(path), open_file(path) as stored, decompressed(stored, path) as file:
        pieces = cut_text(_text_blocks(file, stored, counts))
        number, waiting = 1, next(pieces)
        for following in pieces:
            yield waiting, f"{path}:{number}"
            number, waiting = number + 1, following
        yield waiting, path if number == 1 else f"{path}:{number}"


def _text_blocks(file: BinaryIO, stored: BinaryIO, counts: Counter[str]) -> Iterator[str]:
    """The file's text, block by block, so that a large file takes no memory of its size."""
    before, rest, is_repaired = counts["bytes"], b"", False
    while block := file.read(TEXT_BYTES):
        rest += block
        try:
            text, used = codecs.utf_8_decode(rest, "strict", False)
        except UnicodeDecodeError:
            text, used = codecs.utf_8_decode(rest, "replace", False)
            counts["repaired"] += not is_repaired
            is_repaired = True
        rest = rest[used:]  # a character whose other bytes are in the next block
        counts["bytes"] = before + stored.tell()
        yield text
    counts["bytes"] = before + stored.tell()
    if rest:
        counts["repaired"] += not is_repaired
        yield rest.decode("utf-8", "replace")


def cut_text(blocks: Iterable[str], limit: int = PIECE_OF_TEXT_CHARACTERS) -> Iterator[str]:
    """Pieces of at most `limit` characters that join to the text, cut after a blank line where there is one;
    at least one piece. The text comes in blocks, wherever they are cut.

    Without a blank line in a piece's second half the cut is at its last line end; a line longer than `limit`
    stays whole.
    """
    text, start, number = "", 0, 0  # what lies before `start` has been given away
    held: list[str] = []
    is_in_long_line = False
    for block in blocks:
        held.append(block)
        if is_in_long_line and "\n" not in block:
            continue
        text, start, held = text[start:] + "".join(held), 0, []
        while len(text) - start > limit:
            end = start + limit
            blanks = BLANK_LINE.finditer(text, start + limit // 2, end)
            cut = max((match.end() for match in blanks), default=0)
            cut = cut or text.rfind("\n", start, end) + 1 or text.find("\n", end) + 1
            is_in_long_line = not cut
            if is_in_long_line:
                break
            yield text[start:cut]
            start, number = cut, number + 1
    text = text[start:] + "".join(held)
    if text or not number:
        yield text


def _read_jsonl(path: str, column: str, counts: Counter[str]) -> Iterator[tuple[str | None, str]]:
    with _naming(path), open_file(path) as stored, decompressed(stored, path) as file:
        before = counts["bytes"]
        for number, line in enumerate(file, start=1):
            counts["bytes"] = before + stored.tell()
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


def text_of(row: dict[str, Any], column: str, where: str) -> str | None:
    if column not in row:
        raise SourceError(f"{where} has no column {column!r}; it has {', '.join(map(repr, row)) or 'none'}.")
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise SourceError(f"{where}: the column {column!r} holds a {type(text).__name__}, not text.")
    return text


def _read_parquet(path: str, column: str, counts: Counter[str]) -> Iterator[tuple[str | None, str]]:
    with _naming(path, "Parquet"), open_file(path) as file:
        size = file.seek(0, io.SEEK_END)
        parquet = pyarrow.parquet.ParquetFile(file)
        _check_column(parquet.schema_arrow, column, path)
        batches = parquet.iter_batches(PARQUET_ROWS_AT_ONCE, columns=[column], use_threads=False)
        rows = max(1, parquet.metadata.num_rows)
        yield from _rows(batches, path, counts, lambda done: size * done // rows)


def _read_arrow(path: str, column: str, counts: Counter[str]) -> Iterator[tuple[str | None, str]]:
    """Arrow IPC, in the stream format (as `datasets` caches it) or the file format."""
    with _naming(path, "Arrow"), open_file(path) as file:
        magic = file.read(6)
        file.seek(0)
        if magic == b"ARROW1":
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            reader = pa.ipc.open_stream(file)
            batches = iter(reader)
        _check_column(reader.schema, column, path)
        yield from _rows((batch.select([column]) for batch in batches), path, counts, lambda _: file.tell())


def _check_column(schema: pa.Schema, column: str, path: str) -> None:
    if column not in schema.names:
        raise SourceError(f"{path} has no column {column!r}; it has {', '.join(map(repr, schema.names))}.")
    kind = schema.field(column).type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(values) or pa.types.is_large_string(values) or pa.types.is_null(values)):
        raise SourceError(f"{path}: the column {column!r} holds {kind}, not text.")


def _rows(
    batches: Iterable[pa.RecordBatch], path: str, counts: Counter[str], bytes_at: Callable[[int], int]
) -> Iterator[tuple[str | None, str]]:
    """`bytes_at(rows)` says how much of the file so many rows take; asked when the last of them is read."""
    row, before, so_far = 0, counts["bytes"], 0
    for batch in batches:
        values = batch.column(0)
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        try:
            texts = values.to_pylist()
        except UnicodeDecodeError:  # Arrow trusts whoever wrote the file to have written UTF-8
            binary = values.cast(pa.large_binary()).to_pylist()
            texts = [None if value is None else _decode(value, counts) for value in binary]
        size = bytes_at(row + len(texts)) - so_far
        for number, text in enumerate(texts, start=1):
            counts["bytes"] = before + so_far + size * number // len(texts)
            yield text, f"{path}:{row}"
            row += 1
        so_far += size


def _read_rooms(path: str, column: str, counts: Counter[str]) -> Iterator[tuple[str | None, str]]:
    """MUD world files; they are older than UTF-8, so bytes that are none are Latin-1."""
    with _naming(path), open_file(path) as stored, decompressed(stored, path) as file:
        content = file.read()
        counts["bytes"] += stored.tell()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    for number, room in room_texts(text, area=kind_of(path) == ".are"):
        yield room, f"{path}#{number}"


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
