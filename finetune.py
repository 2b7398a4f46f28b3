"""Fine-tune a causal language model into a writer of dungeon rooms: `accelerate launch finetune.py`.

The same loop as pretraining, on prompts of fields and their descriptions: all weights, LoRA's, or with a
teacher. Leaves a run directory whose export `pipeline` takes, and says what was learnt and what forgotten.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from data.dungeon_files import read_splits
from data.dungeons import Dungeon, DungeonBlocks, check_dungeons, collate_dungeons
from data.general_text import general_texts, source_beside
from data.tokenizer import load_tokenizer, tokenizer_fingerprint
from evaluation.forgetting import as_table, measure_both
from modeling_gpt_scratch import GPTScratchForCausalLM
from train_accelerate import plan_or_run, publisher_of, train
from training.adapters import attach_lora, finish_lora, is_adapter, with_adapter
from training.base import context_of, load_base, writing_config
from training.device import as_script, start_processes
from training.distillation import build_distillation, load_teacher
from training.finetuning import FinetuneSettings
from training.objective import without_cache
from training.packing import keeps_texts_apart
from training.settings import SettingsError, for_the_owner, parse_settings

DEFAULT_RECIPE = Path(__file__).resolve().parent / "recipes" / "dungeons_demo.yaml"
base_of = partial(load_base, convert=GPTScratchForCausalLM.from_gpt2)  # type: ignore[attr-defined]


def main(argv: Sequence[str] | None = None) -> None:
    """Settings, a base, rooms, an objective; then the loop; then what became of it."""
    with as_script():
        settings = parse_settings(FinetuneSettings, argv, default_config=DEFAULT_RECIPE)
        publisher = publisher_of(settings)
        with for_the_owner(ValueError, OSError, TypeError):
            model, tokenizer = base_of(settings), load_tokenizer(settings.model)
            teacher = read_teacher(settings, tokenizer)
            readers = [model] if teacher is None else [model, teacher]
            context = min(context_of(reader, settings.block_size) for reader in readers)
            rooms = read_rooms(settings, tokenizer, min(context, settings.block_size))
            train_set, eval_set = build_blocks(settings, readers, tokenizer, rooms, context)
            source = settings.general_data or source_beside(settings.model)
            texts = general_texts(source, settings.general_bytes)
            say(f"Forgetting is measured by {source}.")
            model.generation_config = writing_config(settings, model, tokenizer, train_set.longest_target)
            objective: Any = without_cache
            if teacher is not None:
                objective = build_distillation(settings, model, teacher, len(tokenizer))
            if settings.method == "lora":
                model = attach_lora(settings, model)
        run = partial(train, tokenizer=tokenizer, train_set=train_set, eval_set=eval_set, objective=objective)
        plan_or_run(settings, lambda: model, partial(run, collate=collate_dungeons), script=__file__)
        start_processes().wait_for_everyone()  # the main one exports
        if not settings.plan and Path(settings.run_dir, "export").exists():  # not stopped before its end
            if settings.method == "lora":
                finish_lora(settings, base_of, tokenizer, model.generation_config, say)
            report(settings, tokenizer, rooms["validation"], texts)
        publisher.finish()


def say(text: str) -> None:
    if start_processes().is_main_process:
        print(text, flush=True)


def read_rooms(settings: FinetuneSettings, tokenizer: Any, context: int) -> dict[str, list[Dungeon]]:
    """Rooms by split, those that fit a context of so many tokens."""
    found = read_splits(settings.data, settings.column_names())
    fits = partial(
        check_dungeons, tokenizer=tokenizer, context=context, drop_too_long=settings.drop_too_long, say=say
    )
    return {split: fits(dungeons, split=split) for split, dungeons in found.items()}


def build_blocks(
    settings: FinetuneSettings,
    readers: list[Any],
    tokenizer: Any,
    rooms: Mapping[str, list[Dungeon]],
    context: int,
) -> tuple[DungeonBlocks, DungeonBlocks]:
    """Rows to train on, with fields left out at random, and to validate on, with all of them.

    `readers` are the models that will read the rows; `context` is the shortest of theirs.
    """

    def build(split: str, chance: float, packs: bool) -> DungeonBlocks:
        sizes: dict[str, int] = {"block_size": settings.block_size, "context": context, "seed": settings.seed}
        return DungeonBlocks(rooms[split], tokenizer, field_dropout=chance, packs=packs, **sizes)

    train_set = build("train", settings.field_dropout, settings.packing != "no")
    for reader in readers:
        if train_set.packs and not keeps_texts_apart(reader, train_set.fullest()):
            would = f"{type(reader).__name__} would read one packed room in the next"
            if settings.packing == "yes":
                raise SettingsError(f"--packing yes: a {would}; leave it to --packing auto")
            say(f"A {would}: each gets a row of its own.")
            train_set = build("train", settings.field_dropout, False)
    say(f"{len(rooms['train']):,} rooms in {len(train_set):,} rows; {train_set.targets:,} tokens to learn.")
    return train_set, build("validation", 0.0, train_set.packs)


def read_teacher(settings: FinetuneSettings, tokenizer: Any) -> Any:
    """The teacher of --method distill, which must have the base's vocabulary; with other methods None."""
    if settings.method != "distill":
        return None
    if tokenizer_fingerprint(load_tokenizer(settings.teacher)) != tokenizer_fingerprint(tokenizer):
        raise SettingsError(
            f"--teacher {settings.teacher} has another vocabulary than {settings.model}, so probabilities "
            "cannot be compared word by word. Let it write instead, and train on its texts: `python -m "
            "data.synthesize --output more.jsonl …`, then `finetune.py --data dungeons more.jsonl`."
        )
    return load_teacher(settings)


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
