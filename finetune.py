"""Fine-tune a causal language model into a writer of dungeon rooms: `accelerate launch finetune.py`.

The same loop as pretraining, on prompts of fields and their descriptions: all weights, LoRA's, or with a
teacher. Leaves a run directory whose export `pipeline` takes, and says what was learnt and what forgotten.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from data.dungeon_files import read_splits
from data.dungeons import Dungeon, DungeonBlocks, check_dungeons, collate_dungeons
from data.general_text import general_texts, shards_beside
from data.tokenizer import load_tokenizer, tokenizer_fingerprint
from evaluation.forgetting import as_table, measure_both
from modeling_gpt_scratch import GPTScratchForCausalLM
from train_accelerate import train
from training.adapters import attach_lora, is_adapter, with_adapter
from training.base import load_base, will_be_converted
from training.device import start_processes
from training.distillation import Distillation, check_head
from training.export import export_model
from training.finetuning import FinetuneSettings
from training.objective import language_modeling_loss
from training.packing import keeps_texts_apart
from training.settings import SettingsError, for_the_owner, parse_settings

ROOT = Path(__file__).resolve().parent
PLACE_FOR_A_PROMPT = 64  # tokens of the context that the export's default length leaves free
base_of = partial(load_base, convert=GPTScratchForCausalLM.from_gpt2)  # type: ignore[attr-defined]


def main(argv: Sequence[str] | None = None) -> None:
    """Settings, a base, rooms, an objective; then the loop; then what became of it."""
    try:
        settings = parse_settings(
            FinetuneSettings, argv, default_config=ROOT / "recipes" / "dungeons_demo.yaml"
        )
        with for_the_owner(ValueError, OSError, TypeError):
            model, tokenizer = base_of(settings), load_tokenizer(settings.model)
            rooms = read_rooms(settings, model, tokenizer)
            train_set, eval_set = build_blocks(settings, model, tokenizer, rooms)
            source = settings.general_data or shards_beside(settings.model)
            texts = general_texts(source, settings.general_bytes) if source else []
            model.generation_config = writing_config(settings, model, tokenizer, train_set)
            objective = build_objective(settings, model, tokenizer)
            model = prepare_method(settings, model)
        train(settings, model, tokenizer, train_set, eval_set, collate_dungeons, objective)
        if Path(settings.run_dir, "export").exists():  # not stopped before its end
            finish_export(settings, tokenizer, model.generation_config)
            report(settings, tokenizer, rooms["validation"], texts)
    except SettingsError as error:
        if start_processes().is_local_main_process:  # once a machine
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def say(text: str) -> None:
    if start_processes().is_main_process:
        print(text, flush=True)


def context_of(settings: FinetuneSettings, model: Any) -> int:
    return getattr(model.config, "max_position_embeddings", None) or settings.block_size


def read_rooms(settings: FinetuneSettings, model: Any, tokenizer: Any) -> dict[str, list[Dungeon]]:
    """Rooms by split, those that fit the base's context."""
    found = read_splits(settings.data, settings.column_names())
    limit = min(settings.block_size, context_of(settings, model))
    fits = partial(
        check_dungeons, tokenizer=tokenizer, context=limit, drop_too_long=settings.drop_too_long, say=say
    )
    return {split: fits(dungeons, split=split) for split, dungeons in found.items()}


def build_blocks(
    settings: FinetuneSettings, model: Any, tokenizer: Any, rooms: Mapping[str, list[Dungeon]]
) -> tuple[DungeonBlocks, DungeonBlocks]:
    """Rows to train on, with fields left out at random, and to validate on, with all of them."""
    sizes = {"block_size": settings.block_size, "context": context_of(settings, model), "seed": settings.seed}
    build = partial(DungeonBlocks, tokenizer=tokenizer, **sizes)
    chance = settings.field_dropout
    train_set = build(rooms["train"], field_dropout=chance, packs=settings.packing != "no")
    if train_set.packs and not keeps_texts_apart(model, train_set.fullest()):
        if settings.packing == "yes":
            raise SettingsError(f"--packing yes: a {type(model).__name__} reads one packed room in the next")
        say(f"A {type(model).__name__} would read one packed room in the next: each gets a row of its own.")
        train_set = build(rooms["train"], field_dropout=chance, packs=False)
    say(f"{len(rooms['train']):,} rooms in {len(train_set):,} rows; {train_set.targets:,} tokens to learn.")
    return train_set, build(rooms["validation"], packs=train_set.packs)


def writing_config(settings: FinetuneSettings, model: Any, tokenizer: Any, train_set: DungeonBlocks) -> Any:
    """How the export writes when it is asked for nothing else: long enough for the longest room it knows."""
    return GenerationConfig(
        do_sample=True,
        temperature=settings.sample_temperature,
        top_p=settings.sample_top_p,
        repetition_penalty=settings.repetition_penalty,
        max_new_tokens=max(
            1, min(train_set.longest_target, context_of(settings, model) - PLACE_FOR_A_PROMPT)
        ),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def without_cache(model: nn.Module, batch: Mapping[str, Tensor], num_targets: Tensor) -> Tensor:
    """The loop's usual objective; with a cache, models other than ours would read one packed room in the next."""
    return language_modeling_loss(model, {**batch, "use_cache": False}, num_targets)  # type: ignore[dict-item]


def build_objective(settings: FinetuneSettings, model: Any, tokenizer: Any) -> Any:
    if settings.method != "distill":
        return without_cache
    if tokenizer_fingerprint(load_tokenizer(settings.teacher)) != tokenizer_fingerprint(tokenizer):
        raise SettingsError(
            f"--teacher {settings.teacher} has another vocabulary than {settings.model}, so their probabilities "
            "cannot be compared word by word. Let it write instead, and train on its texts: `python -m "
            "data.synthesize --output more.jsonl …`, then `finetune.py --data dungeons more.jsonl`."
        )
    remote = settings.trust_remote_code
    teacher = AutoModelForCausalLM.from_pretrained(settings.teacher, dtype="auto", trust_remote_code=remote)
    for name, one in ((settings.model, model), (settings.teacher, teacher)):
        check_head(one, name)
    cache = Path(settings.teacher_cache) if settings.teacher_cache else None
    share, temperature = settings.teacher_weight, settings.teacher_temperature
    return Distillation(teacher, vocabulary=len(tokenizer), share=share, temperature=temperature, cache=cache)


def prepare_method(settings: FinetuneSettings, model: Any) -> Any:
    """The model with LoRA's weights, if those are to be trained."""
    if settings.method != "lora":
        return model
    set_seed(settings.seed)
    base = str(Path(settings.run_dir, "base")) if will_be_converted(settings) else settings.model
    sizes = {"rank": settings.lora_rank, "alpha": settings.lora_alpha, "dropout": settings.lora_dropout}
    return attach_lora(model, settings.lora_targets, base=base, **sizes)


def finish_export(settings: FinetuneSettings, tokenizer: Any, generation_config: Any) -> None:
    """With LoRA: the converted base beside its adapter, and the two in one if asked for."""
    accelerator, run_dir = Accelerator(), Path(settings.run_dir)
    export = run_dir / "export"
    if settings.method == "lora" and will_be_converted(settings) and not (run_dir / "base").exists():
        export_model(accelerator, base_of(settings), tokenizer, run_dir / "base")
    if settings.merge and is_adapter(export):
        merged = with_adapter(base_of(settings), export, merge=True)
        merged.generation_config = generation_config
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            export.rename(run_dir / "adapter")
        export_model(accelerator, merged, tokenizer, export)
    accelerator.wait_for_everyone()


def report(settings: FinetuneSettings, tokenizer: Any, rooms: list[Dungeon], texts: list[str]) -> None:
    """Base and export on the held-out rooms and on other text, printed and in `finetuning.json`."""
    export = Path(settings.run_dir, "export")
    accelerator = Accelerator()
    if is_adapter(export):
        after = with_adapter(base_of(settings), export, merge=False)
    else:
        after = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=settings.trust_remote_code)
    results = {}
    for name, model in (("before", base_of(settings)), ("after", after)):
        model.eval().to(accelerator.device)
        results[name] = measure_both(model, tokenizer, rooms, texts, accelerator)
    say(as_table(results))
    if accelerator.is_main_process:
        Path(settings.run_dir, "finetuning.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
