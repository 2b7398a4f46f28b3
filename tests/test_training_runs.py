"""Whole runs of a toy model: in this process where one is enough, else through `accelerate launch`."""

import dataclasses
import errno
import itertools
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from training_toys import (
    ROOT,
    VOCABULARY,
    as_flags,
    ended,
    environment,
    free_port,
    metrics_of,
    run_training,
    train_command,
    train_flags_here,
    train_here,
    write_toy_shards,
)
from training_toys import TOY_SETTINGS as TOY
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_accelerate
from data.loader import collate_blocks, permuted
from data.shards import TokenBlocks, read_manifest, write_manifest
from data.tokenizer import gpt2_tokenizer, load_tokenizer, tokenizer_fingerprint
from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from training.checkpoint import TrainState, complete_checkpoints, latest_checkpoint
from training.export import export_model
from training.objective import language_modeling_loss
from training.recipe import TrainSettings, micro_batches_per_process
from training.settings import SettingsError, parse_settings

CONFIGS = ROOT / "accelerate_configs"


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()}


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: weights, optimizer state and metrics."""
    ends = [latest_checkpoint(run) for run in (one, other)]
    assert ends[0].name == ends[1].name
    for name in ("model.safetensors", "optimizer.safetensors", "random_states.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), name
    assert metrics_of(one) == metrics_of(other)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_toy_shards(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    """An undisturbed run; tests that change it take a copy."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train_here(shards=shards, run_dir=run)
    return run


@pytest.fixture
def copy_of_finished(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_run_leaves_a_line_per_step_and_learns(finished):
    lines = metrics_of(finished)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["tokens"] for line in steps] == [256 * step for step in range(1, 13)]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    validations = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in validations] == [6, 12]
    assert validations[1]["validation_loss"] < validations[0]["validation_loss"]
    assert 0 < validations[1]["bits_per_byte"] < 8


def test_the_export_has_the_tokenizers_vocabulary_and_the_same_logits(finished):
    checkpoint, export = latest_checkpoint(finished), finished / "export"
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (checkpoint, export)]
    assert models[0].config.vocab_size == 320  # 300 padded to a multiple of 64
    assert models[1].config.vocab_size == VOCABULARY == len(AutoTokenizer.from_pretrained(export))
    input_ids = torch.arange(20)[None]
    with torch.no_grad():
        padded, trimmed = (model(input_ids).logits for model in models)
    assert torch.equal(padded[..., :VOCABULARY], trimmed)


def test_the_export_works_in_a_fresh_process_without_our_repository(finished, tmp_path):
    code = (
        "from transformers import pipeline; import sys;"
        "write = pipeline('text-generation', model=sys.argv[1], trust_remote_code=True);"
        "assert len(write(['The model', 'A', 'Longer than both'], batch_size=3, max_new_tokens=5)) == 3;"
        "print(len(write('The model', max_new_tokens=5)[0]['generated_text']))"
    )
    export = shutil.copytree(finished / "export", tmp_path / "elsewhere")
    clean = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    clean["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    done = subprocess.run(
        [sys.executable, "-c", code, str(export)], env=clean, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > len("The model")


def test_running_again_says_that_the_run_is_complete_and_touches_nothing(copy_of_finished, shards, capsys):
    before = files_below(copy_of_finished / "checkpoints") | files_below(copy_of_finished / "export")
    metrics = (copy_of_finished / "metrics.jsonl").read_bytes()
    train_here(shards=shards, run_dir=copy_of_finished)
    text = capsys.readouterr().out
    assert "is complete (12 steps)" in text and "another --run_dir" in text
    assert f'pipeline("text-generation", model="{copy_of_finished}/export"' in text
    assert files_below(copy_of_finished / "checkpoints") | files_below(copy_of_finished / "export") == before
    assert (copy_of_finished / "metrics.jsonl").read_bytes() == metrics


def test_changed_settings_and_data_are_refused_by_name(copy_of_finished, shards, tmp_path, capsys):
    other = write_toy_shards(tmp_path / "other", seed=1)
    with pytest.raises(SystemExit) as caught:
        train_here(shards=other, run_dir=copy_of_finished, n_layer=3, seed=5, micro_batch_size=2)
    assert caught.value.code == 1
    text = capsys.readouterr().err
    assert "n_layer: 2 then, 3 now" in text and "seed: 1337 then, 5 now" in text
    assert "training data: " in text and "--allow_change" in text
    assert "micro_batch_size" not in text  # the same batches in smaller pieces


def test_a_finished_run_goes_on_with_more_steps_when_told_to(copy_of_finished, shards, capsys):
    train_here(shards=shards, run_dir=copy_of_finished, max_steps=14, allow_change="true")
    assert latest_checkpoint(copy_of_finished).name == "step-0000014"
    assert (copy_of_finished / "export-previous-1" / "config.json").exists()
    assert "Going on from step 12" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["another folder", "a file", "below a file"])
def test_a_run_directory_that_is_none_is_refused(shards, tmp_path, capsys, kind):
    (tmp_path / "notes.txt").write_text("mine")
    run_dir = {"another folder": tmp_path, "a file": tmp_path / "notes.txt"}.get(
        kind, tmp_path / "notes.txt" / "run"
    )
    with pytest.raises(SystemExit):
        train_here(shards=shards, run_dir=run_dir)
    assert str(run_dir) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_run_stopped_after_every_step_matches_an_unbroken_run_bit_for_bit(
    finished, shards, tmp_path, capsys
):
    """With dropout, so that lost random states would show."""
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    train_here(shards=shards, run_dir=unbroken, dropout=0.2, max_steps=6)
    for step in range(1, 7):
        train_here(shards=shards, run_dir=broken, dropout=0.2, max_steps=6, max_minutes=1e-9)
        assert step == 6 or f"Stopped after step {step}: max_minutes is over" in capsys.readouterr().out
    assert_same_run(broken, unbroken)
    assert (broken / "export" / "model.safetensors").exists()


def test_checkpoints_are_also_taken_by_the_clock(finished, shards, tmp_path):
    """Every step is later than the 60 nanoseconds that are asked for here."""
    run = tmp_path / "run"
    train_here(
        shards=shards, run_dir=run, save_every_minutes=1e-9, save_every_steps=100, keep_last=3, max_steps=6,
        keep_best="false", eval_every_steps=100,
    )  # fmt: skip
    assert list(complete_checkpoints(run)) == [4, 5, 6]


def train_with(objective=language_modeling_loss, collate=collate_blocks, **settings) -> TrainState:
    """A run of the toy in this process with an objective, or a collator, of a test's own."""
    chosen = TrainSettings(**{**TOY, **{name: cast(value) for name, value in settings.items()}})
    tokenizer, train_set, eval_set = train_accelerate.prepare_data(chosen)
    model = train_accelerate.build_model(chosen, tokenizer)
    try:
        return train_accelerate.train(chosen, model, tokenizer, train_set, eval_set, collate, objective)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def cast(value):
    return str(value) if isinstance(value, Path) else value


def test_a_spike_of_the_loss_is_said_and_noted_and_training_goes_on(shards, tmp_path, capsys):
    """Step 70 is given a tenfold loss, and so a tenfold gradient, which clipping takes back."""
    run, calls = tmp_path / "run", itertools.count()

    def spiking(model, batch, num_targets):
        # Two micro-batches a step.
        return language_modeling_loss(model, batch, num_targets) * (10 if next(calls) // 2 == 69 else 1)

    train_with(spiking, shards=shards, run_dir=run, max_steps=72)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "loss_spike"] == [70]
    assert "step 70: the loss jumped to " in capsys.readouterr().out
    steps = [line for line in metrics_of(run) if "loss" in line]
    assert len(steps) == 72 and not any(line.get("skipped") for line in steps)


def test_gradients_that_are_not_finite_end_the_run_naming_the_rows_of_the_step(shards, tmp_path):
    """No micro-batch stands out then, and the message once named no data at all."""

    def spoiled(model, batch, num_targets):
        loss = language_modeling_loss(model, batch, num_targets)
        loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    with pytest.raises(SettingsError) as caught:
        train_with(spoiled, shards=shards, run_dir=tmp_path / "run", max_skipped_steps=3)
    text = str(caught.value)
    assert "The losses were finite" in text
    assert "Step 3 read 8 rows from position 16 of the data's order: train-00000.arrow, documents " in text


def test_a_run_that_goes_on_with_another_batch_reads_on_where_it_was(shards, tmp_path):
    """The position was once the step times the batch of now: rows came twice, or never."""
    read: list[torch.Tensor] = []

    def collate(rows):
        read.append(rows.input_ids)
        return collate_blocks(rows)

    settings = {"shards": shards, "run_dir": tmp_path / "run", "eval_every_steps": 100, "save_every_steps": 1}
    settings |= {"seed": 3, "collate": collate}
    train_with(**settings, max_minutes=1e-9)
    del read[:]
    state = train_with(**settings, batch_tokens=512, max_steps=2, allow_change=True)
    blocks = TokenBlocks(shards, TOY["block_size"])
    wanted = [blocks[index]["input_ids"] for index in permuted(np.arange(8, 24), len(blocks), 3)]
    assert torch.equal(torch.cat(read[:4]), torch.stack(wanted))
    assert state.rows == 8 + 16 and state.tokens == 256 + 512


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine's GPU may well have FP8")
def test_fp8_is_refused_where_it_is_not_before_anything_is_written(shards, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        train_here(shards=shards, run_dir=tmp_path / "run", mixed_precision="fp8")
    assert caught.value.code == 1
    text = capsys.readouterr().err
    assert "mixed_precision=fp8 needs an NVIDIA GPU" in text and "or auto." in text
    assert not (tmp_path / "run").exists()


def test_smaller_micro_batches_take_the_same_steps(finished, shards, tmp_path):
    run = tmp_path / "run"
    train_here(shards=shards, run_dir=run, micro_batch_size=1)
    for one, other in zip(metrics_of(finished), metrics_of(run), strict=True):
        # Validation sums in float64 over other micro-batches; training in float32 in another order.
        assert one == pytest.approx(other, rel=1e-4)


def test_two_processes_take_the_same_steps_as_one(finished, shards, tmp_path):
    """Through ddp.yaml, which without GPUs starts gloo processes."""
    run = tmp_path / "run"
    launch = ["--config_file", str(CONFIGS / "ddp.yaml"), "--num_processes", "2", "--main_process_port", "0"]
    done = run_training(*launch, shards=shards, run_dir=run)
    assert "2 processes (MULTI_CPU)" in done.stdout
    assert done.stdout.count("A new run in") == 1
    for one, other in zip(metrics_of(finished), metrics_of(run), strict=True):
        assert one == pytest.approx(other, rel=1e-4)  # float32 sums in another order
    weights = [load_file(folder / "export" / "model.safetensors") for folder in (finished, run)]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "recipe", ["gpt2_124m", "gpt2_350m", "gpt2_774m", "gpt2_1558m", "speed_124m", "demo"]
)
def test_every_recipe_takes_steps_at_toy_size(shards, tmp_path, recipe):
    """Sizes are the toy's; all else, such as activation checkpointing, is the recipe's."""
    keys = ("block_size", "n_layer", "n_head", "n_embd", "batch_tokens", "micro_batch_size", "eval_tokens")
    small = {key: TOY[key] for key in (*keys, "sample_tokens", "cpu_threads")}
    config = ROOT / "recipes" / f"{recipe}.yaml"
    flags = as_flags({**small, "config": config, "shards": shards, "run_dir": tmp_path / "run"})
    # The Hub's questions would want a network.
    more = ["--max_steps", "3", "--warmup_steps", "1", "--sample_prompts", "The", "--hellaswag_questions", ""]
    train_flags_here([*flags, *more])
    assert [line["step"] for line in metrics_of(tmp_path / "run") if "loss" in line] == [1, 2, 3]


@pytest.mark.parametrize("config", ["cpu", "single_gpu"])
def test_the_yaml_of_one_process_launches(shards, tmp_path, config):
    launch = ["--config_file", str(CONFIGS / f"{config}.yaml")]
    done = run_training(*launch, shards=shards, run_dir=tmp_path / "run", max_steps=2)
    assert "1 process (NO)" in done.stdout
    assert "The model is in" in done.stdout


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_of_a_launcher_file_has_a_comment_of_its_own(path):
    """Right above it, in words, and not the same for two keys."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    keys = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    assert len(keys) == sum(
        1 + len(value if isinstance(value, dict) else ()) for value in read(path).values()
    )
    comments = [lines[number - 1].removeprefix("# ") for number in keys]
    for number, comment in zip(keys, comments, strict=True):
        assert lines[number - 1].startswith("# ") and len(comment.split()) >= 3, lines[number]
    assert len(set(comments)) == len(comments)


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


# What the recipes of GPT-2 have in common, in the words of the GPT-2 and GPT-3 papers.
OF_EVERY_GPT2 = {
    "batch_tokens": 524_288,
    "block_size": 1024,
    "optimizer": "adamw",
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "warmup_steps": 715,
    "final_learning_rate_ratio": 0.1,
    "max_steps": 19_073,
    "eval_every_steps": 250,
    "save_every_steps": 5000,
    "save_every_minutes": 15.0,
}


@pytest.mark.parametrize(
    ("recipe", "learning_rate", "parameters"),
    [
        ("gpt2_124m", 6e-4, 124_439_808),
        ("gpt2_350m", 3e-4, 354_823_168),
        ("gpt2_774m", 2.5e-4, 774_030_080),
        ("gpt2_1558m", 2e-4, 1_557_611_200),
    ],
)
@pytest.mark.parametrize("processes", [1, 2, 8, 16])
def test_the_recipes_are_gpt2s_and_their_batch_divides(recipe, learning_rate, parameters, processes):
    settings = parse_settings(TrainSettings, ["--config", str(ROOT / "recipes" / f"{recipe}.yaml")])
    assert {name: getattr(settings, name) for name in OF_EVERY_GPT2} == OF_EVERY_GPT2
    assert settings.learning_rate == learning_rate
    micro_batches = micro_batches_per_process(settings, processes)
    assert micro_batches * settings.micro_batch_size * settings.block_size * processes == 524_288
    config = GPTScratchConfig(
        n_layer=settings.n_layer, n_head=settings.n_head, n_embd=settings.n_embd, vocab_size=50_257
    )
    with torch.device("meta"):
        assert GPTScratchForCausalLM(config).num_parameters() == parameters


def test_a_full_disk_during_export_is_said_and_loses_nothing(copy_of_finished, shards):
    """The kernel refuses to let a file grow beyond a limit, as a full disk would."""
    shutil.rmtree(copy_of_finished / "export")
    before = files_below(copy_of_finished / "checkpoints")

    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))

    command = train_command(shards=shards, run_dir=copy_of_finished)
    full = subprocess.run(
        command, env=environment(), capture_output=True, text=True, preexec_fn=no_large_files
    )
    assert full.returncode == 1
    assert f"error: The export could not be written to {copy_of_finished / 'export'}" in full.stderr
    assert "make room" in full.stderr and "Traceback" not in full.stderr
    assert not (copy_of_finished / "export").exists()
    assert not list(copy_of_finished.glob(".tmp*"))
    assert files_below(copy_of_finished / "checkpoints") == before
    train_here(shards=shards, run_dir=copy_of_finished)
    assert (copy_of_finished / "export" / "model.safetensors").exists()


def test_a_run_killed_between_its_two_exports_writes_both(shards, tmp_path, monkeypatch):
    """The weights' export came first, said that the run was complete, and the average was never written."""
    settings = {"shards": shards, "run_dir": tmp_path / "run", "max_steps": 2, "ema_decay": 0.5}
    fail_at_call(monkeypatch, "export_model", 2)
    with pytest.raises(KeyboardInterrupt):
        train_here(**settings)
    monkeypatch.undo()
    train_here(**settings)
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
    assert (tmp_path / "run" / "export-ema" / "model.safetensors").exists()


def test_a_prolonged_run_killed_before_its_export_does_not_pass_off_the_old_one(
    copy_of_finished, shards, monkeypatch
):
    """It was complete by the export of its earlier end."""
    longer = {"shards": shards, "run_dir": copy_of_finished, "max_steps": 14, "allow_change": "true"}
    fail_at_call(monkeypatch, "export_model", 1)
    with pytest.raises(KeyboardInterrupt):
        train_here(**longer)
    monkeypatch.undo()
    assert latest_checkpoint(copy_of_finished).name == "step-0000014"
    train_here(**longer)
    old, new = (
        load_file(copy_of_finished / name / "model.safetensors") for name in ("export-previous-1", "export")
    )
    saved = load_file(latest_checkpoint(copy_of_finished) / "model.safetensors")
    name = "transformer.h.0.attn.o_proj.weight"
    assert torch.equal(new[name], saved[name]) and not torch.equal(old[name], saved[name])


def fail_at_call(monkeypatch, name: str, number: int) -> None:
    """The `number`th call of what the loop knows by `name` is interrupted, as by a kill."""
    function, calls = getattr(train_accelerate, name), itertools.count(1)

    def interrupted(*arguments, **named):
        if next(calls) == number:
            raise KeyboardInterrupt
        return function(*arguments, **named)

    monkeypatch.setattr(train_accelerate, name, interrupted)


def test_a_second_run_in_the_same_directory_is_refused(copy_of_finished, shards):
    """The first one holds the folder's lock, as a run in progress does."""
    import fcntl

    with open(copy_of_finished / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            train_here(shards=shards, run_dir=copy_of_finished)


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_written(shards, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_here(shards=shards, run_dir=tmp_path / "run", batch_tokens=224)
    assert "batch_tokens=224 is not a multiple of 128" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_corpus_smaller_than_a_block_is_refused(shards, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_here(shards=shards, run_dir=tmp_path / "run", block_size=131_072, batch_tokens=524_288)
    assert "less than one block" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_prompts_without_room_for_their_samples_are_refused_before_anything_is_written(
    shards, tmp_path, capsys
):
    """They once ended a run at its first sample, before that step's checkpoint."""
    with pytest.raises(SystemExit):
        train_here(shards=shards, run_dir=tmp_path / "run", sample_prompts="the dungeon " * 30)
    text = capsys.readouterr().err
    assert "the prompt 'the dungeon the dungeon" in text and "lower --sample_tokens" in text
    assert not (tmp_path / "run").exists()


def test_flags_that_shards_do_not_follow_are_refused_and_recipes_are_not(
    copy_of_finished, shards, tmp_path, capsys
):
    """The demo recipe, which all these runs start from, asks for other words than the toy's shards have."""
    train_here(shards=shards, run_dir=copy_of_finished, source=shards.parent / "toy.jsonl")
    text = capsys.readouterr().out
    assert f"Training on {shards}: {shards.parent / 'toy.jsonl'}, tokenizer trained on " in text
    for flag, value in {"source": "python-docs", "tokenizer": "gpt2", "train_tokenizer": "301"}.items():
        with pytest.raises(SystemExit):
            train_here(shards=shards, run_dir=tmp_path / "other", **{flag: value})
        text = capsys.readouterr().err
        assert f"--{flag} {value}, but they " in text and "Leave the flag out" in text
    assert not (tmp_path / "other").exists()


def test_a_source_that_cannot_be_read_is_an_error_for_people(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for shards in (tmp_path / "new", tmp_path / "file" / "below"):
        with pytest.raises(SystemExit):
            train_here(shards=shards, source=tmp_path / "nothing", run_dir=tmp_path / "run")
        assert f"error: {shards} could not be prepared: " in capsys.readouterr().err


def test_a_checkpoint_of_another_shape_is_an_error_with_a_cure(copy_of_finished, shards, capsys):
    with pytest.raises(SystemExit):
        train_here(shards=shards, run_dir=copy_of_finished, n_embd=64, max_steps=14, allow_change="true")
    text = capsys.readouterr().err
    assert "does not fit the model of these settings" in text and "settings.yaml has them" in text


def test_a_file_system_without_locks_is_warned_about_and_used(copy_of_finished, shards, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    train_here(shards=shards, run_dir=copy_of_finished)
    text = capsys.readouterr().out
    assert "has no locks (No locks available)" in text and "is complete" in text


def test_a_tokenizer_that_is_not_byte_level_trains_without_bits_per_byte(shards, tmp_path, capsys):
    """Such words have no fixed number of bytes; this once ended the run before its first step."""
    words = AutoTokenizer.from_pretrained(shards / "tokenizer")
    content = json.loads(words.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    content["model"]["merges"] = []
    longest = max(vocabulary, key=len)
    vocabulary["\u2581" + longest] = vocabulary.pop(longest)
    other = shutil.copytree(shards, tmp_path / "shards")
    (other / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    fingerprint = tokenizer_fingerprint(load_tokenizer(other / "tokenizer"))
    write_manifest(other, dataclasses.replace(read_manifest(other), tokenizer_fingerprint=fingerprint))
    train_here(shards=other, run_dir=tmp_path / "run", max_steps=1, warmup_steps=0)
    assert "leaves out bits per byte" in capsys.readouterr().out
    validation = metrics_of(tmp_path / "run")[-1]
    assert validation["bits_per_byte"] is None and validation["validation_loss"] > 0


def test_shards_beside_the_tokenizer_of_others_are_refused(shards, tmp_path, capsys):
    """A model of 50,304 words learnt the ids of 300: sizes alone were checked, and those are the shards'."""
    other = shutil.copytree(shards, tmp_path / "shards")
    shutil.rmtree(other / "tokenizer")
    gpt2_tokenizer().save_pretrained(other / "tokenizer")
    with pytest.raises(SystemExit):
        train_here(shards=other, run_dir=tmp_path / "run", max_steps=1, warmup_steps=0)
    assert "this one has 50,257 words" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_files_of_an_export_are_readable_and_its_folders_can_be_entered(finished, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(finished / "export")
    tokenizer = AutoTokenizer.from_pretrained(finished / "export")
    tokenizer.chat_template = {"default": "{{ messages }}", "other": "{{ messages }}"}  # saved as a folder
    export_model(Accelerator(cpu=True), model, tokenizer, tmp_path / "export")
    paths = list((tmp_path / "export").rglob("*"))
    assert any(path.is_dir() for path in paths)
    for path in paths:
        assert path.stat().st_mode & 0o777 == 0o644 if path.is_file() else path.stat().st_mode & 0o100, path


def test_checkpoints_are_pruned_by_what_is_to_be_kept(shards, tmp_path):
    run = tmp_path / "run"
    train_here(
        shards=shards, run_dir=run, save_every_steps=1, keep_last=2, keep_every_steps=5, keep_best="false",
        eval_every_steps=100, max_steps=9,
    )  # fmt: skip
    assert list(complete_checkpoints(run)) == [5, 8, 9]
    for path in (run / "checkpoints").iterdir():
        assert json.loads((path / "COMPLETE").read_text())["files"].keys() == set(os.listdir(path)) - {
            "COMPLETE"
        }


@pytest.mark.slow
def test_a_sharded_run_stops_resumes_and_ends_like_an_unsharded_one(finished, shards, tmp_path):
    """FSDP2 through fsdp2.yaml, on gloo: every parameter really is a DTensor (tests/fsdp2_on_cpu.py).

    After sampling, FSDP2 leaves the embeddings gathered; a checkpoint taken then once lacked their moments.
    """
    run = tmp_path / "run"
    launch = [
        "--config_file",
        str(CONFIGS / "fsdp2.yaml"),
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    script = ROOT / "tests" / "fsdp2_on_cpu.py"
    first = run_training(
        *launch, script=script, shards=shards, run_dir=run, max_minutes=1e-9, sample_every_steps=1
    )
    assert first.stdout.count("every parameter is a DTensor") == 2 and "Stopped after step 1" in first.stdout
    second = run_training(*launch, script=script, shards=shards, run_dir=run)
    assert "2 processes (FSDP)" in second.stdout and "Going on from step 1" in second.stdout
    for one, other in zip(metrics_of(finished), metrics_of(run), strict=True):
        assert one == pytest.approx(other, rel=1e-4)  # float32 sums in another order
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(latest_checkpoint(folder) / name) for folder in (finished, run))
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_machines_on_loopback_take_the_same_steps_as_one(finished, shards, tmp_path):
    run, port = tmp_path / "run", str(free_port())
    launch = ["--config_file", str(CONFIGS / "multi_node.yaml"), "--num_processes", "2"]
    launch += ["--main_process_port", port, "--machine_rank"]
    machines = [
        subprocess.Popen(
            train_command(*launch, rank, shards=shards, run_dir=run),
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    with ended(machines):
        outputs = [machine.communicate(timeout=200)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0]
    assert "2 processes (MULTI_CPU)" in outputs[0] and outputs[1] == ""
    for one, other in zip(metrics_of(finished), metrics_of(run), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_run_resumed_on_another_number_of_processes_sees_the_same_batches(finished, shards, tmp_path):
    """The loss curve agrees to the order of float32 sums."""
    run = tmp_path / "run"
    train_here(shards=shards, run_dir=run, max_minutes=1e-9)
    launch = ["--config_file", str(CONFIGS / "ddp.yaml"), "--num_processes", "2", "--main_process_port", "0"]
    done = run_training(*launch, shards=shards, run_dir=run)
    assert "Going on from step 1" in done.stdout
    for one, other in zip(metrics_of(finished), metrics_of(run), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
