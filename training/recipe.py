"""The settings of pretraining: every field with its meaning and unit."""

from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from training.settings import SettingsError, setting


@dataclass(frozen=True)
class TrainSettings:
    """What `train_accelerate.py` can be told. Defaults are GPT-2 124M's; recipes say what they change."""

    # Data
    shards: str = setting(
        "artifacts/shards/python-docs", "folder of token shards; prepared from `source` if missing"
    )
    source: str = setting(
        "python-docs", "where text for missing shards comes from, as in `python -m data.prepare`"
    )
    tokenizer: str = setting("gpt2", "tokenizer for missing shards: gpt2, a folder or a Hub id")
    train_tokenizer: int | None = setting(
        None, "for missing shards, train a byte-level BPE of this size on them instead", "words", at_least=257
    )
    block_size: int = setting(
        1024, "tokens in a row, also the context of the model", "tokens", at_least=2, changes_run=True
    )
    mask_documents: bool = setting(False, "documents in one row do not see one another", changes_run=True)
    # Run
    run_dir: str = setting("artifacts/runs/gpt2", "folder for everything that the run writes")
    max_steps: int = setting(19_073, "length of the run", "steps", at_least=1, changes_run=True)
    seed: int = setting(1337, "seed of the weights and of the data order", changes_run=True)
    allow_change: bool = setting(False, "go on with a run although settings that change it were changed")
    # Batch
    batch_tokens: int = setting(
        524_288, "batch of one step over all processes", "tokens", at_least=1, changes_run=True
    )
    micro_batch_size: int = setting(16, "rows in one forward of one process", "rows", at_least=1)
    # Model
    n_layer: int = setting(12, "depth", "blocks", at_least=1, changes_run=True)
    n_head: int = setting(12, "attention heads of a block", "heads", at_least=1, changes_run=True)
    n_embd: int = setting(768, "width", "features", at_least=1, changes_run=True)
    dropout: float = setting(
        0.0, "dropout of embeddings, attention and residual branches", at_least=0, changes_run=True
    )
    # Update rule
    optimizer: str = setting(
        "adamw",
        "update rule; muon is for hidden matrices, everything else stays with AdamW",
        choices=("adamw", "muon"),
        changes_run=True,
    )
    learning_rate: float = setting(6e-4, "highest learning rate", at_least=0, changes_run=True)
    final_learning_rate_ratio: float = setting(
        0.1, "last learning rate as a part of the highest", at_least=0, changes_run=True
    )
    schedule: str = setting(
        "cosine",
        "how the learning rate comes down after its rise",
        choices=("cosine", "trapezoidal"),
        changes_run=True,
    )
    cooldown_ratio: float = setting(
        0.4, "last part of the run in which a trapezoidal schedule comes down", at_least=0, changes_run=True
    )
    warmup_steps: int = setting(
        715, "linear rise of the learning rate", "steps", at_least=0, changes_run=True
    )
    weight_decay: float = setting(0.1, "decay of matrices; vectors have none", at_least=0, changes_run=True)
    adam_beta1: float = setting(0.9, "memory of AdamW's first moment", at_least=0, changes_run=True)
    adam_beta2: float = setting(0.95, "memory of AdamW's second moment", at_least=0, changes_run=True)
    adam_epsilon: float = setting(
        1e-8, "AdamW's guard against division by zero", at_least=0, changes_run=True
    )
    muon_learning_rate: float = setting(
        0.02, "highest learning rate of the matrices under Muon", at_least=0, changes_run=True
    )
    muon_momentum: float = setting(0.95, "memory of Muon's momentum", at_least=0, changes_run=True)
    muon_weight_decay: float = setting(0.01, "decay of the matrices under Muon", at_least=0, changes_run=True)
    ema_decay: float = setting(
        0.0,
        "keep, validate and export an exponential moving average of the weights too; 0 is none, 0.999 "
        "averages about a thousand steps",
        at_least=0,
        changes_run=True,
    )
    max_grad_norm: float = setting(
        1.0,
        "gradients with a larger norm are scaled down to it; a large number, such as 1e9, never does",
        at_least=0,
        changes_run=True,
    )
    # Precision and speed
    mixed_precision: str = setting(
        "auto",
        "arithmetic of the forward; weights stay float32, whose products are TF32 on NVIDIA's GPUs",
        choices=("auto", "no", "bf16", "fp16", "fp8"),
    )
    compile: str = setting(
        "auto",
        "torch.compile: the model whole, or block by block",
        choices=("auto", "none", "whole", "regional"),
    )
    cpu_threads: int = setting(
        0, "threads of a process on the CPU; 0 shares the cores among the processes", "threads", at_least=0
    )
    activation_checkpointing: bool = setting(
        False, "recompute activations in the backward: slower, far less memory"
    )
    deterministic: bool = setting(
        False, "on GPUs, only kernels that repeat bit for bit (the CPU's always do)"
    )
    peak_tflops: float = setting(
        0.0,
        "16-bit matrix products of one device, for MFU; 0 takes the table's or measures",
        "TFLOP/s",
        at_least=0,
    )
    # Before it starts
    plan: bool = setting(False, "try some steps, print memory, time and money of the run, and start nothing")
    plan_steps: int = setting(20, "steps that a plan tries", "steps", at_least=2)
    plan_output: str = setting("", "file for the plan's numbers as JSON")
    find_micro_batch_size: bool = setting(
        False, "take the largest micro_batch_size that fits the memory, found by trying"
    )
    # Looking at the model
    eval_every_steps: int = setting(250, "time between validations; one also at the end", "steps", at_least=1)
    eval_tokens: int = setting(
        5_242_880, "length of a validation over all processes, or the whole set", "tokens", at_least=1
    )
    sample_every_steps: int = setting(1000, "time between samples; also at the end", "steps", at_least=1)
    sample_prompts: tuple[str, ...] = setting(("The",), "beginnings that the model continues")
    sample_tokens: int = setting(48, "length of a sample", "tokens", at_least=1)
    sample_temperature: float = setting(0.8, "randomness of samples; 0 is greedy", at_least=0)
    hellaswag_questions: str = setting(
        "", "HellaSwag while training: a local hellaswag_val.jsonl, or hub for Rowan/hellaswag; empty is off"
    )
    hellaswag_limit: int = setting(1000, "the first of its questions that are asked", "questions", at_least=1)
    hellaswag_every_steps: int = setting(
        1000, "time between HellaSwag scores; also at the end", "steps", at_least=1
    )
    log_every_steps: int = setting(
        10, "time between writes of metrics.jsonl, which has a line per step", "steps", at_least=1
    )
    log_with: tuple[str, ...] = setting(
        (), "experiment trackers of Accelerate", choices=("tensorboard", "wandb", "trackio")
    )
    # Keeping
    save_every_steps: int = setting(
        5000, "time between checkpoints; one also at the end", "steps", at_least=1
    )
    save_every_minutes: float = setting(
        15.0, "time between checkpoints on slow machines; 0 is never", "minutes", at_least=0
    )
    keep_last: int = setting(2, "newest checkpoints that are kept", "checkpoints", at_least=1)
    keep_every_steps: int = setting(
        0, "checkpoints at multiples of this are kept for good; 0 is none", "steps", at_least=0
    )
    keep_best: bool = setting(True, "keep the checkpoint with the lowest validation loss as well")
    export_best: bool = setting(
        False,
        "export the weights with the lowest validation loss instead of the last; saves at each better one",
    )
    # The Hub
    push_to_hub: bool = setting(
        False, "send the export to the Hub when the run has ended, with its card, metrics and page"
    )
    hub_model_id: str = setting("", "the model's name there, user/name; made if it is missing")
    hub_strategy: str = setting(
        "end",
        "what is sent: the export in the end, or every checkpoint too, in the background",
        choices=("end", "every_save"),
    )
    hub_private: bool = setting(False, "a new repository is for its owner only")
    hub_minutes: float = setting(30.0, "the longest wait for the Hub, in the end", "minutes", at_least=0)
    # Stopping
    max_minutes: float = setting(
        0.0, "stop with a checkpoint after this long, for queue limits; 0 is never", "minutes", at_least=0
    )
    fit_schedule: bool = setting(
        False, "shorten the run so that it ends within max_minutes, its learning rate too", changes_run=True
    )
    budget_tokens: int = setting(
        0,
        "end the run after this many, the schedule fitted to it; 0 is no limit",
        "tokens",
        at_least=0,
        changes_run=True,
    )
    budget_usd: float = setting(
        0.0,
        "end the run when this is spent, the schedule fitted to it; 0 is no limit",
        "US dollars",
        at_least=0,
        changes_run=True,
    )
    price_per_gpu_hour_usd: float = setting(
        0.0,
        "price of a process's device (a GPU, or its share of the CPU), for spend and plan",
        "US dollars",
        at_least=0,
    )
    early_stopping_evaluations: int = setting(
        0,
        "validations in a row without a better loss that end the run; 0 is never",
        "validations",
        at_least=0,
    )
    max_skipped_steps: int = setting(
        20, "non-finite steps in a row that end the run; single ones are skipped", "steps", at_least=1
    )

    def problems(self) -> list[str]:
        """Values that are possible alone but not together."""
        problems = []
        if self.n_embd % self.n_head:
            problems.append(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if self.dropout >= 1:
            problems.append(f"dropout={self.dropout} must be below 1")
        if self.cooldown_ratio > 1:
            problems.append(f"cooldown_ratio={self.cooldown_ratio} is a part of the run: at most 1")
        for name in ("adam_beta1", "adam_beta2", "muon_momentum", "ema_decay"):
            if getattr(self, name) >= 1:
                problems.append(f"{name}={getattr(self, name)} must be below 1")
        if self.warmup_steps > self.max_steps:
            problems.append(f"warmup_steps={self.warmup_steps:,} is more than max_steps={self.max_steps:,}")
        if self.max_grad_norm == 0:
            problems.append(
                "max_grad_norm=0 would scale every gradient to nothing, and nothing would be learned; "
                "a large number, such as 1e9, turns clipping off"
            )
        if self.sample_tokens >= self.block_size:
            problems.append(
                f"sample_tokens={self.sample_tokens:,} leaves no room for a prompt in "
                f"block_size={self.block_size:,}; give fewer"
            )
        if self.budget_usd and not self.price_per_gpu_hour_usd:
            problems.append("budget_usd needs price_per_gpu_hour_usd, or nobody knows when it is spent")
        if self.fit_schedule and not self.max_minutes:
            problems.append("fit_schedule needs max_minutes, the time to fit into")
        if 0 < self.budget_tokens < self.save_every_steps * self.batch_tokens:
            steps = self.budget_tokens // self.batch_tokens
            problems.append(
                f"budget_tokens={self.budget_tokens:,} are {steps:,} steps of {self.batch_tokens:,}, fewer "
                f"than save_every_steps={self.save_every_steps:,}: the run would end before its first "
                "checkpoint is due; "
                + (f"give --save_every_steps {steps:,} or less" if steps else "give more")
            )
        problems += self._problems_with_the_hub()
        if self.export_best and not self.keep_best:
            problems.append("export_best needs keep_best, or the best checkpoint may be gone by the end")
        if self.batch_tokens % self.block_size:
            problems.append(_does_not_divide(self.batch_tokens, 1, self.block_size, 1))
        return problems

    def _problems_with_the_hub(self) -> list[str]:
        if not self.push_to_hub:
            asked = {"hub_model_id": self.hub_model_id, "hub_private": self.hub_private}
            asked["hub_strategy every_save"] = self.hub_strategy == "every_save"
            return [f"{name} is of no use without push_to_hub" for name, given in asked.items() if given]
        problems = []
        if not self.hub_minutes:
            problems.append("hub_minutes=0 leaves no time for the export to arrive; 30 is the default")
        if not self.hub_model_id:
            return [*problems, "push_to_hub needs a hub_model_id, the model's name on the Hub: user/name"]
        why = "the owner is missing"
        try:
            validate_repo_id(self.hub_model_id)
        except HFValidationError as error:
            why = str(error)
        else:
            if "/" in self.hub_model_id:
                return problems
        return [
            *problems,
            f"hub_model_id={self.hub_model_id!r} is no name that the Hub takes ({why}); it is user/name, of "
            "letters, digits, '-', '_' and '.'",
        ]


def micro_batches_per_process(settings: TrainSettings, num_processes: int) -> int:
    """How many forwards each process contributes to one step.

    Raises:
        SettingsError: if `batch_tokens` cannot be cut into equal parts, with the nearest that can.
    """
    unit = settings.micro_batch_size * settings.block_size * num_processes
    if settings.batch_tokens % unit:
        raise SettingsError(
            _does_not_divide(
                settings.batch_tokens, settings.micro_batch_size, settings.block_size, num_processes
            )
        )
    return settings.batch_tokens // unit


def check_prompts(tokenizer: Any, settings: TrainSettings, config: Any) -> None:
    """Whether each sample fits the context of the model: better known now than at the first sample.

    Raises:
        SettingsError: naming every prompt that is too long.
    """
    context = getattr(config, "max_position_embeddings", settings.block_size)
    lengths = {prompt: max(1, len(tokenizer(prompt)["input_ids"])) for prompt in settings.sample_prompts}
    problems = [
        f"the prompt {prompt[:60]!r} has {length:,} tokens; with sample_tokens={settings.sample_tokens:,} "
        f"that is more than the model's context of {context:,}"
        for prompt, length in lengths.items()
        if length + settings.sample_tokens > context
    ]
    if problems:
        raise SettingsError("\n".join([*problems, "Shorten --sample_prompts or lower --sample_tokens."]))


def _does_not_divide(wanted: int, micro_batch_size: int, block_size: int, num_processes: int) -> str:
    unit = micro_batch_size * block_size * num_processes
    nearest = max(1, round(wanted / unit)) * unit
    return (
        f"batch_tokens={wanted:,} is not a multiple of {unit:,} (micro_batch_size {micro_batch_size} x "
        f"block_size {block_size} x {num_processes} processes); nearest is {nearest:,}."
    )


def describe_batch(settings: TrainSettings, num_processes: int) -> str:
    """How a step's batch comes about, for the line at the start."""
    processes = f"{num_processes} process{'es' if num_processes > 1 else ''}"
    return (
        f"{settings.max_steps:,} steps of {settings.batch_tokens:,} tokens = "
        f"{micro_batches_per_process(settings, num_processes)} micro-batches x "
        f"{settings.micro_batch_size} rows x {settings.block_size} tokens x {processes}"
    )
