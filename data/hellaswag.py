"""HellaSwag (Zellers et al. 2019): a beginning, four endings, one of them right."""

from __future__ import annotations

import hashlib
import json
import lzma
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

HUB_ID = "Rowan/hellaswag"
OFFICIAL_VALIDATION_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
ENDINGS = 4


@dataclass(frozen=True)
class Question:
    """One row of the official file; `ctx` is `ctx_a`, a space and `ctx_b` where the latter is not empty.

    `label` is the index of the right ending, `source` "activitynet" or "wikihow" ("unknown" where the row
    does not say), `index` the row's number in its file or split, from 0.
    """

    index: int
    activity_label: str
    ctx_a: str
    ctx_b: str
    ctx: str
    endings: tuple[str, str, str, str]
    label: int
    source: str

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that stand for all that is asked and the answer, wherever the row stands."""
        asked = [self.activity_label, self.ctx_a, self.ctx_b, self.ctx, self.endings, self.label]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def load_questions(source: str, *, split: str = "validation", limit: int | None = None) -> list[Question]:
    """The first `limit` questions (all if None) of a Hub dataset such as Rowan/hellaswag or of a local
    `.jsonl`.

    A local file (also `.jsonl.xz`) has the official fields; it holds one split, so `split` only matters on
    the Hub.

    Raises:
        ValueError: if the limit is not positive, if there is no such file or dataset, or for the first rows
            that are wrong, each with its line.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} questions leaves none; give at least 1")
    path = Path(source)
    if path.is_file():
        try:
            return parse_questions(_numbered_lines(path), limit=limit)
        except (lzma.LZMAError, EOFError) as error:
            raise ValueError(f"{path} is damaged or cut off ({error}); fetch it anew") from error
    if path.suffix in (".jsonl", ".json", ".xz") or source.startswith((".", "/", "~")):
        raise ValueError(
            f"no file {source}; give the official hellaswag_val.jsonl or a Hub id such as {HUB_ID}"
        )
    try:
        rows = datasets.load_dataset(source, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load split {split!r} of the dataset {source!r} ({error}); without network, download "
            "hellaswag_val.jsonl once from github.com/rowanz/hellaswag and give its path"
        ) from error
    return parse_questions(((f"row {number}", row) for number, row in enumerate(rows)), limit=limit)


def origin(source: str, split: str) -> dict[str, str | None]:
    """The dataset's `type`, `name` and `split` for a model card, of questions that `load_questions` takes.

    A file is its owner's, of no known split, unless its bytes are the official validation file's.
    """
    path = Path(source)
    if not path.is_file():
        name = "HellaSwag" if source == HUB_ID else source.rsplit("/", 1)[-1]
        return {"type": source, "name": name, "split": split}
    if is_official_validation_file(path):
        return {"type": HUB_ID, "name": "HellaSwag", "split": "validation"}
    return {"type": "text", "name": f"HellaSwag questions of {path.name}", "split": None}


def is_official_validation_file(path: Path) -> bool:
    """Whether the file's bytes, unpacked, are those of the official hellaswag_val.jsonl."""
    with _opener(path)(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest() == OFFICIAL_VALIDATION_SHA256


def _opener(path: Path) -> Callable[..., Any]:
    return lzma.open if path.suffix == ".xz" else open


def parse_questions(rows: Iterable[tuple[str, Any]], *, limit: int | None = None) -> list[Question]:
    """Questions from pairs of a place ("line 7") and that row's fields.

    Raises:
        ValueError: if there are no rows, or naming up to five rows that are wrong and what is wrong with
            each.
    """
    questions, problems = [], []
    for index, (place, row) in enumerate(islice(rows, limit)):
        problem = _problem_with(row)
        if problem is None:
            questions.append(_question(index, row))
        else:
            problems.append(f"{place}: {problem}")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5:,} more" if len(problems) > 5 else "")
        raise ValueError(f"{len(problems):,} questions are not as in the official file: {shown}")
    if not questions:
        raise ValueError("no questions: the file or split is empty")
    return questions


def _numbered_lines(path: Path) -> Iterable[tuple[str, Any]]:
    if not is_official_validation_file(path):
        warnings.warn(
            f"{path.name} is not the official hellaswag_val.jsonl (its SHA-256 differs): results on it "
            "cannot be compared with published ones",
            stacklevel=3,
        )
    with _opener(path)(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                yield f"line {number}", error


def _problem_with(row: Any) -> str | None:
    if not isinstance(row, Mapping):
        return f"not JSON ({row})" if isinstance(row, Exception) else f"a {type(row).__name__}, not an object"
    for name in ("activity_label", "ctx_a", "ctx_b", "ctx"):
        if not isinstance(row.get(name), str):
            return f"{name} is {row.get(name)!r}; a text is needed"
    if not row["ctx"].strip():
        return "ctx is blank; there is nothing to continue"
    endings = row.get("endings")
    if (
        not isinstance(endings, list)
        or len(endings) != ENDINGS
        or not all(isinstance(e, str) and e.strip() for e in endings)
    ):
        return f"endings is {endings!r}; {ENDINGS} texts are needed, none of them empty"
    if str(row.get("label")) not in ("0", "1", "2", "3"):
        hint = " (the test split has no labels)" if row.get("label") in ("", None) else ""
        return f"label is {row.get('label')!r}; 0, 1, 2 or 3 is needed{hint}"
    return None


def _question(index: int, row: Mapping[str, Any]) -> Question:
    # "activitynet~v_abc" in the official file; a plain `origin` in files that dropped the identifiers.
    source = str(row.get("source_id") or row.get("origin") or "unknown").split("~")[0]
    return Question(
        index=index,
        activity_label=row["activity_label"],
        ctx_a=row["ctx_a"],
        ctx_b=row["ctx_b"],
        ctx=row["ctx"],
        endings=tuple(row["endings"]),  # type: ignore[arg-type]
        label=int(row["label"]),
        source=source,
    )
