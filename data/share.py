"""Finished token shards on their way to the Hub, and back from it (or from a folder) without encoding
again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from data.files import commit_file
from data.readers import patiently
from data.shards import MANIFEST_FILE, Manifest, ShardError, read_manifest
from data.sources import HUB_PREFIX, SourceError, SourceSpec
from data.verify import verify

CARD_FILE = "README.md"


def dataset_card(manifest: Manifest) -> str:
    """The README of a set on the Hub: how to load it, and its receipt in words."""
    counts, settings = manifest.counts, manifest.settings
    lines = ["---", "tags:", "- token-shards", "configs:", "- config_name: default", "  data_files:"]
    for split in manifest.splits:
        lines += [f"  - split: {split}", f"    path: {split}-*.arrow"]
    lines += [
        "---",
        f"# Token shards of {settings['source']}",
        "",
        f"{manifest.tokens():,} tokens of {manifest.documents():,} documents, encoded with "
        f"{manifest.tokenizer} "
        f"({manifest.vocab_size:,} words, `{manifest.dtype}`); each document ends in the id "
        f"{manifest.eos_token_id}.",
        "",
        "| split | shards | documents | tokens |",
        "|---|---|---|---|",
        *(
            f"| {split} | {len(manifest.of_split(split)):,} | {manifest.documents(split):,} "
            f"| {manifest.tokens(split):,} |"
            for split in manifest.splits
        ),
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in settings.items() if value is not None),
        *(f"| {name.replace('_', ' ')}, documents | {count:,} |" for name, count in counts.items()),
        *(f"| {name} | {value} |" for name, value in manifest.versions.items()),
        "",
        f"`{MANIFEST_FILE}` holds the SHA-256 of every file; `tokenizer/` the tokenizer. The text's "
        "licence is its "
        "source's.",
        "",
    ]
    return "\n".join(lines)


def push_to_hub(shard_dir: Path, name: str) -> str:
    """Upload a finished and verified set as the Hub dataset `name`; returns its address.

    Raises:
        ShardError: if the set is damaged.
        ValueError: if the Hub refuses.
    """
    verify(shard_dir)
    manifest = read_manifest(shard_dir)
    api = HfApi()
    try:
        patiently(lambda: api.create_repo(name, repo_type="dataset", exist_ok=True))
        card = dataset_card(manifest).encode()
        api.upload_file(path_or_fileobj=card, path_in_repo=CARD_FILE, repo_id=name, repo_type="dataset")
        # The manifest goes last: a set without it is not taken for one, here as on the disk.
        patterns = ["tokenizer/*", *(entry.file for entry in manifest.shards)]
        api.upload_folder(folder_path=shard_dir, repo_id=name, repo_type="dataset", allow_patterns=patterns)
        api.upload_file(
            path_or_fileobj=shard_dir / MANIFEST_FILE,
            path_in_repo=MANIFEST_FILE,
            repo_id=name,
            repo_type="dataset",
        )
    except HfHubHTTPError as error:
        raise ValueError(
            f"The Hub did not take {name!r}: {error}. Check `hf auth login` and the name."
        ) from error
    return f"{api.endpoint}/datasets/{name}"


def find_set(spec: SourceSpec) -> Path | None:
    """The manifest of the token shards that the source names, if it is such a set: a folder's, or one
    downloaded.
    """
    if not spec.source.startswith(HUB_PREFIX):
        path = Path(spec.source) / MANIFEST_FILE
        return path if path.is_file() else None
    name = spec.source.removeprefix(HUB_PREFIX)
    try:
        return Path(hf_hub_download(name, MANIFEST_FILE, repo_type="dataset", revision=spec.revision))
    except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError):
        return None  # text, or nothing at all: whoever reads it will say


def take_set(spec: SourceSpec, manifest_file: Path, output: Path) -> Path:
    """Copy or download the set into `output`, verified before its manifest appears there; returns `output`.

    Raises:
        SourceError: if the output holds anything else.
        ShardError: if what came is not what the set's manifest says.
    """
    content = manifest_file.read_bytes()
    present = output / MANIFEST_FILE
    if present.exists():
        if present.read_bytes() == content:
            print(f"{output} already holds that set: nothing to do.")
            return output
        raise SourceError(
            f"The output {output} holds another set of shards. Nothing was changed; choose another."
        )
    incoming = output.with_name(output.name + ".incoming")
    if output.exists() and any(output.iterdir()):
        raise SourceError(f"The output {output} holds something else. Nothing was changed; choose another.")
    if spec.source.startswith(HUB_PREFIX):
        name = spec.source.removeprefix(HUB_PREFIX)
        print(f"{name} is a set of token shards: downloading it.")
        patiently(
            lambda: snapshot_download(name, repo_type="dataset", revision=spec.revision, local_dir=incoming)
        )
        shutil.rmtree(incoming / ".cache", ignore_errors=True)
    else:
        print(f"{spec.source} is a set of token shards: copying it.")
        shutil.copytree(spec.source, incoming, dirs_exist_ok=True)
    try:
        print(verify(incoming))
    except ShardError:
        shutil.rmtree(incoming)
        raise
    if output.exists():
        output.rmdir()
    commit_file(incoming, output.absolute())
    return output
