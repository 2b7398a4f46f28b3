"""Finished token shards on their way to the Hub, and back from it (or from a folder) without encoding
again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from functools import partial
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from data.assembly import DiskFullError, is_no_room
from data.contamination import contamination_in_words
from data.files import commit
from data.output import INCOMING, claim, clear_away, locked, refuse_foreign
from data.remote import in_one_line, out_of_reach, patiently
from data.settings import DEFAULTS, PrepareSettings
from data.shards import MANIFEST_FILE, TOKENIZER_FOLDER, Manifest, ShardError, read_manifest
from data.sources import (
    DUNGEONS,
    HUB_PREFIX,
    NAMED_SOURCES,
    PYTHON_DOCS,
    SourceError,
    SourceSpec,
    is_on_the_hub,
)
from data.verify import hashes_of_files, verify

CARD_FILE = "README.md"
UPLOADED_TOGETHER = 20  # shards, of 200 MB each; what has arrived is not sent again


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
        *(f"| origin: {name} | {value} |" for name, value in manifest.origin.items() if value is not None),
        *(f"| {name.replace('_', ' ')}, documents | {count:,} |" for name, count in counts.items()),
        *(f"| {name} | {value} |" for name, value in manifest.versions.items()),
        "",
        contamination_in_words(manifest.contamination),
        "",
        f"`{MANIFEST_FILE}` holds the SHA-256 of every file; `tokenizer/` the tokenizer. The text's licence "
        "is its source's.",
        "",
    ]
    return "\n".join(lines)


def push_to_hub(shard_dir: Path, name: str) -> str:
    """Upload a finished and verified set as the Hub dataset `name`, in place of a set that is there; returns
    its address.

    Large files go first, and one commit then shows all of it at once; an upload that was interrupted sends
    again only what is missing.

    Raises:
        ShardError: if the set is damaged.
        ValueError: if the Hub refuses.
    """
    verify(shard_dir)
    manifest = read_manifest(shard_dir)
    api = HfApi()
    tokenizer_files = hashes_of_files(shard_dir / TOKENIZER_FOLDER)
    ours = [MANIFEST_FILE, *(f"{TOKENIZER_FOLDER}/{file}" for file in tokenizer_files)]
    ours += [shard.file for shard in manifest.shards]
    added = [CommitOperationAdd(path, shard_dir / path) for path in ours]
    added.append(CommitOperationAdd(CARD_FILE, dataset_card(manifest).encode()))
    names = {operation.path_in_repo for operation in added}
    try:
        patiently(partial(api.create_repo, name, repo_type="dataset", exist_ok=True))
        for first in range(0, len(added), UPLOADED_TOGETHER):
            some = added[first : first + UPLOADED_TOGETHER]
            patiently(partial(api.preupload_lfs_files, name, some, repo_type="dataset"))
        # A shard or a tokenizer's file of a set that was here before would count as one of this.
        stale = [
            CommitOperationDelete(path)
            for path in patiently(partial(api.list_repo_files, name, repo_type="dataset"))
            if path not in names and (path.endswith(".arrow") or path.startswith(f"{TOKENIZER_FOLDER}/"))
        ]
        message = f"Token shards of {manifest.settings['source']}"
        commit_all = partial(api.create_commit, name, [*added, *stale], commit_message=message)
        patiently(partial(commit_all, repo_type="dataset"))
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"The Hub did not take {name!r}: {in_one_line(error.__cause__ or error)}. Check `hf auth login` "
            "and the name."
        ) from error
    return f"{api.endpoint}/datasets/{name}"


def find_set(spec: SourceSpec) -> Path | None:
    """The manifest of the token shards that the source names, if it is such a set: a folder's, or one
    downloaded.

    Raises:
        SourceError: if the Hub cannot say whether it is one.
    """
    if spec.source in (PYTHON_DOCS, DUNGEONS, *NAMED_SOURCES):
        return None
    if not is_on_the_hub(spec.source):
        path = Path(spec.source) / MANIFEST_FILE
    else:
        name = spec.source.removeprefix(HUB_PREFIX)
        ask = partial(hf_hub_download, name, MANIFEST_FILE, repo_type="dataset", revision=spec.revision)
        try:
            path = Path(patiently(ask))
        except LocalEntryNotFoundError as error:  # there was no answer to be had
            cause = error.__cause__ or error
            raise SourceError(out_of_reach(f"The Hub dataset {name!r}", cause)) from error
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            return None  # text, or nothing at all: whoever reads it will say
        except OSError as error:
            raise SourceError(out_of_reach(f"The Hub dataset {name!r}", error)) from error
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    # Other things are called manifest.json too.
    has = set(manifest) if isinstance(manifest, dict) else set()
    return path if {"format_version", "tokenizer_fingerprint", "shards"} <= has else None


def take_set(settings: PrepareSettings, manifest_file: Path) -> Path:
    """Copy or download the set into the output, verified before its manifest appears there; returns the
    output.

    Raises:
        SourceError: if settings ask for shards that are made in another way, or the output holds anything
            else.
        ShardError: if what came is not what the set's manifest says.
    """
    output = Path(settings.output)
    manifest = read_manifest(manifest_file.parent)
    _refuse_wishes(settings, manifest)
    present = output / MANIFEST_FILE
    if present.exists():
        if present.read_bytes() == manifest_file.read_bytes():
            clear_away(output)
            print(f"{output} already holds that set: nothing to do.")
            return output
        raise SourceError(
            f"The output {output} holds another set of shards. Nothing was changed; choose another."
        )
    refuse_foreign(output)
    with locked(output) as work:
        claim(work, settings)
        incoming = work / INCOMING
        try:
            if settings.source.startswith(HUB_PREFIX):
                _download(settings.spec(), manifest, incoming)
            else:
                _copy(manifest_file.parent, manifest, incoming)
        except (OSError, RuntimeError) as error:
            if not is_no_room(error):
                raise
            raise _no_room(manifest, incoming, output) from error
        try:
            print(verify(incoming))
        except ShardError:
            shutil.rmtree(work)
            with contextlib.suppress(OSError):  # it holds something from before
                output.rmdir()
            raise
        shutil.rmtree(output / TOKENIZER_FOLDER, ignore_errors=True)
        for path in sorted(incoming.iterdir()):
            if path.name != MANIFEST_FILE:
                os.replace(path, output / path.name)
        commit(incoming / MANIFEST_FILE, present)
        shutil.rmtree(work)
    return output


def _refuse_wishes(settings: PrepareSettings, manifest: Manifest) -> None:
    """A set is taken as it is: raises SourceError for settings that ask for something else."""
    recorded = {**manifest.settings, "tokenizer": manifest.tokenizer}
    wishes = [
        f"--{name} {value}"
        for name, value in settings.content().items()
        if name not in ("source", "revision") and value not in (DEFAULTS[name], recorded.get(name))
    ]
    if wishes:
        raise SourceError(
            f"{settings.source!r} is a set of token shards, which is taken as it is: {', '.join(wishes)} "
            "cannot be had from it. Leave that out, or prepare the text."
        )


def _download(spec: SourceSpec, manifest: Manifest, incoming: Path) -> None:
    name = spec.source.removeprefix(HUB_PREFIX)
    print(f"{name} is a set of token shards: downloading it.")
    ours = [
        MANIFEST_FILE,
        CARD_FILE,
        f"{TOKENIZER_FOLDER}/*",
        *(f"{split}-*.arrow" for split in manifest.splits),
    ]
    fetch = partial(snapshot_download, name, repo_type="dataset", revision=spec.revision, local_dir=incoming)
    patiently(partial(fetch, allow_patterns=ours))
    shutil.rmtree(incoming / ".cache", ignore_errors=True)


def _copy(source: Path, manifest: Manifest, incoming: Path) -> None:
    """The set's own files, and no more; what is there with its size is not copied again."""
    print(f"{source} is a set of token shards: copying it.")
    tokenizer = [path for path in (source / TOKENIZER_FOLDER).rglob("*") if path.is_file()]
    others = [
        source / name for name in (CARD_FILE, *(shard.file for shard in manifest.shards), MANIFEST_FILE)
    ]
    for old in (*tokenizer, *others):
        new = incoming / old.relative_to(source)
        new.parent.mkdir(parents=True, exist_ok=True)
        is_there = new.exists() and new.stat().st_size == old.stat().st_size
        if not is_there and (old.exists() or old.name != CARD_FILE):  # not every set has a card
            shutil.copyfile(old, new)


def _no_room(manifest: Manifest, incoming: Path, output: Path) -> DiskFullError:
    needed = sum(shard.bytes for shard in manifest.shards)
    there = sum(path.stat().st_size for path in incoming.rglob("*") if path.is_file())
    free = shutil.disk_usage(incoming).free
    return DiskFullError(
        f"The disk is full: the set has {needed / 1e6:,.1f} MB, of which {there / 1e6:,.1f} MB are in "
        f"{output}; {free / 1e6:,.1f} MB are free there. Make room and run the same command again to go on."
    )
