"""Fine-tuning for real, of a toy: the loop's promises hold, and each method leaves what it says."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from training_toys import ROOT, as_flags, environment, metrics_of
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from data.dungeons import build_prompt
from data.tokenizer import train_tokenizer
from finetune import main
from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from training.checkpoint import latest_checkpoint
from training.distillation import Distillation, distillation_loss

TOY = {
    "block_size": 128,
    "batch_tokens": 512,
    "micro_batch_size": 2,
    "max_steps": 6,
    "warmup_steps": 1,
    "learning_rate": 3e-3,
    "eval_every_steps": 3,
    "eval_tokens": 100_000,
    "sample_every_steps": 6,
    "sample_tokens": 4,
    "save_every_steps": 2,
    "save_every_minutes": 0,
    "log_every_steps": 2,
    "keep_last": 10,
    "mixed_precision": "no",
    "compile": "none",
    "cpu_threads": 1,
    "drop_too_long": "false",
    "dropout": 0.1,
}
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 300, "n_positions": 128}


def finetune_here(**settings) -> None:
    try:
        main(as_flags({**TOY, **settings}))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def room(n: int) -> dict:
    place = ["cistern", "bridge", "stair", "larder"][n % 4]
    text = f"Rope drips from bell {n} in the {place}, and {['water', 'salt', 'bone'][n % 3]} keeps the time."
    return {"title": f"Bell {n}", "place": place, "features": ["rope"], "description": text}


@pytest.fixture(scope="module")
def rooms(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rooms")
    for split, numbers in (("train", range(40)), ("validation", range(40, 48))):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(room(n)) + "\n" for n in numbers))
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([json.dumps(room(n)) for n in range(40)], 300)


@pytest.fixture(scope="module")
def bases(tokenizer, tmp_path_factory) -> Path:
    """Small models by name: ours, stock GPT-2, a Llama; a larger teacher, and one of another vocabulary."""
    folder = tmp_path_factory.mktemp("bases")
    ends = {"bos_token_id": 299, "eos_token_id": 299}
    llama = LlamaConfig(
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, hidden_size=32,
        intermediate_size=64, vocab_size=300, max_position_embeddings=128, **ends,
    )  # fmt: skip
    torch.manual_seed(0)
    for name, model in {
        "ours": GPTScratchForCausalLM(GPTScratchConfig(**SIZES, **ends)),
        "gpt2": GPT2LMHeadModel(GPT2Config(**SIZES, **ends)),
        "llama": LlamaForCausalLM(llama),
        "teacher": GPTScratchForCausalLM(GPTScratchConfig(**{**SIZES, "n_embd": 64}, **ends)),
    }.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    shutil.copytree(folder / "teacher", folder / "stranger")
    train_tokenizer([json.dumps(room(n))[::-1] for n in range(40)], 300).save_pretrained(folder / "stranger")
    return folder


def flags(rooms, bases, run, base="ours", **more) -> dict:
    return {"data": rooms, "model": bases / base, "run_dir": run, **more}


@pytest.fixture(scope="module")
def finished(rooms, bases, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    (run.parent / "notes.txt").write_text("Any other text, about something else. " * 40)
    finetune_here(**flags(rooms, bases, run), general_data=run.parent / "notes.txt")
    return run


def test_a_run_learns_rooms_and_says_what_it_forgot(finished):
    losses = [line["loss"] for line in metrics_of(finished) if "loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.3
    told = json.loads((finished / "finetuning.json").read_text())
    assert told["after"]["rooms"] < told["before"]["rooms"] and set(told["after"]) == {"rooms", "general"}


@pytest.mark.slow
def test_the_export_writes_rooms_by_its_own_defaults_in_a_fresh_process(finished, tmp_path):
    config = json.loads((finished / "export" / "generation_config.json").read_text())
    assert config["do_sample"] and config["eos_token_id"] == 299 and 0 < config["max_new_tokens"] <= 64
    code = (
        "import sys; from transformers import pipeline;"
        "write = pipeline('text-generation', model=sys.argv[1], trust_remote_code=True);"
        "print(repr(write(sys.argv[2])[0]['generated_text']))"
    )
    clean = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    clean["HF_MODULES_CACHE"] = str(tmp_path)
    prompt = build_prompt(place="stair", features=["rope"])
    command = [sys.executable, "-c", code, str(finished / "export"), prompt]
    done = subprocess.run(command, env=clean, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert repr(prompt)[:-1] in done.stdout.splitlines()[-1]


def assert_same_run(one: Path, other: Path) -> None:
    ends = [latest_checkpoint(run) for run in (one, other)]
    for name in ("model.safetensors", "optimizer.safetensors", "random_states.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), name
    assert metrics_of(one) == metrics_of(other)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_stopped_after_every_step_matches_an_unbroken_one_bit_for_bit(rooms, bases, tmp_path, method):
    """With dropout and fields left out at random: both would show a lost place."""
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    same = {"method": method, "field_dropout": 0.5, "max_steps": 4, "eval_every_steps": 2}
    finetune_here(**flags(rooms, bases, unbroken), **same)
    for _ in range(4):
        finetune_here(**flags(rooms, bases, broken), **same, max_minutes=1e-9)
    assert_same_run(broken, unbroken)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_end_bit_for_bit(rooms, bases, finished, tmp_path):
    run = tmp_path / "run"
    settings = {**TOY, **flags(rooms, bases, run), "general_data": finished.parent / "notes.txt"}
    command = [sys.executable, str(ROOT / "finetune.py"), *as_flags(settings)]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while latest_checkpoint(run) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and latest_checkpoint(run) is not None
    assert not (run / "export").exists()
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    assert_same_run(run, finished)


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one_and_both_reach_the_end(rooms, bases, tmp_path):
    """Once the second looked for the export before the first had written it, and ended the run."""
    settings = {"method": "distill", "teacher": bases / "teacher", "dropout": 0, "max_steps": 3}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launcher += ["--config_file", str(ROOT / "accelerate_configs" / "ddp.yaml"), "--num_processes", "2"]
    toy = {**TOY, **flags(rooms, bases, tmp_path / "two"), **settings}
    command = [*launcher, str(ROOT / "finetune.py"), *as_flags(toy)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    finetune_here(**flags(rooms, bases, tmp_path / "one"), **settings)
    for one, two in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)  # float32 sums in another order
    told = [json.loads((tmp_path / run / "finetuning.json").read_text()) for run in ("one", "two")]
    assert told[0]["after"]["rooms"] == pytest.approx(told[1]["after"]["rooms"], rel=1e-4)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_plan_counts_the_tokens_that_rows_have(rooms, bases, tmp_path, method):
    """Rows of one room each are not full; a batch is accumulated, so the plan trains the same model twice."""
    output = tmp_path / "plan.json"
    finetune_here(**flags(rooms, bases, tmp_path / "run", method=method, packing="no", batch_tokens=1024),
                  plan="true", plan_steps=4, plan_output=output)  # fmt: skip
    plan = json.loads(output.read_text())
    assert 0 < plan["tokens"] < 0.8 * 6 * 1024
    assert plan["tokens_per_second"] == pytest.approx(plan["tokens"] / 6 / plan["seconds_per_step"], rel=1e-3)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_a_base_too(rooms, finished, tmp_path):
    base = latest_checkpoint(finished)
    finetune_here(**{**flags(rooms, base, tmp_path / "run"), "model": base}, max_steps=1, eval_every_steps=1)
    told = [json.loads((run / "finetuning.json").read_text()) for run in (finished, tmp_path / "run")]
    # `finished` exported its last weights: what one ended with, the other begins with.
    assert told[1]["before"]["rooms"] == pytest.approx(told[0]["after"]["rooms"], rel=1e-6)


def test_stock_gpt2_is_converted_and_other_models_stay_what_they_are(rooms, bases, tmp_path, capsys):
    for base, expected in (("gpt2", "gpt_scratch"), ("llama", "llama")):
        dropout = 0 if base == "llama" else 0.1
        finetune_here(**flags(rooms, bases, tmp_path / base, base), max_steps=2, dropout=dropout)
        config = json.loads((tmp_path / base / "export" / "config.json").read_text())
        assert config["model_type"] == expected
    finetune_here(**flags(rooms, bases, tmp_path / "stock", "gpt2"), max_steps=2, convert="no")
    assert json.loads((tmp_path / "stock" / "export" / "config.json").read_text())["model_type"] == "gpt2"
    text = capsys.readouterr().out
    assert "would read one packed room in the next" not in text


def logits_of(model, tokenizer):
    ids = torch.tensor([tokenizer(build_prompt(place="stair"))["input_ids"]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("base", ["ours", "gpt2"])
def test_lora_leaves_an_adapter_and_merging_changes_no_logit(rooms, bases, tmp_path, tokenizer, base):
    run = tmp_path / "run"
    settings = {**flags(rooms, bases, run, base), "method": "lora", "max_steps": 3, "learning_rate": 0.03}
    finetune_here(**settings)
    export, checkpoint = run / "export", load_file(latest_checkpoint(run) / "model.safetensors")
    assert (export / "adapter_model.safetensors").exists() and not (export / "model.safetensors").exists()
    # PEFT's card is a form to fill in, and release.card would respect it: this one is ours.
    assert "A LoRA adapter" in (export / "README.md").read_text()
    assert all("lora_" in name for name in checkpoint)  # the base is not saved again and again
    adapted = AutoModelForCausalLM.from_pretrained(export)
    expected = logits_of(adapted, tokenizer)
    assert not torch.equal(expected, logits_of(AutoModelForCausalLM.from_pretrained(bases / base), tokenizer))
    finetune_here(**settings, merge="true")  # the run is complete: this only merges
    assert (run / "adapter" / "adapter_config.json").exists() and not (
        export / "adapter_config.json"
    ).exists()
    merged = AutoModelForCausalLM.from_pretrained(export)
    # x @ (W + BA) against x @ W + x @ BA, in float32.
    torch.testing.assert_close(logits_of(merged, tokenizer), expected, rtol=1e-4, atol=1e-5)
    assert (
        merged.generation_config.max_new_tokens and AutoTokenizer.from_pretrained(export).eos_token_id == 299
    )


# Distillation


def reference(hidden, weight, targets, teacher_hidden, teacher_weight, share, temperature):
    """The formula with whole logits."""
    student, teacher = hidden @ weight.T, teacher_hidden @ teacher_weight.T
    softer = (student / temperature).log_softmax(-1)
    kl = F.kl_div(softer, (teacher / temperature).softmax(-1), reduction="sum")
    return (1 - share) * F.cross_entropy(student, targets, reduction="sum") + share * temperature**2 * kl


@pytest.mark.parametrize(("share", "temperature"), [(0.0, 1.0), (0.5, 2.0), (1.0, 1.0), (0.7, 0.5)])
def test_chunks_give_the_loss_and_gradients_of_whole_logits(monkeypatch, share, temperature):
    monkeypatch.setattr("training.distillation.CHUNK_ROWS", 3)
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    seen, teacher_weight, targets = torch.randn(10, 6), torch.randn(7, 6), torch.randint(0, 7, (10,))
    options = {"share": share, "temperature": temperature}
    ours = distillation_loss(hidden, weight, targets, seen, teacher_weight, dtype=torch.float32, **options)
    whole = reference(hidden, weight, targets, seen, teacher_weight, **options)
    torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-5)  # float32 sums in another order
    gradients = [torch.autograd.grad(loss / 3, (hidden, weight)) for loss in (ours, whole)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn_from_it(bases):
    model = GPTScratchForCausalLM.from_pretrained(bases / "ours")
    objective = Distillation(
        GPTScratchForCausalLM.from_pretrained(bases / "ours"), vocabulary=300, share=1.0, temperature=2.0
    )
    ids = torch.randint(0, 299, (2, 20))
    loss = objective(model.train(), {"input_ids": ids, "labels": ids}, torch.tensor(38))
    assert loss.item() == pytest.approx(0.0, abs=1e-5)  # rounding of log-softmax
    loss.backward()
    assert not objective.teacher.training and all(p.grad is None for p in objective.teacher.parameters())
    assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) < 1e-5


def test_neither_models_logits_are_ever_whole(bases):
    """The heads' products are the only tensors as wide as the vocabulary, and never as long as the batch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    longest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dim() >= 2 and result.shape[-1] == 300:
                longest.append(result.untyped_storage().nbytes() // (4 * 300))  # not of views
            return result

    model = GPTScratchForCausalLM.from_pretrained(bases / "ours").train()
    objective = Distillation(
        AutoModelForCausalLM.from_pretrained(bases / "teacher"), vocabulary=300, share=0.5, temperature=2.0
    )
    ids = torch.randint(0, 299, (8, 120))
    with Watch():
        objective(model, {"input_ids": ids, "labels": ids}, torch.tensor(8 * 119)).backward()
    assert longest and max(longest) <= 256 < 8 * 119


def test_a_distilled_run_learns_and_a_cached_teacher_changes_no_bit(rooms, bases, tmp_path):
    settings = {"method": "distill", "teacher": bases / "teacher", "max_steps": 4, "field_dropout": 0}
    for name, cache in (("plain", ""), ("cached", tmp_path / "cache"), ("again", tmp_path / "cache")):
        more = {"teacher_cache": cache} if cache else {}
        finetune_here(**flags(rooms, bases, tmp_path / name), **settings, **more)
    assert list((tmp_path / "cache").glob("*.safetensors"))
    losses = [
        [line.get("loss") for line in metrics_of(tmp_path / name)] for name in ("plain", "cached", "again")
    ]
    # One row at a time rounds otherwise than a batch; from the cache the same bits come back.
    assert losses[1] == losses[2]
    assert [x for x in losses[0] if x] == pytest.approx([x for x in losses[1] if x], rel=1e-4)
    told = json.loads((tmp_path / "plain" / "finetuning.json").read_text())
    assert told["after"]["rooms"] < told["before"]["rooms"]


# What cannot be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "distill", "teacher": "stranger"}, "has another vocabulary .* data.synthesize"),
        ({"method": "distill"}, "method distill needs a --teacher"),
        ({"teacher": "teacher"}, "--teacher and --teacher_cache are for --method distill, not full"),
        ({"base": "llama", "convert": "yes"}, "holds a model of type 'llama', and only stock GPT-2"),
        ({"base": "llama"}, "--dropout 0.1 is for GPT-2s"),
        ({"merge": "true"}, "--merge is for --method lora; full has nothing to merge"),
        ({"method": "lora", "lora_targets": "c_attn"}, "c_attn: no layer .* It has c_fc, c_proj, k_proj"),
        ({"base": "nowhere"}, "no model at --model .*Train the demo first"),
        (
            {"block_size": 16, "batch_tokens": 64},
            "40 of 40 train descriptions are longer than the context of 16",
        ),
        ({"n_layer": 3, "tokenizer": "x"}, "n_layer, tokenizer: decided by the base"),
        ({"columns": "text"}, "columns text: give OURS=THEIRS"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(rooms, bases, tmp_path, capsys, changes, message):
    changes = dict(changes)
    base = changes.pop("base", "ours")
    if "teacher" in changes:
        changes["teacher"] = bases / changes["teacher"]
    with pytest.raises(SystemExit) as caught:
        finetune_here(**{**flags(rooms, bases, tmp_path / "run", base), **changes})
    assert caught.value.code == 1
    text = capsys.readouterr().err
    assert re.search(message, " ".join(text.split())), text
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_model_is_not_merged(rooms, bases, tmp_path, capsys):
    run = tmp_path / "run"
    finetune_here(**flags(rooms, bases, run), method="lora", max_steps=2)
    with pytest.raises(SystemExit):  # a larger base under a finished run's adapter
        finetune_here(
            **flags(rooms, bases, run, "llama"),
            method="lora",
            max_steps=2,
            dropout=0,
            merge="true",
            allow_change="true",
        )
    text = capsys.readouterr().err
    assert "does not fit" in text
    assert (run / "export" / "adapter_config.json").exists()
    with pytest.raises(SystemExit):
        finetune_here(**{**flags(rooms, bases, tmp_path / "next"), "model": run / "export"})
    assert "is an adapter without its base" in capsys.readouterr().err


def test_the_recipes_ask_in_the_form_of_the_prompt():
    for path in (ROOT / "recipes").glob("dungeons*.yaml"):
        for prompt in yaml.safe_load(path.read_text())["sample_prompts"]:
            lines = dict(line.split(":", 1) for line in prompt.split("\n"))
            assert lines.pop("Description") == ""
            assert build_prompt(**{name.lower(): text.strip() for name, text in lines.items()}) == prompt
