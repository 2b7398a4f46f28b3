"""Pretrain a GPT-2 with Accelerate: `accelerate launch train_accelerate.py --config recipes/demo.yaml`.

Reads token shards (prepared first if they are missing), trains, and leaves a run directory with settings,
metrics, checkpoints and an export that `from_pretrained` loads. The same command goes on where a run stopped.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from data.loader import build_loader, collate_blocks
from data.prepare import PrepareSettings, prepare
from data.provenance import describe_rows
from data.shards import TokenBlocks
from data.tokenizer import load_tokenizer
from evaluation.during_training import questions_to_ask, token_bytes_or_none, unless_not_finite
from evaluation.generation import generate_samples
from evaluation.hellaswag import evaluate_hellaswag
from evaluation.language_modeling import evaluate_loss
from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from release.background import HubPushes
from release.card import write_card
from training.averaging import WeightAverage
from training.budget import RunLength
from training.checkpoint import BackgroundWriter, Keep, TrainState, save_checkpoint
from training.device import as_script, start_accelerator
from training.export import AVERAGED_EXPORT_FOLDER, EXPORT_FOLDER, export_model, how_to_load
from training.guard import StepGuard, check_weights
from training.interruption import Interruptions
from training.journal import Journal
from training.objective import count_targets, count_tokens, language_modeling_loss, send, to_device
from training.optimizer import set_learning_rate
from training.patience import Patience, restore_best_weights
from training.plan import StandInBlocks, plan_or_run
from training.publishing import Publisher
from training.recipe import TrainSettings, micro_batches_per_process
from training.run_directory import on_main_process
from training.settings import for_the_owner, given_flags, parse_settings
from training.shards import announce_shards, make_if_missing, words_to_train
from training.start import count_parameters, is_complete, open_run, rows_per_step, say_complete
from training.throughput import describe_machine
from training.weights import whole

ROOT = Path(__file__).resolve().parent
# Products with the vocabulary run at full speed on tensor cores when it divides by this.
VOCABULARY_MULTIPLE = 64

publisher_of = partial(Publisher, push=HubPushes, write_card=write_card)
Objective = Callable[[nn.Module, Mapping[str, Tensor], Tensor], Tensor]


def main(argv: Sequence[str] | None = None) -> None:
    """Settings, data, a fresh model; then the loop."""
    with as_script():
        settings = parse_settings(TrainSettings, argv, default_config=ROOT / "recipes" / "demo.yaml")
        publisher = publisher_of(settings)
        tokenizer, train_set, eval_set = prepare_data(settings, given_flags(argv))
        run = partial(train, tokenizer=tokenizer, train_set=train_set, eval_set=eval_set)
        border = tokenizer.eos_token_id if settings.mask_documents else None
        collate = partial(collate_blocks, end_id=border)
        run = partial(run, collate=collate, objective=language_modeling_loss)
        plan_or_run(settings, partial(build_model, settings, tokenizer), run, script=__file__)
        publisher.finish()


def prepare_data(
    settings: TrainSettings, given: Collection[str] = ()
) -> tuple[PreTrainedTokenizerFast, Dataset, Dataset]:
    """Tokenizer, training and validation blocks of the shards; the main process makes missing ones.

    Raises:
        SettingsError: if the source or the shards are not what they should be, or what flags (`given`) say.
    """
    shards = settings.shards
    words = words_to_train(settings, given)
    if settings.plan and not words and not Path(shards, "manifest.json").exists():
        tokenizer = load_tokenizer(settings.tokenizer)
        blocks = StandInBlocks(len(tokenizer), settings.block_size)
        return tokenizer, blocks, blocks
    wanted = PrepareSettings(settings.source, shards, settings.tokenizer, train_tokenizer=words)
    make_if_missing(Path(shards, "manifest.json"), lambda: prepare(wanted))
    with for_the_owner(ValueError, OSError):
        train_set = TokenBlocks(shards, settings.block_size)
        eval_set = TokenBlocks(shards, settings.block_size, "validation")
        tokenizer = train_set.load_tokenizer()
    announce_shards(settings, given, train_set.manifest)
    return tokenizer, train_set, eval_set


def build_model(settings: TrainSettings, tokenizer: PreTrainedTokenizerFast) -> GPTScratchForCausalLM:
    """A fresh model, the same from the same seed on every process."""
    set_seed(settings.seed)
    config = GPTScratchConfig(
        vocab_size=-(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        n_positions=settings.block_size,
        n_layer=settings.n_layer,
        n_head=settings.n_head,
        n_embd=settings.n_embd,
        resid_pdrop=settings.dropout,
        embd_pdrop=settings.dropout,
        attn_pdrop=settings.dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPTScratchForCausalLM(config)


def train(
    settings: TrainSettings,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    train_set: Dataset,
    eval_set: Dataset,
    collate: Callable[[Any], dict[str, Tensor]],
    objective: Objective,
) -> TrainState:
    """Train `model` from the run's newest checkpoint, or from its start, to `max_steps`; then export it.

    `model` is any causal language model of transformers, or of PEFT around one. `collate` makes of some rows
    of a dataset a micro-batch: `input_ids` and `labels`, int64 (B, T), and what else the forward takes.
    `objective(model, micro_batch, num_targets)` is its share of the loss in nats per target of the whole
    step. A step is one update.

    Raises:
        SettingsError: if the run cannot start, or cannot go on; the message is for the run's owner.
    """
    accelerator, chosen = start_accelerator(settings)
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    accumulation = micro_batches_per_process(settings, world_size)
    with for_the_owner(ValueError, OSError):
        questions = questions_to_ask(settings.hellaswag_questions, settings.hellaswag_limit)
    machine, parameters = describe_machine(accelerator, settings, model), count_parameters(model)
    run, state = open_run(accelerator, settings, model, tokenizer, train_set)
    model, optimizer = state.model, state.optimizer
    run_dir, export_dir = run.path, run.path / EXPORT_FOLDER
    patience = Patience(accelerator, run_dir, settings.early_stopping_evaluations)
    length = RunLength(accelerator, run_dir, settings, machine, state)
    has_all_steps = state.step >= length.max_steps or patience.is_over
    if is_complete(accelerator, run_dir, has_all_steps=has_all_steps):
        accelerator.print(say_complete(run_dir, state))
        return state

    rows = settings.micro_batch_size
    loader = partial(build_loader, collate=collate, micro_batch_size=rows, rank=rank, world_size=world_size)
    micro_batches = iter(loader(train_set, seed=settings.seed, start_batch=state.rows // rows))
    eval_batches = -(-settings.eval_tokens // (rows * settings.block_size))
    token_bytes = token_bytes_or_none(tokenizer, warn=accelerator.print)
    evaluate = partial(evaluate_loss, token_bytes=token_bytes, max_batches=eval_batches, allow_nan=True)
    validate = partial(evaluate, model, loader(eval_set, seed=None), accelerator)
    average = WeightAverage(accelerator, model, optimizer, settings.ema_decay)
    keep = Keep(settings.keep_last, settings.keep_every_steps, settings.keep_best)
    guard = StepGuard(device, state.skipped_steps, state.skipped_in_a_row)
    rows_in_words = partial(describe_rows, train_set, settings.seed)
    journal = Journal(accelerator, run, guard, state, settings, rows_in_words, machine, length)
    score = partial(unless_not_finite, journal.say, evaluate_hellaswag, styles=["harness"])
    sample = partial(unless_not_finite, journal.say, generate_samples, accelerator=accelerator, seed=0)
    sample = partial(sample, max_new_tokens=settings.sample_tokens, temperature=settings.sample_temperature)
    writer = BackgroundWriter(warn=journal.say)
    interruptions = Interruptions(
        accelerator, run_dir, max_minutes=length.stop_minutes, save_every_minutes=settings.save_every_minutes
    )
    stop = ""
    model.train()  # once: what looks at the model puts it back
    with closing(journal), interruptions, closing(writer):
        journal.begin(state, chosen, parameters, len(eval_set))  # type: ignore[arg-type]
        while state.step < length.max_steps and not stop and not patience.is_over:
            learning_rate = set_learning_rate(optimizer, state.step, length.settings)
            read = list(islice(micro_batches, accumulation))
            counts = torch.stack([torch.stack([count_targets(b), count_tokens(b)]) for b in read]).sum(0)
            num_targets, num_tokens = accelerator.reduce(send(counts, device), "sum").clamp(min=1)
            batches = [to_device(batch, device) for batch in read]
            shares = []  # of the step's loss, by micro-batch
            for number, batch in enumerate(batches, start=1):
                # Gradients travel between processes once a step, with the last micro-batch.
                with nullcontext() if number == accumulation else accelerator.no_sync(model):
                    share = objective(model, batch, num_targets)
                    # Data parallelism averages gradients over processes; these shares are to be added up.
                    accelerator.backward(share * world_size)
                shares.append(share.detach())
            all_shares = torch.stack(shares)  # (accumulation,)
            loss = accelerator.reduce(all_shares.sum(), "sum")
            gradient_norm = whole(accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm))
            is_skipped = guard.check(optimizer, loss, gradient_norm)
            optimizer.step()
            optimizer.zero_grad()
            state.step, state.rows = state.step + 1, state.rows + rows_per_step(settings)
            average.update(state.step)
            journal.add(state, learning_rate, loss, gradient_norm, is_skipped, num_tokens, all_shares)

            agreed = interruptions.agree(alarm=writer.cannot_go_on(), fit=length.is_due(state))
            if agreed.fit or state.step % settings.log_every_steps == 0:
                journal.flush(state)
            journal.say(length.fit(state, journal.spent) if agreed.fit else "")
            is_last = state.step >= length.max_steps
            evaluates = is_last or state.step % settings.eval_every_steps == 0
            saves = agreed.save or state.step % settings.save_every_steps == 0
            if evaluates:
                journal.flush(state)
                check_weights(accelerator, model, state.step)
                result, averaged = validate(), average.use(validate)
                journal.validation(state, result, averaged)
                saves |= patience.improves(result.loss) and settings.export_best
            is_last |= patience.is_over
            stop = "" if is_last else agreed.stop
            samples = is_last or state.step % settings.sample_every_steps == 0
            scores = questions and (is_last or state.step % settings.hellaswag_every_steps == 0)
            saves |= is_last or bool(stop)
            if samples or scores or saves:
                journal.flush(state)
            if samples or scores:
                check_weights(accelerator, model, state.step)
            if scores:
                found = score(model, tokenizer, questions, accelerator)
                journal.hellaswag(state, found and found.accuracy["harness_acc_norm"].value, len(questions))
            if saves and not settings.plan:  # after the validation: its loss says which checkpoint is best
                save_checkpoint(accelerator, run_dir, state, keep=keep, writer=writer)
                interruptions.saved()
                journal.saved()
            if samples:
                journal.samples(state, sample(model, tokenizer, settings.sample_prompts))
            if evaluates or samples or scores or saves:
                journal.resume_clock()
        on_main_process(accelerator, writer.finish)
    journal.end("stopped" if stop else "finished", state, stop)
    if settings.plan:
        return state
    interruptions.forget_stop_file()
    if stop:
        journal.say(f"Stopped after step {state.step:,}: {stop}. The same command goes on from there.")
        return state
    if settings.export_best:
        journal.say(restore_best_weights(accelerator, run_dir, state))
    average.use(partial(export_model, accelerator, model, tokenizer, run_dir / AVERAGED_EXPORT_FOLDER))
    export_model(accelerator, model, tokenizer, export_dir)  # last: it says that the run is complete
    journal.say(how_to_load(export_dir))
    return state


if __name__ == "__main__":
    main()
