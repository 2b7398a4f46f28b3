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

from release.folder import (
    CARD_FILE,
    PICTURE_FILE,
    RUN_FOLDER,
    SETTINGS_FILE,
    ReleaseError,
    find_run,
    read_config,
)
from release.metadata import card_metadata, hellaswag_in_training, without_path
from release.record import Record, is_number, read_record

# A card without it is a person's, and is never replaced.
MARK = "<!-- written by release.card from the files of the run; write your own in its place -->"
# The fields of a dungeon's prompt, in their order; data/dungeons.py owns them, a test compares.
DUNGEON_FIELDS = ("title", "setting", "place", "mood", "features", "exits", "inhabitants")
RECIPE_SETTINGS = {
    "method": "method",
    "optimizer": "optimizer",
    "learning_rate": "peak learning rate",
    "final_learning_rate_ratio": "final learning rate, of the peak",
    "warmup_steps": "warm-up, steps",
    "batch_tokens": "batch, tokens a step",
    "block_size": "block, tokens",
    "weight_decay": "weight decay",
    "dropout": "dropout",
    "field_dropout": "chance that a prompt's field is left out",
    "max_grad_norm": "gradient norm at most",
    "mixed_precision": "precision",
    "seed": "seed",
}
# What finetune.py measures before and after.
FINETUNING_TEXTS = {"rooms": "held-out rooms", "general": "other text"}
SAMPLES_SHOWN = 3


def build_card(
    folder: Path,
    run: Path | None,
    repo_id: str | None = None,
    *,
    license: str | None = None,
    language: str | None = None,
    hellaswag: Path | None = None,
) -> str:
    """The card of the export `folder`, of the run directory `run` if it is known.

    `license` and `language` are the Hub's short names ("apache-2.0", "en"): nobody but the owner knows them.

    Raises:
        ReleaseError: if `folder` holds no model.
    """
    if not (folder / "adapter_config.json").exists():
        read_config(folder)
    record = read_record(folder, run, hellaswag)
    name = repo_id or (run.name if run is not None else folder.resolve().name)
    sections = [
        MARK,
        f"# {name.rpartition('/')[2]}",
        _summary(record),
        # A path of this machine is nobody else's business.
        _load(record, repo_id or (folder.name if folder.is_absolute() else str(folder))),
        _prompt_format(record),
        _results(record),
        _curve(folder, run),
        _samples(record),
        _table("Data", _data(record)),
        _table("Training", _training(record)),
        _reproduce(record, repo_id),
        _limits(license),
    ]
    metadata = card_metadata(record, name.rpartition("/")[2], license, language)
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}\n"


def write_card(folder: Path, run: Path | None, **details: Any) -> Path:
    """Write the card into the export, and the run's picture beside it.

    Licence and language that the card before it names stay, unless `details` name others.

    Raises:
        ReleaseError: as `build_card`; or if there is a card that a person wrote.
    """
    card = folder / CARD_FILE
    if card.exists():
        before = card.read_text(encoding="utf-8")
        if not is_ours(before):
            raise ReleaseError(
                f"{card} was not written by this program and is left as it is; move it away first"
            )
        for name in ("license", "language"):
            details[name] = details.get(name) or getattr(ModelCard(before).data, name)
    if run is not None and (run / PICTURE_FILE).exists():
        shutil.copyfile(run / PICTURE_FILE, folder / PICTURE_FILE)
    # In one motion: a card that a kill cut short would pass for a person's, and stay.
    unfinished = card.with_name(f".{CARD_FILE}.unfinished")
    unfinished.write_text(build_card(folder, run, **details), encoding="utf-8")
    unfinished.replace(card)
    return card


def is_ours(card: str) -> bool:
    """Whether this program wrote the card, so that it may be written anew."""
    return MARK in card


def for_repository(card: str, repo_id: str) -> str:
    """A card of ours whose commands name the model on the Hub rather than this machine's folder."""
    if not is_ours(card):
        return card
    card = re.sub(r'(\bmodel=|from_pretrained\()"[^"\n]*"', rf'\1"{repo_id}"', card)
    return re.sub(r"^hf download \S+", f"hf download {repo_id}", card, flags=re.MULTILINE)


def _summary(record: Record) -> str:
    config, sizes = record.config, []
    if record.parameters:
        sizes.append(f"{_in_units(record.parameters)} parameters")
    for key, unit in (("n_layer", "layers"), ("n_head", "heads"), ("n_embd", "wide")):
        if is_number(config.get(key)):
            sizes.append(f"{config[key]:,} {unit}")
    if is_number(config.get("vocab_size")):
        sizes.append(f"{config['vocab_size']:,} words")
    if is_number(config.get("n_positions")):
        sizes.append(f"a context of {config['n_positions']:,} tokens")
    does = "writes descriptions of dungeon rooms" if record.is_dungeons else "continues text"
    kind = "A LoRA adapter on a GPT-2" if not config else "A GPT-2"
    text = f"{kind} that {does}"
    return f"{text}: {', '.join(sizes)}." if sizes else f"{text}."


def _load(record: Record, name: str) -> str:
    if not record.config:
        return (
            f"## Use it\n\n```python\nfrom peft import AutoPeftModelForCausalLM\n\nmodel = "
            f'AutoPeftModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)\n```\n\nThe weights '
            "here are only what was learnt: the base model has to lie where `adapter_config.json` says. "
            "`finetune.py --merge` exports the two in one."
        )
    trust = ", trust_remote_code=True" if "auto_map" in record.config else ""
    prompt = record.samples[-1].get("prompt") if record.samples else None
    shown = prompt if isinstance(prompt, str) and prompt else "The"
    code = (
        "from transformers import pipeline\n\n"
        f'generate = pipeline("text-generation", model="{name}"{trust})\n'
        f'print(generate({shown!r}, max_new_tokens=50)[0]["generated_text"])'
    )
    note = (
        "\n\nThe architecture's code is in this repository: three files of PyTorch; `trust_remote_code` "
        "runs them. Read them first, or pin `revision=`."
        if trust
        else ""
    )
    return f"## Use it\n\n```python\n{code}\n```{note}"


def _prompt_format(record: Record) -> str:
    if not record.is_dungeons:
        return ""
    fields = ", ".join(f"`{name.capitalize()}`" for name in DUNGEON_FIELDS)
    prompt = "Setting: crypt\nFeatures: cracked bell, wet rope\nDescription:"
    return (
        "## Prompt format\n\nOne line for each field that you care about, in this order, and `Description:` "
        f"at the end, without a blank after it:\n\n{_fenced(prompt)}\n\nFields are {fields}; several things "
        "in one are separated by commas, and any of them may be missing. The description ends with the "
        "end-of-text token."
    )


def _results(record: Record) -> str:
    rows, validation = [], record.validation
    if validation:
        rows.append(("validation loss", f"{validation['validation_loss']:.4f} nats/token"))
        if is_number(validation.get("bits_per_byte")):
            rows.append(("validation bits per byte", f"{validation['bits_per_byte']:.4f}"))
    accuracy = record.hellaswag.get("accuracy")
    if isinstance(accuracy, dict):
        for metric, share in accuracy.items():
            value = f"{share['value']:.2%}, 95% interval {share['low']:.2%} to {share['high']:.2%}"
            rows.append((f"HellaSwag, {metric}, {share['total']:,} questions", value))
    elif found := hellaswag_in_training(record):
        part, total, (low, high) = found
        rows.append(
            (
                f"HellaSwag, acc_norm, {total:,} questions",
                f"{part:.2%}, 95% interval {low:.2%} to {high:.2%}",
            )
        )
    for name, numbers in record.finetuning.items():  # "before", "after"
        if isinstance(numbers, dict):
            rows += [
                (f"{FINETUNING_TEXTS.get(key, key)}, bits per byte, {name} fine-tuning", f"{value:.4f}")
                for key, value in numbers.items()
                if is_number(value)
            ]
    return _table("Results", rows)


def _curve(folder: Path, run: Path | None) -> str:
    if (folder / PICTURE_FILE).exists():
        return f"![Training and validation loss]({PICTURE_FILE})"
    if run is not None and (run / PICTURE_FILE).exists():
        return f"![Training and validation loss]({RUN_FOLDER}/{PICTURE_FILE})"
    return ""


def _samples(record: Record) -> str:
    lines = [line for line in record.samples if isinstance(line.get("text"), str)]
    if not lines:
        return ""
    newest = [line for line in lines if line.get("step") == lines[-1].get("step")][:SAMPLES_SHOWN]
    texts = [_fenced(f"{line.get('prompt', '')}{line['text']}") for line in newest]
    step = lines[-1].get("step")
    return "\n\n".join([f"## Samples\n\nAs they came, after step {step:,}, the prompt first.", *texts])


def _data(record: Record) -> list[tuple[str, str]]:
    receipt, settings = record.receipt, record.settings
    rows = []
    if record.is_dungeons:
        rows.append(("rooms", ", ".join(map(without_path, _as_list(settings.get("data"))))))
        rows.append(("base model", without_path(settings.get("model"))))
    elif receipt.get("source"):
        rows.append(
            ("source", " ".join(filter(None, [without_path(receipt["source"]), receipt.get("config")])))
        )
    for key, words in (
        ("training_tokens", "training tokens"),
        ("validation_tokens", "validation tokens"),
        ("documents", "documents"),
        ("duplicates_dropped", "duplicates dropped"),
        ("tokenizer", "tokenizer"),
    ):
        value = receipt.get(key)
        if value is not None:
            rows.append((words, f"{value:,}" if is_number(value) else without_path(value)))
    contamination = receipt.get("contamination")
    if isinstance(contamination, dict) and is_number(contamination.get("questions_in_corpus")):
        found, asked = contamination["questions_in_corpus"], contamination.get("questions")
        rows.append(
            ("evaluation questions found in it", f"{found:,} of {asked:,}" if asked else f"{found:,}")
        )
    if receipt.get("data_fingerprint"):
        rows.append(("fingerprint", f"`{receipt['data_fingerprint']}`"))
    return rows


def _training(record: Record) -> list[tuple[str, str]]:
    rows, started = [], record.started
    for key, words in (("step", "steps"), ("tokens", "tokens seen")):
        if (value := record.last(key)) is not None:
            rows.append((words, f"{value:,}"))
    if started.get("device"):
        many = started.get("processes")
        rows.append(
            (
                "hardware",
                started["device"] + (f", {many} processes" if isinstance(many, int) and many > 1 else ""),
            )
        )
    if (seconds := record.last("elapsed_seconds")) is not None:
        rows.append(("time", _duration(seconds)))
    if (spend := record.last("spend_usd")) is not None:
        rows.append(("spend", f"{spend:,.2f} USD"))
    if (speed := record.last("tokens_per_second")) is not None:
        rows.append(("speed at the end", f"{speed:,.0f} tokens/s"))
    if (mfu := record.last("mfu")) is not None:
        rows.append(("model FLOPs utilisation", f"{mfu:.1%}"))
    for key, words in RECIPE_SETTINGS.items():
        value = record.settings.get(key)
        if value is not None and value != "":
            rows.append((words, f"{value:,}" if isinstance(value, int) and key != "seed" else str(value)))
    versions = started.get("versions")
    if isinstance(versions, dict):
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return rows


def _reproduce(record: Record, repo_id: str | None) -> str:
    if not record.settings:
        return ""
    script = "finetune.py" if record.is_dungeons else "train_accelerate.py"
    settings = f"{RUN_FOLDER}/{SETTINGS_FILE}"
    fetch = f"hf download {repo_id or 'user/name'} {settings} --local-dir ."
    return (
        f"## Reproduce it\n\nAll settings are in `{settings}`, every step's numbers in "
        f"`{RUN_FOLDER}/metrics.jsonl`. In a checkout of gpt-scratch:\n\n```bash\n{fetch}\naccelerate launch "
        f"{script} --config {settings} --run_dir artifacts/runs/again\n```\n\nThe order of the data is a "
        "function of the seed; on the same hardware, data and versions the run repeats itself: bit for bit "
        "on a CPU, and on a GPU as far as its kernels do (`--deterministic true`)."
    )


def _limits(license: str | None) -> str:
    owner = (
        f"The weights are under the licence `{license}`."
        if license
        else ("Nobody has said yet under which licence the weights are; ask before you pass them on.")
    )
    return (
        "## Limits and licence\n\nIt continues text the way its training data would: it was not taught to "
        "answer, to follow instructions or to be right, and repeats what its data holds of mistakes and "
        f"prejudice. Nobody checked its output; do so before others rely on it.\n\n{owner} The model's code "
        "is Apache-2.0; the training text stays under the terms of its sources."
    )


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    cells = [(name, value.replace("|", "\\|").replace("\n", " ")) for name, value in rows if value]
    return (
        "\n".join([f"## {title}\n", "| | |", "|---|---|", *(f"| {n} | {v} |" for n, v in cells)])
        if cells
        else ""
    )


def _fenced(text: str) -> str:
    """A block of code that holds the text whatever it contains."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _in_units(count: int) -> str:
    for size, unit in ((10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


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
