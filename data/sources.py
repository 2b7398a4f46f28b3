"""Where documents come from: one function per kind of source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    text: str
    id: str


@dataclass(frozen=True)
class SourceSpec:
    source: str
    text_column: str = "text"
    config: str | None = None
    split: str = "train"
    revision: str | None = None


def read_documents(spec: SourceSpec) -> Iterator[Document]:
    raise NotImplementedError
