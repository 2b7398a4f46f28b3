"""The model card, written from what happened: `python -m release.card artifacts/runs/demo`.

It goes into the run's export as README.md, with the loss curve if there is one. What is not known is left
out.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from release import sections
from release.folder import CARD_FILE, PICTURE_FILE, ReleaseError, find_run, read_config
from release.metadata import card_metadata
from release.record import read_record

# A card without it is a person's, and is never replaced.
MARK = "<!-- written by release.card from the files of the run; write your own in its place -->"


def build_card(
    folder: Path,
    run: Path | None,
    repo_id: str | None = None,
    *,
    license: str | None = None,
    language: str | None = None,
    hellaswag: Path | None = None,
    made_from: Path | None = None,
    home: Path | None = None,
) -> str:
    """The card of the export `folder`, of the run directory `run` if it is known.

    `license` and `language` are the Hub's short names ("apache-2.0", "en"): nobody but the owner knows them.
    `made_from` is the export of which this one is another form, and `home` where it will lie in the end.

    Raises:
        ReleaseError: if `folder` holds no model.
    """
    if not (folder / "adapter_config.json").exists():
        read_config(folder)
    record = read_record(folder, run, hellaswag, weights=made_from)
    home = home or folder
    beside = run if made_from is None else None  # whose files go along: with no other form
    name = repo_id or (beside.name if beside is not None else home.resolve().name)
    parts = [
        MARK,
        f"# {name.rpartition('/')[2]}",
        sections.summary(record),
        # A path of this machine is nobody else's business.
        sections.usage(record, repo_id or (home.name if home.is_absolute() else str(home))),
        sections.prompt_format(record),
        sections.results(record),
        sections.curve(folder, beside),
        sections.samples(record),
        sections.table("Data", sections.data(record)),
        sections.table("Training", sections.training(record)),
        sections.reproduce(record, repo_id) if beside is not None else "",
        sections.limits(license),
    ]
    metadata = card_metadata(record, name.rpartition("/")[2], license, language)
    body = "\n\n".join(part for part in parts if part)
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}\n"


def write_card(folder: Path, run: Path | None, **details: Any) -> Path:
    """Write the card into the export, and the run's picture beside it.

    Licence and language that the card before it names stay, unless `details` name others.

    Raises:
        ReleaseError: as `build_card`; or if there is a card that a person wrote.
    """
    card = folder / CARD_FILE
    before = card.read_text(encoding="utf-8") if card.exists() else MARK
    if not is_ours(before):
        raise ReleaseError(f"{card} was not written by this program and is left as it is; move it away first")
    if run is not None and (run / PICTURE_FILE).exists():
        shutil.copyfile(run / PICTURE_FILE, folder / PICTURE_FILE)
    # In one motion: a card that a kill cut short would pass for a person's, and stay.
    unfinished = card.with_name(f".{CARD_FILE}.unfinished")
    text = keep_owners_words(build_card(folder, run, **details), before)
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(card)
    return card


def is_ours(card: str) -> bool:
    """Whether this program wrote the card, so that it may be written anew."""
    return MARK in card


def is_empty_form(card: str) -> bool:
    """Whether it has no text but its metadata, as the Hub makes one of a licence that was chosen there."""
    return not ModelCard(card, ignore_metadata_errors=True).text.strip()


def keep_owners_words(card: str, before: str) -> str:
    """`card`, one of ours, with the licence and the language that `before` names, where it names none."""
    if not before.startswith("---"):  # it has no metadata, of which the reader would warn
        return card
    told: Any = ModelCard(card).data
    kept: Any = ModelCard(before, ignore_metadata_errors=True).data
    names = ["language"] * (told.language is None)
    names += ["license", "license_name", "license_link"] * (told.license is None)
    if not any(getattr(kept, name) for name in names):
        return card
    for name in names:
        setattr(told, name, getattr(kept, name))
    body = card.split("---\n", 2)[2]
    if "license" in names and kept.license:
        body = body.replace(sections.licence(None), sections.licence(kept.license))
    return f"---\n{told.to_yaml()}\n---\n{body}"


def for_repository(card: str, repo_id: str) -> str:
    """A card of ours whose commands name the model on the Hub rather than this machine's folder."""
    if not is_ours(card):
        return card
    # The first of its kind is the usage code's: samples, which may hold anything, come later.
    card = re.sub(r'(\bmodel=|from_pretrained\()"[^"\n]*"', rf'\1"{repo_id}"', card, count=1)
    fetching = r"(?m)^hf download \S+(?= training/settings\.yaml --local-dir \.\naccelerate launch )"
    return re.sub(fetching, f"hf download {repo_id}", card)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m release.card", description="Write a model card from what happened."
    )
    parser.add_argument("run", type=Path, help="a run directory with an export, or an export")
    parser.add_argument("--license", help="of the weights, by the Hub's short name, such as apache-2.0")
    parser.add_argument("--language", help="of the texts, such as en")
    parser.add_argument("--hellaswag", type=Path, help="results of eval_hellaswag.py; RUN/hellaswag.json")
    parser.add_argument("--repo_id", metavar="user/name", help="the model's name on the Hub")
    arguments = parser.parse_args(argv)
    folder = arguments.run / "export" if (arguments.run / "export").is_dir() else arguments.run
    run = find_run(folder)
    try:
        card = write_card(
            folder,
            run,
            repo_id=arguments.repo_id,
            license=arguments.license,
            language=arguments.language,
            hellaswag=arguments.hellaswag,
        )
    except (ReleaseError, OSError) as error:
        sys.exit(f"error: {error}")
    print(card)
    if run is not None and not (folder / PICTURE_FILE).exists():
        print(f"There is no {PICTURE_FILE}; `python -m training.report {run}` draws it, then run this again.")


if __name__ == "__main__":
    main()
