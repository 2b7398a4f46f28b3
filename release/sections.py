"""The sections of a model card as Markdown, each from what is known of the model; empty where nothing is."""

import re
from pathlib import Path
from typing import Any

from release.folder import PICTURE_FILE, RUN_FOLDER, SETTINGS_FILE
from release.metadata import hellaswag_in_training, without_path
from release.record import Record, is_number

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


def summary(record: Record) -> str:
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
    text = f"{text}: {', '.join(sizes)}." if sizes else f"{text}."
    if record.is_averaged:
        text += " Its weights are the moving average of the run's, not the last ones."
    return f"{text} {record.quantisation}" if record.quantisation else text


def usage(record: Record, name: str) -> str:
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
    notes = []
    if trust:
        notes.append(
            "The architecture's code is in this repository: three files of PyTorch; `trust_remote_code` "
            "runs them. Read them first, or pin `revision=`."
        )
    elif record.config.get("model_type") == "gpt2":
        notes.append("It is transformers' own `GPT2LMHeadModel`, so no code comes along.")
    if record.quantisation:
        notes.append("Loading it takes `pip install torchao`.")
    return "\n\n".join([f"## Use it\n\n```python\n{code}\n```", *notes])


def prompt_format(record: Record) -> str:
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


def results(record: Record) -> str:
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
    return table(f"Results{_before(record)}", rows)


def _before(record: Record) -> str:
    """What was measured in training was not measured of quantised weights."""
    return " before quantising" if record.quantisation else ""


def curve(folder: Path, run: Path | None) -> str:
    if (folder / PICTURE_FILE).exists():
        return f"![Training and validation loss]({PICTURE_FILE})"
    if run is not None and (run / PICTURE_FILE).exists():
        return f"![Training and validation loss]({RUN_FOLDER}/{PICTURE_FILE})"
    return ""


def samples(record: Record) -> str:
    lines = [line for line in record.samples if isinstance(line.get("text"), str)]
    if not lines:
        return ""
    newest = [line for line in lines if line.get("step") == lines[-1].get("step")][:SAMPLES_SHOWN]
    texts = [_fenced(f"{line.get('prompt', '')}{line['text']}") for line in newest]
    step = lines[-1].get("step")
    heading = f"## Samples{_before(record)}"
    return "\n\n".join([f"{heading}\n\nAs they came, after step {step:,}, the prompt first.", *texts])


def data(record: Record) -> list[tuple[str, str]]:
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


def training(record: Record) -> list[tuple[str, str]]:
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


def reproduce(record: Record, repo_id: str | None) -> str:
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


def limits(license: str | None) -> str:
    return (
        "## Limits and licence\n\nIt continues text the way its training data would: it was not taught to "
        "answer, to follow instructions or to be right, and repeats what its data holds of mistakes and "
        f"prejudice. Nobody checked its output; do so before others rely on it.\n\n"
        f"{licence(license)} The model's code "
        "is Apache-2.0; the training text stays under the terms of its sources."
    )


def licence(license: str | None) -> str:
    """The sentence about it."""
    if license:
        return f"The weights are under the licence `{license}`."
    return "Nobody has said yet under which licence the weights are; ask before you pass them on."


def table(title: str, rows: list[tuple[str, str]]) -> str:
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
