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
from data.general_text import general_texts, shards_beside
from data.tokenizer import load_tokenizer, tokenizer_fingerprint
from evaluation.forgetting import as_table, measure_both
from modeling_gpt_scratch import GPTScratchForCausalLM
from train_accelerate import plan_or_run, publisher_of, train
from training.adapters import BASE_FOLDER, attach_lora, is_adapter, with_adapter
from training.base import context_of, load_base, will_be_converted, writing_config
from training.device import as_script, start_processes
from training.distillation import build_distillation
from training.export import export_model
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
            rooms = read_rooms(settings, model, tokenizer)
            train_set, eval_set = build_blocks(settings, model, tokenizer, rooms)
            source = settings.general_data or shards_beside(settings.model)
            texts = general_texts(source, settings.general_bytes) if source else []
            model.generation_config = writing_config(settings, model, tokenizer, train_set.longest_target)
            objective = build_objective(settings, model, tokenizer)
            if settings.method == "lora":
                model = attach_lora(settings, model)
        run = partial(train, tokenizer=tokenizer, train_set=train_set, eval_set=eval_set, objective=objective)
        plan_or_run(settings, lambda: model, partial(run, collate=collate_dungeons), script=__file__)
        start_processes().wait_for_everyone()  # the main one exports
        if not settings.plan and Path(settings.run_dir, "export").exists():  # not stopped before its end
            finish_export(settings, tokenizer, model.generation_config)
            report(settings, tokenizer, rooms["validation"], texts)
        publisher.finish()


def say(text: str) -> None:
    if start_processes().is_main_process:
        print(text, flush=True)


def read_rooms(settings: FinetuneSettings, model: Any, tokenizer: Any) -> dict[str, list[Dungeon]]:
    """Rooms by split, those that fit the base's context."""
    found = read_splits(settings.data, settings.column_names())
    limit = min(settings.block_size, context_of(model, settings.block_size))
    fits = partial(
        check_dungeons, tokenizer=tokenizer, context=limit, drop_too_long=settings.drop_too_long, say=say
    )
    return {split: fits(dungeons, split=split) for split, dungeons in found.items()}


def build_blocks(
    settings: FinetuneSettings, model: Any, tokenizer: Any, rooms: Mapping[str, list[Dungeon]]
) -> tuple[DungeonBlocks, DungeonBlocks]:
    """Rows to train on, with fields left out at random, and to validate on, with all of them."""
    context = context_of(model, settings.block_size)

    def build(split: str, chance: float, packs: bool) -> DungeonBlocks:
        sizes: dict[str, int] = {"block_size": settings.block_size, "context": context, "seed": settings.seed}
        return DungeonBlocks(rooms[split], tokenizer, field_dropout=chance, packs=packs, **sizes)

    train_set = build("train", settings.field_dropout, settings.packing != "no")
    if train_set.packs and not keeps_texts_apart(model, train_set.fullest()):
        if settings.packing == "yes":
            raise SettingsError(f"--packing yes: a {type(model).__name__} reads one packed room in the next")
        say(f"A {type(model).__name__} would read one packed room in the next: each gets a row of its own.")
        train_set = build("train", settings.field_dropout, False)
    say(f"{len(rooms['train']):,} rooms in {len(train_set):,} rows; {train_set.targets:,} tokens to learn.")
    return train_set, build("validation", 0.0, train_set.packs)


def build_objective(settings: FinetuneSettings, model: Any, tokenizer: Any) -> Any:
    """The loop's usual objective, or with a teacher's part in it."""
    if settings.method != "distill":
        return without_cache
    if tokenizer_fingerprint(load_tokenizer(settings.teacher)) != tokenizer_fingerprint(tokenizer):
        raise SettingsError(
            f"--teacher {settings.teacher} has another vocabulary than {settings.model}, so probabilities "
            "cannot be compared word by word. Let it write instead, and train on its texts: `python -m "
            "data.synthesize --output more.jsonl …`, then `finetune.py --data dungeons more.jsonl`."
        )
    return build_distillation(settings, model, len(tokenizer))


def finish_export(settings: FinetuneSettings, tokenizer: Any, generation_config: Any) -> None:
    """With LoRA: the converted base beside its adapter, and the two in one if asked for."""
    accelerator, run_dir = Accelerator(), Path(settings.run_dir)
    export = run_dir / "export"
    if settings.method == "lora" and will_be_converted(settings) and not (run_dir / BASE_FOLDER).exists():
        export_model(accelerator, base_of(settings), tokenizer, run_dir / BASE_FOLDER)
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
