"""The settings of a preparation: a dataclass that is also the command's flags."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, asdict, dataclass, field, fields

from data.shards import MAX_TOKENS_PER_SHARD
from data.sources import SourceSpec, is_on_the_hub

EXECUTORS = ("local", "slurm", "ray")
# Where and how fast the work is done does not decide what the shards hold.
NOT_CONTENT = (
    *("output", "workers", "executor"),
    *("slurm_partition", "slurm_account", "slurm_qos", "slurm_time", "slurm_cpus", "slurm_memory_gb"),
)
OF_THE_HUB = ("config", "split", "revision")  # what only a Hub dataset has


def _setting(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class PrepareSettings:
    """What to prepare. Field names are the command's flags."""

    source: str = _setting(
        MISSING,
        "python-docs, hub:OWNER/NAME, or text, JSONL, Parquet or Arrow files: path, folder, glob; a long "
        "text file is cut at blank lines into documents of about 20,000 characters",
    )
    output: str = _setting(MISSING, "the shard directory to make")
    tokenizer: str = _setting("gpt2", "gpt2, a Hub id, a folder or a tokenizer.json")
    train_tokenizer: int | None = _setting(
        None, "train a byte-level BPE of this many words on the source instead"
    )
    text_column: str = _setting("text", "the column that holds the text, in files that have columns")
    config: str | None = _setting(None, "configuration of a Hub dataset, such as sample-10BT")
    split: str = _setting("train", "split of a Hub dataset to read")
    revision: str | None = _setting(None, "revision of a Hub dataset: branch, tag or commit")
    validation_tokens: int | None = _setting(
        None,
        "tokens to keep for validation; default the 1% of documents with the smallest hashes, at least one "
        "document and at most 10 million tokens",
    )
    deduplicate: bool = _setting(
        True, "drop documents that differ from an earlier one in white space at most"
    )
    near_deduplicate: bool = _setting(
        False, "drop documents that nearly repeat an earlier one too, by MinHash; takes longer than encoding"
    )
    limit_tokens: int | None = _setting(
        None, "stop after the document that reaches this many tokens, copies counted"
    )
    contamination: str | None = _setting(
        None,
        "HellaSwag's questions (.jsonl or Hub id), to count those with 13 words in a row in the corpus; or "
        "none; default Rowan/hellaswag for sources on the Hub, none for others",
    )
    tokens_per_shard: int = _setting(100_000_000, "tokens in a shard file, at most")
    workers: int | None = _setting(None, "processes that encode at once; default one a core")

    executor: str = _setting("local", "local, slurm or ray")
    slurm_partition: str | None = _setting(None, "Slurm partition to submit to")
    slurm_account: str | None = _setting(None, "Slurm account to charge")
    slurm_qos: str | None = _setting(None, "Slurm quality of service to ask for")
    slurm_time: str = _setting("24:00:00", "time limit of a Slurm task, as sbatch writes it")
    slurm_cpus: int = _setting(1, "CPUs of a Slurm or Ray task, which encodes on one of them")
    slurm_memory_gb: int = _setting(2, "memory of a Slurm or Ray task, in GB")

    def spec(self) -> SourceSpec:
        return SourceSpec(self.source, self.text_column, self.config, self.split, self.revision)

    def looks_for_questions(self) -> bool:
        """Whether evaluation questions are looked for in the corpus."""
        return self.contamination != "none" and (self.contamination is not None or is_on_the_hub(self.source))

    def validate(self) -> None:
        """Raises ValueError naming every bad value at once."""
        problems = []
        if self.tokens_per_shard < 1 or self.tokens_per_shard > MAX_TOKENS_PER_SHARD:
            problems.append(
                f"tokens_per_shard={self.tokens_per_shard:,} is not in 1..{MAX_TOKENS_PER_SHARD:,}"
            )
        if self.limit_tokens is not None and self.limit_tokens < 1:
            problems.append(f"limit_tokens={self.limit_tokens:,} is not positive")
        if self.validation_tokens is not None and self.validation_tokens < 0:
            problems.append(f"validation_tokens={self.validation_tokens:,} is negative")
        if self.executor not in EXECUTORS:
            problems.append(f"executor={self.executor!r} is none of {', '.join(EXECUTORS)}")
        elif self.executor != "local" and self.limit_tokens is not None:
            problems.append("limit_tokens needs executor=local: parts are counted one after the other")
        if self.near_deduplicate and self.limit_tokens is not None:
            problems.append("near_deduplicate looks at the whole source: no limit_tokens")
        for name in ("workers", "slurm_cpus", "slurm_memory_gb"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name}={value} is not positive")
        if self.train_tokenizer is not None and self.tokenizer != DEFAULTS["tokenizer"]:
            problems.append(
                f"tokenizer={self.tokenizer!r} and train_tokenizer={self.train_tokenizer:,}: one or the other"
            )
        if not is_on_the_hub(self.source):
            problems += [
                f"{name}={getattr(self, name)!r} is for datasets on the Hub, not for {self.source!r}"
                for name in OF_THE_HUB
                if getattr(self, name) != DEFAULTS[name]
            ]
        if problems:
            raise ValueError("Bad settings: " + "; ".join(problems) + ".")

    def content(self) -> dict:
        """The settings that decide what the shards hold."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_CONTENT}


DEFAULTS = {item.name: item.default for item in fields(PrepareSettings)}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag a field; those without a default are None when not given."""
    for item in fields(PrepareSettings):
        text = item.metadata["help"].replace("%", "%%")  # argparse formats it
        default = None if item.default is MISSING else item.default
        if item.type == "bool":
            parser.add_argument(
                f"--{item.name}", action=argparse.BooleanOptionalAction, default=default, help=text
            )
        else:
            parser.add_argument(
                f"--{item.name}",
                type=int if "int" in str(item.type) else str,
                default=default,
                help=text + ("" if default is None else f" (default: {default})"),
            )
