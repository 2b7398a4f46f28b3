"""The settings of fine-tuning: those of training, and what it starts from, learns from and learns by."""

from dataclasses import dataclass

from training.recipe import TrainSettings
from training.settings import setting

# What pretraining decides and a base brings along.
DECIDED_BY_THE_BASE = ("n_layer", "n_head", "n_embd", "shards", "source", "tokenizer", "train_tokenizer")


@dataclass(frozen=True)
class FinetuneSettings(TrainSettings):
    """What `finetune.py` can be told; recipes say what they change."""

    # Base
    model: str = setting(
        "artifacts/runs/demo/export",
        "what to start from: a folder or a Hub id; stock GPT-2 is converted, others stay as they are",
        changes_run=True,
    )
    convert: str = setting(
        "auto",
        "yes insists that the base is a stock GPT-2 and becomes ours; no trains it as it is",
        choices=("auto", "yes", "no"),
        changes_run=True,
    )
    trust_remote_code: bool = setting(False, "run code that comes with a base or teacher which is not ours")
    # Data
    data: tuple[str, ...] = setting(
        ("dungeons",),
        "where rooms come from, any number of: dungeons (bundled), a folder with train.jsonl and "
        "validation.jsonl, .jsonl, text files, MUD worlds, hub:OWNER/NAME",
    )
    columns: tuple[str, ...] = setting(
        (), "names of our fields in the data, as description=text title=name", changes_run=True
    )
    field_dropout: float = setting(
        0.2, "chance of each field to be left out of a prompt in training", at_least=0, changes_run=True
    )
    drop_too_long: bool = setting(
        False, "leave out descriptions longer than the context instead of stopping", changes_run=True
    )
    packing: str = setting(
        "auto",
        "several rooms in a row of the batch; auto tries first whether the model keeps them apart",
        choices=("auto", "yes", "no"),
        changes_run=True,
    )
    general_data: str = setting(
        "",
        "text by which forgetting is measured: a folder of token shards or any source of data.prepare; empty "
        "takes what the base was trained on, if it lies beside it, or else documentation (python-docs)",
    )
    general_bytes: int = setting(60_000, "how much of that text", "bytes", at_least=1000)
    # Method
    method: str = setting(
        "full", "what is trained, and by what", choices=("full", "lora", "distill"), changes_run=True
    )
    lora_rank: int = setting(16, "rank of LoRA's updates", at_least=1, changes_run=True)
    lora_alpha: float = setting(
        32.0, "LoRA's updates are scaled by alpha / rank", at_least=0, changes_run=True
    )
    lora_dropout: float = setting(0.0, "dropout before LoRA's updates", at_least=0, changes_run=True)
    lora_targets: tuple[str, ...] = setting(
        ("all-linear",), "names of the layers that get one; all-linear is each but the head", changes_run=True
    )
    merge: bool = setting(
        True,
        "with lora, export whole weights, the adapter beside them in the folder `adapter`; false exports the "
        "adapter alone",
    )
    teacher: str = setting("", "with distill, the larger model to learn from", changes_run=True)
    teacher_weight: float = setting(
        0.5, "part of the loss that is the teacher's; the rest is the text's", at_least=0, changes_run=True
    )
    teacher_temperature: float = setting(
        2.0, "both models' logits are divided by this in the teacher's part", at_least=1e-3, changes_run=True
    )
    teacher_cache: str = setting(
        "", "folder for the teacher's hidden states, computed once for each row; empty keeps none"
    )
    # Writing
    sample_top_p: float = setting(0.95, "the export's nucleus: the likeliest words of so much", at_least=0)
    repetition_penalty: float = setting(1.05, "the export's penalty on words it has used", at_least=1)

    def problems(self) -> list[str]:
        """Values that are possible alone but not together."""
        # Where the base decides, the inherited checks would complain about values that nobody reads.
        fresh = TrainSettings()
        given = [name for name in DECIDED_BY_THE_BASE if getattr(self, name) != getattr(fresh, name)]
        problems = super().problems()
        if given:
            problems.append(f"{', '.join(given)}: decided by the base (--model); leave it out")
        for name in ("field_dropout", "lora_dropout"):
            if getattr(self, name) >= 1:
                problems.append(f"{name}={getattr(self, name)} must be below 1")
        for name in ("teacher_weight", "sample_top_p"):
            if getattr(self, name) > 1:
                problems.append(f"{name}={getattr(self, name)} must be at most 1")
        if self.method == "distill" and not self.teacher:
            problems.append("method distill needs a --teacher")
        if self.method != "distill" and (self.teacher or self.teacher_cache):
            problems.append(f"--teacher and --teacher_cache are for --method distill, not {self.method}")
        if self.method == "lora" and self.hub_strategy == "every_save":
            problems.append("hub_strategy every_save: a checkpoint of LoRA is no model to load; only end is")
        if self.method != "lora" and not self.merge:
            problems.append(
                f"--merge false is for --method lora; {self.method} has no adapter to export alone"
            )
        if wrong := [pair for pair in self.columns if "=" not in pair]:
            problems.append(f"columns {' '.join(wrong)}: give OURS=THEIRS, as description=text")
        elif len(self.column_names()) < len(self.columns):
            problems.append(f"columns {' '.join(self.columns)}: one of our names is given twice")
        return problems

    def column_names(self) -> dict[str, str]:
        """{"description": "text"} of description=text."""
        return dict(pair.split("=", 1) for pair in self.columns)
