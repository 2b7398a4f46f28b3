"""Documents → token shards: `python -m data.prepare --source … --output … --tokenizer …`.

Gather (python-docs only) → tokenizer → encode each part → choose → assemble → manifest. Every stage leaves
its results whole or not at all, so the same command after an interruption goes on where it was.
`manifest.json` comes last: a directory without it is not read by anything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import filelock
import numpy as np
from transformers import PreTrainedTokenizerFast

from data.assembly import DiskFullError, assemble, is_no_room
from data.cluster import StillRunning, encode_on_ray, encode_on_slurm
from data.contamination import contamination, question_ngrams
from data.engine import encode_locally, encoder_for, threads_per_worker
from data.plan import plan
from data.settings import PrepareSettings, add_flags
from data.shards import (
    MANIFEST_FILE,
    TOKENIZER_FOLDER,
    Manifest,
    read_manifest,
    write_atomically,
    write_manifest,
)
from data.share import find_set, push_to_hub, take_set
from data.sources import NAMED_SOURCES, PYTHON_DOCS, Part, SourceSpec, list_parts, read_documents, read_part
from data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from data.verify import verify

WORK_FOLDER = ".work"
RECORDED_VERSIONS = ("datatrove", "numpy", "pyarrow", "tiktoken", "tokenizers", "transformers")
# How much of the source both encoders are compared on before a run, and of each document.
VERIFY_CHARACTERS, VERIFY_CHARACTERS_EACH = 300_000, 30_000


def prepare(settings: PrepareSettings, *, progress: bool = True) -> Path:
    """Make the shard directory `settings.output`, or finish it, or find it finished; returns its path.

    Raises:
        ValueError: for bad settings, a source that cannot be read or is empty (SourceError), or an output
            directory that holds something else.
        StillRunning: when a Slurm cluster has the work; call again once it is done.
    """
    settings.validate()
    started = time.monotonic()
    output = Path(settings.output)
    if settings.source not in (PYTHON_DOCS, *NAMED_SOURCES) and (found := find_set(settings.spec())):
        if settings.train_tokenizer is not None:
            raise ValueError(f"{settings.source!r} is a set of token shards: --train_tokenizer needs text.")
        return take_set(settings.spec(), found, output)
    if _is_finished(output, settings):
        print(f"{output} is already prepared with these settings: nothing to do.")
        return output
    try:
        manifest = _prepare(settings, output, started, progress)
    except Exception as error:
        if is_no_room(error):
            raise _disk_full(output) from error
        raise
    if manifest is None:
        return output
    shutil.rmtree(output / WORK_FOLDER)
    if progress:
        _print_summary(output, manifest)
    return output


def _prepare(settings: PrepareSettings, output: Path, started: float, progress: bool) -> Manifest | None:
    """All stages, under the lock; None if another process had finished them."""
    work = output / WORK_FOLDER
    work.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(work / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(
            f"Another process is preparing {output}; wait for it or choose another output."
        ) from None
    try:
        if _is_finished(output, settings):  # by the process that held the lock
            return None
        _claim(work, settings)
        if settings.contamination:
            question_ngrams(settings.contamination)  # a wrong file is better known now than after an hour
        spec = _gather(settings.spec(), work)
        parts = _list_parts_once(spec, work)
        tokenizer = _make_tokenizer(settings, spec, output)
        why_slow = _check_encoder(settings, spec, parts, output / TOKENIZER_FOLDER)
        dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        folders = _encode(settings, spec, parts, output / TOKENIZER_FOLDER, work, why_slow, progress)
        entries, counts = assemble(
            output,
            work / "shards",
            folders,
            dtype,
            deduplicate=settings.deduplicate,
            validation_tokens=settings.validation_tokens,
            limit_tokens=settings.limit_tokens,
            tokens_per_shard=settings.tokens_per_shard,
            progress=progress,
        )
        return write_manifest(
            output,
            Manifest(
                tokenizer=settings.tokenizer
                if settings.train_tokenizer is None
                else f"trained on {settings.source}",
                tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
                vocab_size=len(tokenizer),
                eos_token_id=tokenizer.eos_token_id,
                dtype=dtype.name,
                shards=tuple(entries),
                settings=settings.content(),
                counts=counts,
                contamination=contamination(settings.contamination, folders)
                if settings.contamination
                else None,
                versions={name: version(name) for name in RECORDED_VERSIONS},
                elapsed_seconds=round(time.monotonic() - started, 1),
            ),
        )
    finally:
        lock.release()


# ---- the output directory


def _is_finished(output: Path, settings: PrepareSettings) -> bool:
    if not output.exists():
        return False
    if not output.is_dir():
        raise ValueError(f"The output {output} is a file; name a folder.")
    if (output / MANIFEST_FILE).exists():
        _refuse_other_settings(output, read_manifest(output).settings, settings, "holds shards")
        return True
    foreign = sorted(path.name for path in output.iterdir() if path.name != WORK_FOLDER)
    if foreign and not (output / WORK_FOLDER).exists():
        raise ValueError(
            f"The output {output} holds something else "
            f"({', '.join(foreign[:5])}{', …' if len(foreign) > 5 else ''}). "
            "Nothing was changed; choose an empty or new folder."
        )
    return False


def _refuse_other_settings(output: Path, before: dict, settings: PrepareSettings, what: str) -> None:
    now = settings.content()
    unlike = [
        f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in now if before.get(name) != now[name]
    ]
    if unlike:
        raise ValueError(
            f"The output {output} {what} made with other settings: {'; '.join(unlike)}. Nothing was "
            "changed; choose "
            "another output, or delete that folder first."
        )


def _claim(work: Path, settings: PrepareSettings) -> None:
    """Note the settings on the first run; refuse to go on with others later."""
    path = work / "settings.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        _refuse_other_settings(work.parent, before, settings, "holds an unfinished preparation")
        print(f"Going on with the unfinished preparation in {work.parent}.")
    else:
        write_atomically(path, json.dumps(settings.content()).encode())


# ---- stages


def _gather(spec: SourceSpec, work: Path) -> SourceSpec:
    """python-docs becomes one file first: reading it takes longer than encoding it, and the tokenizer reads
    it too.
    """
    if spec.source != PYTHON_DOCS:
        return spec
    path = work / "python-docs.jsonl"
    if not path.exists():
        print("Gathering the documentation in this Python environment …")
        lines = (json.dumps({"text": document.text}) for document in read_documents(spec))
        write_atomically(path, "\n".join(lines).encode())
    return SourceSpec(os.fspath(path))


def _list_parts_once(spec: SourceSpec, work: Path) -> list[Part]:
    """The parts of the source; on a later run, refuse one that has changed in between."""
    parts = list_parts(spec)
    content = json.dumps([asdict(part) for part in parts]).encode()
    path = work / "parts.json"
    if path.exists() and path.read_bytes() != content:
        raise ValueError(
            f"The files of {spec.source!r} have changed since this preparation began. Delete {work.parent} "
            "and begin again."
        )
    write_atomically(path, content)
    return parts


def _make_tokenizer(settings: PrepareSettings, spec: SourceSpec, output: Path) -> PreTrainedTokenizerFast:
    folder = output / TOKENIZER_FOLDER
    if not folder.exists():
        if settings.train_tokenizer is None:
            tokenizer = load_tokenizer(settings.tokenizer)
        else:
            print(f"Training a tokenizer of {settings.train_tokenizer:,} words …")
            tokenizer = train_tokenizer(
                (document.text for document in read_documents(spec)), settings.train_tokenizer
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer {settings.tokenizer!r} has no end-of-text token to end documents with."
            )
        temporary = output / WORK_FOLDER / TOKENIZER_FOLDER
        tokenizer.save_pretrained(os.fspath(temporary))
        os.replace(temporary, folder)
        return tokenizer
    return load_tokenizer(folder)


def _check_encoder(
    settings: PrepareSettings, spec: SourceSpec, parts: list[Part], tokenizer_folder: Path
) -> str | None:
    """Compare both encoders on the source's own first documents, and say why if the slow one must be used."""
    workers = min(_workers(settings), len(parts))
    encoder, _ = encoder_for(tokenizer_folder, threads_per_worker(workers))
    texts: list[str] = []
    characters = 0
    for document in read_part(spec, parts[0]):
        texts.append(document.text[:VERIFY_CHARACTERS_EACH])
        characters += len(texts[-1])
        if characters >= VERIFY_CHARACTERS:
            break
    encoder.verify(texts)
    if not encoder.is_fast:
        print(f"Encoding with tokenizers, which is slower than tiktoken: {encoder.why_slow}.")
    return encoder.why_slow


def _workers(settings: PrepareSettings) -> int:
    return settings.workers or os.cpu_count() or 1


def _encode(
    settings: PrepareSettings,
    spec: SourceSpec,
    parts: list[Part],
    tokenizer_folder: Path,
    work: Path,
    why_slow: str | None,
    progress: bool,
) -> list[Path]:
    """The folders of all encoded parts, in order."""
    if settings.executor == "slurm":
        return encode_on_slurm(settings, spec, parts, tokenizer_folder, work, why_slow)
    if settings.executor == "ray":
        return encode_on_ray(settings, spec, parts, tokenizer_folder, work, why_slow)
    return encode_locally(
        spec,
        parts,
        tokenizer_folder,
        work,
        workers=_workers(settings),
        why_slow=why_slow,
        limit_tokens=settings.limit_tokens,
        questions=settings.contamination,
        progress=progress,
    )


def _disk_full(output: Path) -> DiskFullError:
    """The arithmetic of a full disk: what is there, what is still to come, by the rate of the parts that are
    done.
    """
    work = output / WORK_FOLDER
    free = shutil.disk_usage(output if output.exists() else output.absolute().anchor).free
    try:
        parts = [Part(**part) for part in json.loads((work / "parts.json").read_bytes())]
    except (OSError, ValueError):
        return DiskFullError(
            f"The disk is full: {free / 1e6:,.1f} MB are free at {output}, and nothing is encoded yet. "
            "Make room and run the same command again."
        )
    folders = [work / "parts" / f"{number:05d}" for number in range(len(parts))]
    done = [
        (part.bytes, (folder / "ids.bin").stat().st_size)
        for part, folder in zip(parts, folders, strict=True)
        if folder.exists()
    ]
    read, written = sum(size for size, _ in done), sum(size for _, size in done)
    total = sum(part.bytes for part in parts)
    # Before the first part is done: a token, two bytes, stands for about four bytes of English.
    encoded = written * total / read if read else total / 2
    return DiskFullError(
        f"The disk is full: {free / 1e6:,.1f} MB are free at {output}. {len(done)} of {len(parts)} parts "
        "are encoded, in "
        f"{written / 1e6:,.1f} MB; all will need about {encoded / 1e6:,.1f} MB, and the shards as much "
        "again before "
        "the parts are deleted. Make room and run the same command again: finished parts are kept."
    )


def _print_summary(output: Path, manifest: Manifest) -> None:
    print(f"\n{'split':<12}{'shards':>8}{'documents':>14}{'tokens':>18}{'MB':>10}")
    for split in manifest.splits:
        shards = manifest.of_split(split)
        size = sum(shard.bytes for shard in shards) / 1e6
        print(
            f"{split:<12}{len(shards):>8,}{manifest.documents(split):>14,}{manifest.tokens(split):>18,}{size:>10,.1f}"
        )
    counts = manifest.counts
    print(
        f"{counts['documents']:,} documents read, {counts['duplicates']:,} of them copies "
        f"({counts['duplicates'] / counts['documents']:.2%}, dropped); {counts['blank']:,} blank or null "
        "left out; "
        f"{counts['repaired']:,} with invalid UTF-8 repaired. {manifest.elapsed_seconds:,.0f} s.\n{output}"
    )
    if found := manifest.contamination:
        print(
            f"{found['questions_in_corpus']:,} of {found['questions']:,} {found['evaluation']} questions "
            "have "
            f"{found['words_in_a_row']} words in a row in the corpus."
        )


# ---- the command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare",
        description="Turn text into token shards. After an interruption, the same command goes on.",
    )
    add_flags(parser)
    parser.add_argument(
        "--plan", action="store_true", help="print what would be read and written; touch nothing"
    )
    parser.add_argument(
        "--verify", metavar="DIR", help="check every byte of a finished shard directory instead"
    )
    parser.add_argument(
        "--push_to_hub", metavar="OWNER/NAME", help="upload the finished --output as a Hub dataset"
    )
    arguments = vars(parser.parse_args(argv))
    plan_only, verify_dir, hub_name = (arguments.pop(name) for name in ("plan", "verify", "push_to_hub"))
    try:
        if verify_dir is not None:
            print(verify(Path(verify_dir)))
            return 0
        if hub_name and arguments["source"] is None and arguments["output"] is not None:
            print(push_to_hub(Path(arguments["output"]), hub_name))
            return 0
        missing = [f"--{name}" for name in ("source", "output") if arguments[name] is None]
        if missing:
            parser.error(f"needed: {' and '.join(missing)} (or --verify DIR)")
        settings = PrepareSettings(**arguments)
        if plan_only:
            print(plan(settings))
        else:
            output = prepare(settings)
            if hub_name:
                print(push_to_hub(output, hub_name))
    except StillRunning as state:
        print(state)
    except (ValueError, PermissionError, RuntimeError) as error:  # RuntimeError: a worker was killed
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
