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
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from data.assembly import assemble, is_no_room
from data.cluster import StillRunning, encode_on_ray, encode_on_slurm
from data.contamination import contamination, contamination_in_words, save_questions
from data.encoder import PROBE_TEXTS
from data.engine import Job, encode_locally, encoder_for, start_early
from data.files import commit, write_atomically
from data.hellaswag import HUB_ID as HELLASWAG_HUB_ID
from data.hellaswag import load_questions
from data.output import (
    PARTS_FILE,
    WORK_FOLDER,
    claim,
    clear_away,
    disk_full,
    holds_what_is_asked_for,
    is_finished,
    kept_so_far,
    locked,
)
from data.plan import plan
from data.progress import Clock
from data.settings import PrepareSettings, add_flags
from data.shards import TOKENIZER_FOLDER, Manifest, read_manifest, write_manifest
from data.share import find_set, push_to_hub, take_set
from data.sources import (
    PYTHON_DOCS,
    Part,
    SourceSpec,
    find_parts,
    is_on_the_hub,
    origin_of,
    read_documents,
    read_part,
)
from data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from data.verify import hashes_of_files, verify

# The exit status while a cluster is at work, by sysexits.h: what follows with `&&` must wait.
TRY_AGAIN_LATER = 75
RECORDED_VERSIONS = ("datatrove", "gigatoken", "numpy", "pyarrow", "tokenizers", "transformers")
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
    output = Path(settings.output)
    if not holds_what_is_asked_for(output, settings) and (found := find_set(settings.spec())):
        return take_set(settings, found)
    if is_finished(output, settings):
        clear_away(output)
        print(f"{output} is already prepared with these settings: nothing to do.")
        return output
    try:
        with locked(output) as work:
            if not is_finished(output, settings):  # by the process that held the lock
                claim(work, settings)
                with Clock(work / "elapsed_seconds") as clock:
                    _prepare(settings, output, work, clock, progress)
            shutil.rmtree(work)
    except Exception as error:
        if is_no_room(error):
            raise disk_full(output) from error
        raise
    if progress:
        _print_summary(output, read_manifest(output))
    return output


def _prepare(settings: PrepareSettings, output: Path, work: Path, clock: Clock, progress: bool) -> None:
    """All stages."""
    questions = _questions(settings, work)  # a wrong file is better known now than after an hour
    spec, parts = _find_parts_once(_gather(settings.spec(), work), work)
    if settings.executor == "local" and min(_workers(settings), len(parts)) > 1:
        start_early()
    tokenizer = _make_tokenizer(settings, spec, parts, output)
    tokenizer_file = (work / "encoder.json").absolute()
    write_atomically(tokenizer_file, tokenizer.backend_tokenizer.to_str().encode())
    job = Job(
        spec,
        parts,
        work.absolute(),
        tokenizer_file,
        tokenizer.eos_token_id,
        _check_encoder(spec, parts, tokenizer_file),
        settings.limit_tokens,
        questions,
        settings.near_deduplicate,
    )
    if settings.executor == "slurm":
        folders = encode_on_slurm(job, settings)
    elif settings.executor == "ray":
        folders = encode_on_ray(job, settings)
    else:
        folders = encode_locally(job, workers=_workers(settings), progress=progress)
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    entries, counts = assemble(
        output,
        work,
        folders,
        dtype,
        deduplicate=settings.deduplicate,
        validation_tokens=settings.validation_tokens,
        limit_tokens=settings.limit_tokens,
        tokens_per_shard=settings.tokens_per_shard,
        progress=progress,
    )
    name = settings.tokenizer if settings.train_tokenizer is None else f"trained on {settings.source}"
    write_manifest(
        output,
        Manifest(
            tokenizer=name,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            dtype=dtype.name,
            shards=tuple(entries),
            settings=settings.content(),
            origin=origin_of(spec, parts[: len(folders)]),  # a limit leaves out the last
            counts=counts,
            tokenizer_files=hashes_of_files(output / TOKENIZER_FOLDER),
            contamination=contamination(questions, folders) if questions else None,
            versions={name: version(name) for name in RECORDED_VERSIONS},
            elapsed_seconds=round(clock.seconds, 1),
        ),
    )


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


def _find_parts_once(spec: SourceSpec, work: Path) -> tuple[SourceSpec, list[Part]]:
    """`find_parts`, whose result stands for all runs of this preparation: a Hub dataset is read at the commit
    that it had at first; other files that have changed in between are refused.
    """
    path = work / PARTS_FILE
    if path.exists():
        saved = json.loads(path.read_bytes())
        before = SourceSpec(**saved["spec"])
        parts = [Part(tuple(part["paths"]), part["bytes"]) for part in saved["parts"]]
        if not is_on_the_hub(before.source) and (before, parts) != find_parts(spec):
            raise ValueError(
                f"The files of {spec.source!r} have changed since this preparation began. Delete "
                f"{work.parent} and begin again."
            )
        return before, parts
    spec, parts = find_parts(spec)
    content = {"spec": asdict(spec), "parts": [asdict(part) for part in parts]}
    write_atomically(path, json.dumps(content).encode())
    return spec, parts


def _make_tokenizer(
    settings: PrepareSettings, spec: SourceSpec, parts: list[Part], output: Path
) -> PreTrainedTokenizerFast:
    folder = output / TOKENIZER_FOLDER
    if not folder.exists():
        if settings.train_tokenizer is None:
            tokenizer = load_tokenizer(settings.tokenizer)
        else:
            print(f"Training a tokenizer of {settings.train_tokenizer:,} words …")
            texts = (document.text for part in parts for document in read_part(spec, part))
            tokenizer = train_tokenizer(texts, settings.train_tokenizer)
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer {settings.tokenizer!r} has no end-of-text token to end documents with."
            )
        temporary = output / WORK_FOLDER / TOKENIZER_FOLDER
        tokenizer.save_pretrained(os.fspath(temporary))
        commit(temporary, folder)
        return tokenizer
    return load_tokenizer(folder)


def _questions(settings: PrepareSettings, work: Path) -> Path | None:
    """The file with the questions to look for, if any; decided once, so that all parts look for the same."""
    path = work.absolute() / "questions.json"
    none = work / "no_questions"
    wanted = settings.contamination
    if not settings.looks_for_questions() or none.exists():
        return None
    if not path.exists():
        try:
            questions = load_questions(wanted or HELLASWAG_HUB_ID)
        except ValueError as error:
            if wanted is not None:
                raise
            print(f"The corpus will not be compared with HellaSwag's questions: {error}.")
            write_atomically(none, b"")
            return None
        # A question's text is its context with the right ending.
        texts = [f"{question.ctx} {question.endings[question.label]}" for question in questions]
        save_questions(path, Path(wanted or HELLASWAG_HUB_ID).name, texts)
    return path


def _check_encoder(spec: SourceSpec, parts: list[Part], tokenizer_file: Path) -> str | None:
    """Compare both encoders on the source's own first documents, and say why if the slow one must be used."""
    encoder = encoder_for(tokenizer_file, None)
    texts = list(PROBE_TEXTS)
    characters = 0
    for document in read_part(spec, parts[0]):
        texts.append(document.text[:VERIFY_CHARACTERS_EACH])
        characters += len(texts[-1])
        if characters >= VERIFY_CHARACTERS:
            break
    encoder.verify(texts)
    if not encoder.is_fast:
        print(f"Encoding with tokenizers, which is slower than gigatoken: {encoder.why_slow}.")
    return encoder.why_slow


def _workers(settings: PrepareSettings) -> int:
    return settings.workers or os.cpu_count() or 1


def _print_summary(output: Path, manifest: Manifest) -> None:
    print(f"\n{'split':<12}{'shards':>8}{'documents':>14}{'tokens':>18}{'MB':>10}")
    for split in manifest.splits:
        shards = manifest.of_split(split)
        size = sum(shard.bytes for shard in shards) / 1e6
        print(
            f"{split:<12}{len(shards):>8,}{manifest.documents(split):>14,}{manifest.tokens(split):>18,}{size:>10,.1f}"
        )
    counts = manifest.counts
    share = {name: counts[name] / counts["documents"] for name in ("duplicates", "near_duplicates")}
    print(
        f"{counts['documents']:,} documents read; dropped {counts['duplicates']:,} copies "
        f"({share['duplicates']:.2%}) and {counts['near_duplicates']:,} nearly the same "
        f"({share['near_duplicates']:.2%}); {counts['blank']:,} blank or null left out; "
        f"{counts['repaired']:,} with invalid UTF-8 repaired. {manifest.elapsed_seconds:,.0f} s.\n{output}"
    )
    print(contamination_in_words(manifest.contamination))


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
        return TRY_AGAIN_LATER
    except KeyboardInterrupt:
        output = Path(arguments["output"] or "")
        kept = f"{kept_so_far(output)}; the same command goes on from there" if arguments["output"] else ""
        print(f"\nInterrupted: {kept or 'nothing was changed'}.", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: a worker was killed
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
