"""Text that is not about the task, by which forgetting is measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from data.shards import MANIFEST_FILE, TOKENIZER_FOLDER, open_shard, read_manifest
from data.sources import PYTHON_DOCS, SourceSpec, read_documents
from data.tokenizer import load_tokenizer


def source_beside(model: str) -> str:
    """The shards that the run of this export or checkpoint was trained on, if they lie here.

    Else documentation, which every machine has; it differs between Python's versions.
    """
    for folder in Path(model).parents[:2]:
        try:
            shards = str(yaml.safe_load((folder / "settings.yaml").read_text(encoding="utf-8"))["shards"])
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            continue
        if (Path(shards) / MANIFEST_FILE).is_file():
            return shards
    return PYTHON_DOCS


def general_texts(source: str, max_bytes: int) -> list[str]:
    """The first documents of a source, or of the validation split of a folder of token shards, cut to a size.

    Texts, not ids: models with different tokenizers are measured on the same bytes.

    Raises:
        ValueError: if the source cannot be read or is empty.
    """
    texts: list[str] = []
    left = max_bytes
    for text in (
        _validation_texts(Path(source)) if (Path(source) / MANIFEST_FILE).is_file() else _texts(source)
    ):
        text = text.encode()[:left].decode(errors="ignore").strip()
        if text:
            texts.append(text)
            left -= len(text.encode())
        if left < 4:  # less than one character may be
            break
    if not texts:
        raise ValueError(f"--general_data {source} holds no text")
    return texts


def _texts(source: str) -> Iterator[str]:
    for document in read_documents(SourceSpec(source)):
        yield document.text


def _validation_texts(shards: Path) -> Iterator[str]:
    manifest = read_manifest(shards)
    tokenizer = load_tokenizer(shards / TOKENIZER_FOLDER)
    for entry in manifest.of_split("validation"):
        for ids in open_shard(shards / entry.file):
            yield str(tokenizer.decode(ids.as_py(), skip_special_tokens=True))
