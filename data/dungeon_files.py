"""Where rooms come from: the bundled dataset, rows with any column names, text files, MUD worlds."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from data.dungeons import FIELDS, Dungeon
from data.readers import DAMAGED, decompressed, kind_of
from data.remote import open_file
from data.sources import (
    BUNDLED,
    HUB_PREFIX,
    NAMED_SOURCES,
    PYTHON_DOCS,
    SourceSpec,
    list_parts,
    read_documents,
)

BUNDLED_DUNGEONS = BUNDLED / "dungeons"
SPLITS = ("train", "validation")
# Of a source without a validation split, one room in so many is held out.
HELD_OUT_ONE_IN = 10
TABLE_KINDS = (".parquet", ".arrow")
ROW_KINDS = (".jsonl", ".ndjson", ".json", *TABLE_KINDS)
MUD_KINDS = (".wld", ".are")
TEXT_KINDS = (".txt", ".md", ".rst")


def read_splits(sources: Sequence[str], columns: Mapping[str, str]) -> dict[str, list[Dungeon]]:
    """Rooms of all sources, by split.

    A source is "dungeons" (the bundled set), a folder with files of rows named for `train` and `validation`,
    a dataset on the Hub (`hub:OWNER/NAME`), or anything that `data.sources` reads. Rows are JSON lines,
    compressed or not, Parquet or Arrow. If any source has a validation split, those are the validation;
    otherwise one room in HELD_OUT_ONE_IN is, chosen by its text. `columns` maps our names to those of the
    sources, as {"description": "text"}; where a source lacks the column, our own name is looked for.

    Raises:
        ValueError: naming the file and the line that is not what it should be, the split that is empty, or
            what in `columns` is no name of ours or of any source.
    """
    if unknown := sorted(set(columns) - {"description", *FIELDS}):
        raise ValueError(
            f"--columns {' '.join(unknown)}: no field is called so; ours are description, {', '.join(FIELDS)}"
        )
    seen: set[str] = set()  # columns of any source
    found = {source: _read_source(source, columns, seen) for source in sources}
    if missing := [f"{ours}={theirs}" for ours, theirs in columns.items() if theirs not in seen]:
        there = ", ".join(map(repr, sorted(seen))) or "none"
        raise ValueError(
            f"--columns {' '.join(missing)}: no such column in {', '.join(sources)}; there are {there}"
        )
    have_own = any("validation" in splits for splits in found.values())
    together: dict[str, list[Dungeon]] = {split: [] for split in SPLITS}
    for splits in found.values():
        for split, dungeons in splits.items():
            for dungeon in dungeons:
                held_out = split == "train" and not have_own and _is_held_out(dungeon)
                together["validation" if held_out else split].append(dungeon)
    for split, dungeons in together.items():
        if not dungeons:
            raise ValueError(
                f"the {split} split of {', '.join(sources)} is empty; it needs at least one room"
            )
    return together


def _read_source(source: str, columns: Mapping[str, str], seen: set[str]) -> dict[str, list[Dungeon]]:
    """Rooms by split. Names of columns are added to `seen`."""
    folder = BUNDLED_DUNGEONS if source == "dungeons" else Path(source)
    by_split = {split: _files_of(split, folder) for split in SPLITS}
    if by_split["train"]:
        return {
            split: [room for file in files for room in _read_rows(str(file), columns, seen)]
            for split, files in by_split.items()
            if files
        }
    if source.startswith(HUB_PREFIX):
        return _read_hub(source, columns, seen)
    if source in (PYTHON_DOCS, *NAMED_SOURCES):
        return {"train": list(_read_texts(source))}
    files = [file for part in list_parts(SourceSpec(source)) for file in part.paths]
    have_rows = any(kind_of(file) in ROW_KINDS for file in files)
    rooms: list[Dungeon] = []
    for file in files:
        if kind_of(file) in ROW_KINDS:
            rooms += _read_rows(file, columns, seen)
        elif not (have_rows and Path(file).stem.lower() == "readme"):  # the rows' card is no room
            rooms += _read_texts(file)
    return {"train": rooms}


def _files_of(split: str, folder: Path) -> list[Path]:
    """Files of rows that are named for a split, as `train.jsonl.gz` or `train-00000-of-00002.parquet`."""
    named = [*folder.glob(f"{split}.*"), *folder.glob(f"{split}-*")] if folder.is_dir() else []
    return sorted(file for file in named if kind_of(file.name) in ROW_KINDS)


def _read_hub(source: str, columns: Mapping[str, str], seen: set[str]) -> dict[str, list[Dungeon]]:
    import datasets  # heavy, and only this source needs it

    name = source.removeprefix(HUB_PREFIX)
    try:
        everything = datasets.load_dataset(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot open the Hub dataset {name!r}: {error}") from error
    found = {}
    for split in SPLITS:
        if split in everything:
            rows = ((f"{source}, {split} {n}", row) for n, row in enumerate(everything[split]))
            found[split] = list(_rows_to_dungeons(rows, columns, source, seen))
    return found


def read_json_lines(path: Path) -> list[Dungeon]:
    """Rooms of a file with one JSON object a line, in our own names.

    Raises:
        ValueError: naming the file and the line.
    """
    return list(_read_rows(str(path), {}, set()))


def _read_rows(path: str, columns: Mapping[str, str], seen: set[str]) -> Iterator[Dungeon]:
    rows = _table_rows(path) if kind_of(path) in TABLE_KINDS else _line_rows(path)
    return _rows_to_dungeons(rows, columns, Path(path).name, seen)


def _line_rows(path: str) -> Iterator[tuple[str, Any]]:
    name = Path(path).name
    try:
        with open_file(path) as stored, decompressed(stored, path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{name}, line {number}"
                    try:
                        yield where, json.loads(line)
                    except ValueError as error:
                        raise ValueError(f"{where}: not JSON ({error})") from error
    except (*DAMAGED, OSError) as error:
        raise ValueError(f"{name} cannot be read to its end: {error}") from error


def _table_rows(path: str) -> Iterator[tuple[str, Any]]:
    name = Path(path).name
    try:
        with open_file(path) as file:
            if kind_of(path) == ".parquet":
                table = pyarrow.parquet.read_table(file)
            else:
                is_stream = file.read(6) != b"ARROW1"  # as `datasets` keeps it
                file.seek(0)
                table = (pa.ipc.open_stream(file) if is_stream else pa.ipc.open_file(file)).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    for number, row in enumerate(table.to_pylist()):
        yield f"{name}, row {number}", row


def _rows_to_dungeons(
    rows: Iterable[tuple[str, Any]], columns: Mapping[str, str], source: str, seen: set[str]
) -> Iterator[Dungeon]:
    own: set[str] = set()  # columns of this source
    has_fields = has_rows = False
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: not an object but {type(row).__name__}")
        has_rows = True
        own.update(row)
        seen.update(row)
        description = _value(row, "description", columns)
        if not isinstance(description, str) or not description.strip():
            raise ValueError(
                f"{where}: no description. The row has {', '.join(map(repr, row)) or 'nothing'}; if one "
                "of them is it, say so: --columns description=NAME."
            )
        fields: dict[str, str | list[str]] = {}
        for name in FIELDS:
            has_fields = has_fields or columns.get(name, name) in row or name in row
            value = _value(row, name, columns)
            if value is None or value == "" or value == []:
                continue
            is_list = isinstance(value, list) and all(isinstance(one, str) for one in value)
            if not (isinstance(value, str) or is_list):
                raise ValueError(f"{where}: {name} must be a text or a list of texts, is {value!r}")
            fields[name] = value
        yield Dungeon(fields, description, where)
    if has_rows and not has_fields:
        raise ValueError(
            f"{source} has none of the fields {', '.join(FIELDS)} in any row, only "
            f"{', '.join(map(repr, sorted(own)))}: nothing could be asked for. Name their columns, as "
            "--columns setting=NAME, or give the descriptions as a text file."
        )


def _value(row: Mapping[str, Any], name: str, columns: Mapping[str, str]) -> Any:
    # By our own name where the mapped one is missing: sources with and without a mapping mix.
    return row.get(columns.get(name, name), row.get(name))


def _read_texts(source: str) -> Iterator[Dungeon]:
    """Descriptions without fields: paragraphs of text files, whole texts of other kinds, rooms of MUD worlds.

    A MUD's room has its title.
    """
    for document in read_documents(SourceSpec(source)):
        path = re.sub(r"[#:]\d+$", "", document.id)  # what follows is the number of a room or a piece
        if kind_of(path) in MUD_KINDS:
            title, _, description = document.text.partition("\n\n")
            yield Dungeon({"title": title} if title else {}, description.strip(), document.id)
        elif kind_of(path) in TEXT_KINDS:
            for number, paragraph in enumerate(re.split(r"\n\s*\n", document.text), start=1):
                if paragraph.strip():
                    yield Dungeon({}, " ".join(paragraph.split()), f"{document.id}, paragraph {number}")
        else:
            yield Dungeon({}, document.text.strip(), document.id)


def _is_held_out(dungeon: Dungeon) -> bool:
    digest = hashlib.sha256(dungeon.description.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0
