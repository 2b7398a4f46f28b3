"""Where documents come from: one function per kind of source.

A source is a name in NAMED_SOURCES, `hub:OWNER/NAME`, or files: a path, a folder (read recursively) or a
glob, also on object stores through fsspec (`s3://…`, `gs://…`). A source splits into *parts* by its files
alone, so that the work can be shared out and resumed, and always gives the same documents in the same order.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import fsspec

from data.python_docs import python_documents
from data.readers import COMPRESSIONS, READERS, kind_of, text_of
from data.remote import SourceError, in_one_line, patiently

PYTHON_DOCS = "python-docs"
DUNGEONS = "dungeons"
HUB_PREFIX = "hub:"
PART_BYTES = 64 * 2**20  # small files are read together until they fill a part
BUNDLED = Path(__file__).parent / "corpora"
# Short names: (dataset on the Hub, its configuration unless --config names another).
NAMED_SOURCES: dict[str, tuple[str, str | None]] = {
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT"),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "openwebtext": ("Skylion007/openwebtext", None),
    "tinystories": ("roneneldan/TinyStories", None),
}
WIKITEXT = HUB_PREFIX + NAMED_SOURCES["wikitext"][0]
ARTICLE_HEADING = re.compile(r"\s*= [^=\s](?:.*[^=\s])? =\s*")  # = = Sections = = have more signs
PATHS_A_REQUEST = 500  # whose sizes are asked for together
WITH_COLUMNS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
# These tell about a dataset: in a clone from the Hub, and beside files with columns, as after `save_to_disk`.
ABOUT_A_DATASET = ("readme.md", "dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json")
# FineWeb's sizes as people say them.
SIZES = {"10BT": "sample-10BT", "100BT": "sample-100BT", "350BT": "sample-350BT", "full": "default"}


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


def is_on_the_hub(source: str) -> bool:
    return source in NAMED_SOURCES or source.startswith(HUB_PREFIX)


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
    return find_parts(spec)[1]


def find_parts(spec: SourceSpec) -> tuple[SourceSpec, list[Part]]:
    """`list_parts`, and the source that they belong to: a Hub dataset's at the commit that it has now, so
    that nothing that is pushed there later changes what is read.
    """
    if spec.source == PYTHON_DOCS:
        return spec, [Part((PYTHON_DOCS,), 0)]
    if resolved(spec).source.startswith(HUB_PREFIX):
        spec, files = _find_hub_files(resolved(spec))
        if not files:  # of a kind that only `datasets` reads
            return spec, [Part((spec.source,), 0)]
    else:
        files = _find_files(resolved(spec).source)
    parts: list[Part] = []
    paths: list[str] = []
    filled = 0
    for path, size in files:
        if paths and filled + size > PART_BYTES:
            parts.append(Part(tuple(paths), filled))
            paths, filled = [], 0
        paths.append(path)
        filled += size
    return spec, [*parts, Part(tuple(paths), filled)]


def origin_of(spec: SourceSpec, parts: list[Part]) -> dict[str, Any]:
    """For the receipt: what `find_parts` found. `files_sha256` is over their names, one a line, in the order
    in which they are read: in the repository of a Hub dataset, else below the folder that they share.
    """
    origin: dict[str, Any] = {}
    paths = [path for part in parts for path in part.paths]
    if spec.source.startswith(HUB_PREFIX):
        name = spec.source.removeprefix(HUB_PREFIX)
        origin = {"dataset": name, "config": spec.config, "split": spec.split, "commit": spec.revision}
        if paths == [spec.source]:
            return origin
        names = [path.split("@", 1)[1].split("/", 1)[1] for path in paths]
    else:
        names = [path.rpartition("://")[2] for path in paths]
        shared = os.path.commonpath(map(os.path.dirname, names))
        names = [name[len(shared) :].lstrip("/") for name in names]
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    return {**origin, "files": len(names), "bytes": sum(part.bytes for part in parts), "files_sha256": digest}


def resolved(spec: SourceSpec) -> SourceSpec:
    """The source that a short name stands for; any other spec as it is."""
    if spec.source == DUNGEONS:
        # Its training split alone: the others are for measuring.
        return replace(
            spec, source=os.fspath(BUNDLED / "dungeons" / "train.jsonl"), text_column="description"
        )
    if spec.source not in NAMED_SOURCES:
        return spec
    name, config = NAMED_SOURCES[spec.source]
    return replace(spec, source=HUB_PREFIX + name, config=SIZES.get(spec.config or "", spec.config) or config)


def read_part(spec: SourceSpec, part: Part, counts: Counter[str] | None = None) -> Iterator[Document]:
    """Documents of one part, in order.

    Blank and null texts are left out, and invalid UTF-8 is replaced by U+FFFD; `counts` says how often, under
    "blank" and "repaired", and the number of the file at hand under "file".

    Raises:
        SourceError: naming the file, if it is damaged or lacks the text column.
    """
    dungeons = spec.source == DUNGEONS
    spec = resolved(spec)
    counts = Counter() if counts is None else counts
    for number, path in enumerate(part.paths):
        counts["file"] = number
        rows = _read_one(spec, path, counts)
        if dungeons:
            titles = READERS[kind_of(path)](path, "title", Counter())
            rows = ((f"{title}\n{text}", name) for (title, _), (text, name) in zip(titles, rows, strict=True))
        elif spec.source == WIKITEXT:
            rows = _articles(rows)
        for text, name in rows:
            if text is None or not text.strip():
                counts["blank"] += 1
                continue
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:  # lone surrogates, which JSON can spell and UTF-8 cannot
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                counts["repaired"] += 1
            yield Document(text, name)


def _articles(lines: Iterator[tuple[str | None, str]]) -> Iterator[tuple[str, str]]:
    """WikiText's rows are lines; from one heading ` = Title = ` up to the next they are an article.

    What a file begins with before its first heading belongs to an article of the file before.
    """
    article: list[str] = []
    name = ""
    for line, where in lines:
        if line is not None and ARTICLE_HEADING.fullmatch(line):
            if article:
                yield "".join(article), name
            article = []
        if not article:
            name = where
        article.append(line or "")
    if article:
        yield "".join(article), name


def _read_one(spec: SourceSpec, path: str, counts: Counter[str]) -> Iterator[tuple[str | None, str]]:
    if path == PYTHON_DOCS:
        for name, text in python_documents():
            yield text, name
    elif path.startswith(HUB_PREFIX):
        yield from _read_hub(resolved(spec))
    else:
        yield from READERS[kind_of(path)](path, spec.text_column, counts)


# ---- files


def _find_files(source: str) -> list[tuple[str, int]]:
    """(path, bytes) of every readable file of a path, folder or glob, sorted by path."""
    try:
        filesystem, path = fsspec.core.url_to_fs(source)
        if filesystem.isdir(path):  # before the glob: names may hold its characters, as `run[2]`
            found = filesystem.find(path, detail=True)
        elif filesystem.exists(path):
            found = {path: filesystem.info(path)}
        else:
            found = filesystem.glob(path, detail=True)
        is_one_file = found.keys() == {path}
    except (ImportError, OSError, ValueError) as error:
        raise SourceError(f"Cannot look into the source {source!r}: {error}") from error
    files = {name: info for name, info in found.items() if info["type"] == "file"}
    if not files:
        raise SourceError(
            f"No source {source!r}: it is no file, folder or glob with matches here. Other sources are "
            f"{PYTHON_DOCS}, dungeons, {', '.join(NAMED_SOURCES)} and {HUB_PREFIX}OWNER/NAME."
        )
    readable = {name: info for name, info in files.items() if kind_of(name) in READERS}
    if not readable:
        kinds = sorted({os.path.splitext(name)[1] or "(none)" for name in files})
        raise SourceError(
            f"Nothing in {source!r} can be read: its {len(files):,} files end in {', '.join(kinds[:10])}; "
            "readable are "
            f"{', '.join(READERS)}, the text kinds also with {', '.join(COMPRESSIONS)}."
        )
    about = set() if is_one_file else _about_a_dataset(files, readable)
    left = sorted({os.path.basename(name) for name in about})
    if kinds := sorted({os.path.splitext(name)[1] or "(none)" for name in files.keys() - readable.keys()}):
        left.append(f"{len(files) - len(readable):,} files that end in {', '.join(kinds[:10])}")
    if left:
        print(f"Left unread in {source}: {'; '.join(left)}.")
    return sorted(
        (filesystem.unstrip_protocol(name), int(info["size"] or 0))
        for name, info in readable.items()
        if name not in about
    )


def _about_a_dataset(files: Iterable[str], readable: Iterable[str]) -> set[str]:
    about = {name for name in readable if os.path.basename(name).lower() in ABOUT_A_DATASET}
    is_clone = any(os.path.basename(name) == ".gitattributes" for name in files)
    has_columns = any(kind_of(name) in WITH_COLUMNS for name in set(readable) - about)
    return about if is_clone or has_columns else set()


# ---- the Hub


def _find_hub_files(spec: SourceSpec) -> tuple[SourceSpec, list[tuple[str, int]]]:
    """The dataset at its commit of now and with its configuration's name; (hf:// path with the commit, bytes)
    of its files, if all are of kinds that are read here.
    """
    import datasets  # heavy, and only Hub sources need it
    from huggingface_hub import HfApi

    name = spec.source.removeprefix(HUB_PREFIX)
    api = HfApi()
    with _opening(spec):
        ask = partial(api.dataset_info, name, revision=spec.revision, expand=["sha"])
        commit = patiently(ask).sha
        builder = patiently(partial(datasets.load_dataset_builder, name, spec.config, revision=commit))
        spec = replace(spec, config=builder.config.name, revision=commit)
        by_split = builder.config.data_files or {}
        paths = [str(path) for path in by_split.get(spec.split, [])]
        if by_split and not paths:
            raise SourceError(f"{name} has no split {spec.split!r}; it has {', '.join(map(str, by_split))}.")
        if not paths or any(not path.startswith("hf://") or kind_of(path) not in READERS for path in paths):
            return spec, []
        # hf://datasets/OWNER/NAME@COMMIT/path/in/repository
        inside = [path.split("@", 1)[1].split("/", 1)[1] for path in paths]
        sizes: dict[str, int] = {}
        for first in range(0, len(inside), PATHS_A_REQUEST):
            some = inside[first : first + PATHS_A_REQUEST]
            look = partial(api.get_paths_info, name, some, repo_type="dataset", revision=commit)
            for item in patiently(look):
                sizes[item.path] = getattr(item, "size", 0)
    return spec, [(path, sizes.get(where, 0)) for path, where in zip(paths, inside, strict=True)]


def _read_hub(spec: SourceSpec) -> Iterator[tuple[str | None, str]]:
    """Any dataset of the Hub, streamed: nothing is stored but what is asked for."""
    import datasets  # heavy, and only this source needs it

    name = spec.source.removeprefix(HUB_PREFIX)
    with _opening(spec):
        rows = datasets.load_dataset(
            name, spec.config, split=spec.split, revision=spec.revision, streaming=True
        )
        columns = rows.column_names
        if columns is not None:
            if spec.text_column not in columns:
                raise SourceError(
                    f"{name} has no column {spec.text_column!r}; it has {', '.join(map(repr, columns))}."
                )
            rows = rows.select_columns([spec.text_column])
        for number, row in enumerate(rows):
            yield text_of(row, spec.text_column, f"{name}:{number}"), f"{name}:{number}"


@contextlib.contextmanager
def _opening(spec: SourceSpec) -> Iterator[None]:
    """Raises SourceError, with the dataset's name, for what the Hub or `datasets` has to say against it."""
    try:
        yield
    except SourceError:
        raise
    except (OSError, ValueError) as error:
        name = spec.source.removeprefix(HUB_PREFIX)
        raise SourceError(
            f"Cannot open the Hub dataset {name!r} (config {spec.config!r}, split {spec.split!r}): "
            f"{in_one_line(error)}"
        ) from error
