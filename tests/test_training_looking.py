"""Looking at a model while it trains changes nothing but when it stops and what is exported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch.utils.data import Dataset
from training_toys import ROOT, TOY_SETTINGS, as_flags, metrics_of, run_training, write_toy_shards
from transformers import GPT2Config, GPT2LMHeadModel

from data.tokenizer import load_tokenizer
from train_accelerate import main, train
from training.checkpoint import best_checkpoint, complete_checkpoints
from training.objective import language_modeling_loss
from training.recipe import TrainSettings
from training.settings import parse_settings

QUESTION = {
    "activity_label": "Reading", "ctx_a": "The model reads.", "ctx_b": "it", "ctx": "The model reads. it",
    "endings": ["learns.", "never learns.", "is a deep dungeon.", "steps and steps."], "label": 0,
    "source_id": "activitynet~v_1", "ind": 1, "split": "val", "split_type": "indomain",
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_toy_shards(tmp_path_factory.mktemp("toy"))


def train_here(**settings) -> None:
    try:
        main(as_flags({**TOY_SETTINGS, **settings}))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.mark.filterwarnings("ignore:.*not the official hellaswag")
@pytest.mark.parametrize("compiled", ["none", pytest.param("whole", marks=pytest.mark.slow)])
def test_a_run_that_is_looked_at_ends_in_the_same_weights_bit_for_bit(shards, tmp_path, compiled):
    """Validation, samples and HellaSwag at every step, with dropout: one random number more would show."""
    if compiled != "none" and not any(map(shutil.which, ("cc", "gcc", "clang", "c++"))):
        pytest.skip("torch.compile needs a C++ compiler")
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({**QUESTION, "label": label}) + "\n" for label in range(4)))
    never, always = {}, {"hellaswag_questions": questions, "hellaswag_limit": 3, "hellaswag_every_steps": 1}
    for name in ("eval_every_steps", "sample_every_steps"):
        never[name], always[name] = 100, 1
    runs = [tmp_path / "looked-at", tmp_path / "left-alone"]
    for run, looks in zip(runs, (always, never), strict=True):
        train_here(shards=shards, run_dir=run, max_steps=6, dropout=0.2, compile=compiled, **looks)
    ends = [complete_checkpoints(run)[6] for run in runs]
    for name in ("model.safetensors", "optimizer.safetensors", "random_states.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), name
    losses = [[line["loss"] for line in metrics_of(run) if "loss" in line] for run in runs]
    assert losses[0] == losses[1]
    scores = [line for line in metrics_of(runs[0]) if "hellaswag_acc_norm" in line]
    assert [line["step"] for line in scores] == [1, 2, 3, 4, 5, 6]
    assert all(line["hellaswag_questions"] == 3 and 0 <= line["hellaswag_acc_norm"] <= 1 for line in scores)
    samples = [json.loads(line) for line in (runs[0] / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in samples] == [step for step in range(1, 7) for _ in range(3)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*not the official hellaswag")
def test_two_processes_that_are_looked_at_end_in_the_same_weights_bit_for_bit(shards, tmp_path):
    """Each draws numbers of its own, and has its own share of validation, samples and questions."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({**QUESTION, "label": label}) + "\n" for label in range(4)))
    launch = ["--config_file", str(ROOT / "accelerate_configs" / "ddp.yaml"), "--num_processes", "2"]
    looks = {"hellaswag_questions": questions, "hellaswag_limit": 3}
    ends = []
    for name, every in (("looked-at", 1), ("left-alone", 100)):
        run = tmp_path / name
        steps = {f"{look}_every_steps": every for look in ("eval", "sample", "hellaswag")}
        steps |= looks if every == 1 else {}
        port = ("--main_process_port", "0")
        run_training(*launch, *port, shards=shards, run_dir=run, max_steps=4, dropout=0.2, **steps)
        ends.append(complete_checkpoints(run)[4])
    for file in ("model.safetensors", "optimizer.safetensors", "random_states.safetensors"):
        assert (ends[0] / file).read_bytes() == (ends[1] / file).read_bytes(), file


def test_questions_that_are_not_there_are_an_error_before_anything_is_written(shards, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_here(shards=shards, run_dir=tmp_path / "run", hellaswag_questions=tmp_path / "none.jsonl")
    assert "error: no file" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:.*not the official hellaswag")
def test_numbers_that_overflow_cost_a_run_its_samples_and_scores_and_no_more(shards, tmp_path, capsys):
    """Weights that are finite and products that are not, as fp16 has them: the run once ended here."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps(QUESTION) + "\n")
    tokenizer = load_tokenizer(Path(shards, "tokenizer"))
    shape = {"vocab_size": len(tokenizer), "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(torch.finfo(torch.float32).max)
    flags = {**TOY_SETTINGS, "run_dir": tmp_path / "run", "max_steps": 2, "hellaswag_questions": questions}
    settings = parse_settings(TrainSettings, as_flags({**flags, "eval_every_steps": 1}))
    state = train(settings, model, tokenizer, Rows(), Rows(), pad, language_modeling_loss)
    assert state.step == 2 and list(complete_checkpoints(tmp_path / "run")) == [2]
    said = capsys.readouterr().out
    assert said.count("Left out this time: the model returned NaN") == 2
    assert not any("hellaswag_acc_norm" in line for line in metrics_of(tmp_path / "run"))


def test_validations_without_a_better_loss_end_the_run_also_across_a_resume(shards, tmp_path, capsys):
    """Without learning no validation is better than the first: three more, and the run ends, well ended."""
    stuck = {"learning_rate": 0, "eval_every_steps": 2, "early_stopping_evaluations": 3, "max_steps": 100}
    train_here(shards=shards, run_dir=tmp_path / "whole", **stuck)
    assert [line["step"] for line in metrics_of(tmp_path / "whole") if "validation_loss" in line] == [
        2,
        4,
        6,
        8,
    ]
    assert (tmp_path / "whole" / "export" / "config.json").exists()
    assert "Stopped" not in capsys.readouterr().out
    for _ in range(5):
        train_here(shards=shards, run_dir=tmp_path / "broken", max_minutes=1e-9, **stuck)
    train_here(shards=shards, run_dir=tmp_path / "broken", **stuck)
    assert metrics_of(tmp_path / "broken") == metrics_of(tmp_path / "whole")
    train_here(shards=shards, run_dir=tmp_path / "broken", **stuck)
    assert "is complete (8 steps)" in capsys.readouterr().out


def test_the_best_weights_are_exported_when_asked_for(shards, tmp_path, capsys):
    """A rate that ruins the model: the first validations are its best."""
    run = tmp_path / "run"
    ruin = {"learning_rate": 0.5, "warmup_steps": 6, "eval_every_steps": 1, "max_steps": 10}
    train_here(shards=shards, run_dir=run, save_every_steps=100, keep_last=1, export_best="true", **ruin)
    losses = {line["step"]: line["validation_loss"] for line in metrics_of(run) if "validation_loss" in line}
    best = min(losses, key=losses.__getitem__)
    assert best < 10 and best_checkpoint(run).name == f"step-{best:07d}"
    checkpoint, export = (
        load_file(folder / "model.safetensors") for folder in (best_checkpoint(run), run / "export")
    )
    for name, tensor in export.items():
        assert torch.equal(tensor, checkpoint[name][: len(tensor)]), name
    assert f"weights of step-{best:07d}" in capsys.readouterr().out


class Rows(Dataset):
    """Rows of varying length whose first labels do not count, as fine-tuning has them."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        input_ids = torch.arange(5 + index % 17) + index
        labels = input_ids.clone()
        labels[:3] = -100
        return {"input_ids": input_ids, "labels": labels, "attention_mask": torch.ones_like(input_ids)}


def pad(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        name: torch.nn.utils.rnn.pad_sequence(
            [row[name] for row in rows], batch_first=True, padding_value=value
        )
        for name, value in fill.items()
    }


@pytest.mark.parametrize("kind", ["stock GPT-2", "PEFT"])
def test_the_loop_trains_other_models_on_rows_of_varying_length(shards, tmp_path, kind):
    tokenizer = load_tokenizer(Path(shards, "tokenizer"))
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    if kind == "PEFT":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    flags = {**TOY_SETTINGS, "run_dir": tmp_path / "run", "learning_rate": 0.02, "max_steps": 8}
    settings = parse_settings(TrainSettings, as_flags(flags))
    state = train(settings, model, tokenizer, Rows(), Rows(), pad, language_modeling_loss)
    lines = metrics_of(tmp_path / "run")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - (1.0 if kind == "stock GPT-2" else 0.0)
    # Eight rows a step of 5 to 21 tokens: padding is not counted.
    assert state.step == 8 and 8 * 8 * 5 < state.tokens < 8 * 8 * 21
    assert state.tokens == [line["tokens"] for line in lines if "loss" in line][-1]
