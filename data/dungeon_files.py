"""Where rooms come from: the bundled dataset, JSON lines with any column names, text files, MUD worlds."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.dungeons import FIELDS, Dungeon
from data.readers import kind_of
from data.sources import BUNDLED, HUB_PREFIX, SourceSpec, read_documents

BUNDLED_DUNGEONS = BUNDLED / "dungeons"
SPLITS = ("train", "validation")
# Of a source without a validation split, one room in so many is held out.
HELD_OUT_ONE_IN = 10
MUD_KINDS = (".wld", ".are")
TEXT_KINDS = (".txt", ".md", ".rst")


def read_splits(sources: Sequence[str], columns: Mapping[str, str]) -> dict[str, list[Dungeon]]:
    """Rooms of all sources, by split.

    A source is "dungeons" (the bundled set), a folder with `train.jsonl` and `validation.jsonl`, a dataset on
    the Hub (`hub:OWNER/NAME`), or anything that `data.sources` reads. If any source has a validation split,
    those are the validation; otherwise one room in HELD_OUT_ONE_IN is, chosen by its text. `columns` maps our
    names to those of the source, as {"description": "text"}.

    Raises:
        ValueError: naming the file and the line that is not what it should be, or the split that is empty.
    """
    found = {source: _read_source(source, columns) for source in sources}
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


def _read_source(source: str, columns: Mapping[str, str]) -> dict[str, list[Dungeon]]:
    path = BUNDLED_DUNGEONS if source == "dungeons" else Path(source)
    if (path / "train.jsonl").is_file():
        files = {split: path / f"{split}.jsonl" for split in SPLITS}
        return {split: read_json_lines(file, columns) for split, file in files.items() if file.is_file()}
    if source.startswith(HUB_PREFIX):
        import datasets  # heavy, and only this source needs it

        try:
            everything = datasets.load_dataset(source.removeprefix(HUB_PREFIX))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"cannot open the Hub dataset {source.removeprefix(HUB_PREFIX)!r}: {error}"
            ) from error
        found = {}
        for split in SPLITS:
            if split in everything:
                rows = ((f"{source}, {split} {n}", row) for n, row in enumerate(everything[split]))
                found[split] = list(_rows_to_dungeons(rows, columns, source))
        return found
    if (
        path.is_file()
        and kind_of(source) in (".jsonl", ".json")
        and path.suffix.lower() in (".jsonl", ".json")
    ):
        return {"train": read_json_lines(path, columns)}
    return {"train": list(_read_texts(source, columns))}


def read_json_lines(path: Path, columns: Mapping[str, str] | None = None) -> list[Dungeon]:
    """Rooms of a file with one JSON object a line; `columns` as in `read_splits`.

    Raises:
        ValueError: naming the file and the line.
    """

    def rows() -> Iterator[tuple[str, Any]]:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path.name}, line {number}"
                    try:
                        yield where, json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"{where}: not JSON ({error})") from error

    return list(_rows_to_dungeons(rows(), columns or {}, path.name))


def _rows_to_dungeons(
    rows: Iterable[tuple[str, Any]], columns: Mapping[str, str], source: str
) -> Iterator[Dungeon]:
    seen: set[str] = set()
    has_fields = has_rows = False
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: not an object but {type(row).__name__}")
        has_rows = True
        seen |= row.keys()
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
            f"{', '.join(map(repr, sorted(seen)))}: nothing could be asked for. Name their columns, as "
            "--columns setting=NAME, or give the descriptions as a text file."
        )


def _value(row: Mapping[str, Any], name: str, columns: Mapping[str, str]) -> Any:
    # By our own name where the mapped one is missing: sources with and without a mapping mix.
    return row.get(columns.get(name, name), row.get(name))


def _read_texts(source: str, columns: Mapping[str, str]) -> Iterator[Dungeon]:
    """Descriptions without fields: paragraphs of text files, whole texts of other kinds, rooms of MUD worlds.

    A MUD's room has its title.
    """
    for document in read_documents(SourceSpec(source, text_column=columns.get("description", "description"))):
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
