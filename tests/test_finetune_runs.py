"""Fine-tuning for real, of a toy: the loop's promises hold, and each method leaves what it says."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
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
    MambaConfig,
    MambaForCausalLM,
    pipeline,
)

from data.dungeons import build_prompt
from data.tokenizer import train_tokenizer
from finetune import main
from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from training.adapters import is_adapter
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
    (folder / "other.txt").write_text("Any other text, about something else. " * 40)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([json.dumps(room(n)) for n in range(40)], 300)


@pytest.fixture(scope="module")
def bases(tokenizer, tmp_path_factory) -> Path:
    """Small models by name: ours, stock GPT-2, a Llama; teachers larger, in bfloat16, of a shorter context,
    of a state that nothing resets, and of another vocabulary; one whose tokenizer has no end."""
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
    torch.manual_seed(1)
    bfloat16 = GPTScratchForCausalLM(GPTScratchConfig(**{**SIZES, "n_embd": 64}, **ends)).to(torch.bfloat16)
    bfloat16.save_pretrained(folder / "bfloat16")
    short = GPTScratchForCausalLM(GPTScratchConfig(**{**SIZES, "n_positions": 64}, **ends))
    short.save_pretrained(folder / "short")
    state = MambaConfig(num_hidden_layers=1, hidden_size=32, state_size=4, vocab_size=300, **ends)
    MambaForCausalLM(state).save_pretrained(folder / "mamba")
    for name in ("bfloat16", "short", "mamba"):
        tokenizer.save_pretrained(folder / name)
    shutil.copytree(folder / "ours", folder / "endless")
    tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(folder / "endless")
    shutil.copytree(folder / "teacher", folder / "stranger")
    train_tokenizer([json.dumps(room(n))[::-1] for n in range(40)], 300).save_pretrained(folder / "stranger")
    return folder


def flags(rooms, bases, run, base="ours", **more) -> dict:
    known = {"data": rooms, "model": bases / base, "run_dir": run, "general_data": rooms / "other.txt"}
    return {**known, **more}


@pytest.fixture(scope="module")
def finished(rooms, bases, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    finetune_here(**flags(rooms, bases, run))
    return run


def test_a_run_learns_rooms_and_says_what_it_forgot(finished):
    losses = [line["loss"] for line in metrics_of(finished) if "loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.3
    told = json.loads((finished / "finetuning.json").read_text())
    assert told["after"]["rooms"] < told["before"]["rooms"] and set(told["after"]) == {"rooms", "general"}


def test_forgetting_is_measured_by_documentation_where_nothing_else_is_known(rooms, bases, tmp_path, capsys):
    """As of a base from the Hub, whose corpus is not here: once nothing was said of it at all."""
    run = tmp_path / "run"
    finetune_here(**flags(rooms, bases, run, general_data="", general_bytes=2000), max_steps=1)
    assert "Forgetting is measured by python-docs." in capsys.readouterr().out
    told = json.loads((run / "finetuning.json").read_text())
    assert told["before"]["general"] > 0 and told["after"]["general"] > 0


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


# finetune.py, whose fourth step waits for a checkpoint and is the end of the process.
KILLED_IN_ITS_FOURTH_STEP = """
import os, signal, sys, time
import finetune, train_accelerate
from pathlib import Path
from training.adapters import is_adapter
from training.checkpoint import latest_checkpoint

set_learning_rate, steps = train_accelerate.set_learning_rate, []

def kill_in_the_fourth(*arguments):
    steps.append(len(steps))
    if len(steps) == 4:
        while latest_checkpoint(Path(os.environ["RUN"])) is None:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return set_learning_rate(*arguments)

train_accelerate.set_learning_rate = kill_in_the_fourth
finetune.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_end_bit_for_bit(rooms, bases, finished, tmp_path):
    run = tmp_path / "run"
    settings = as_flags({**TOY, **flags(rooms, bases, run)})
    variables = environment() | {"RUN": str(run)}
    command = [sys.executable, "-c", KILLED_IN_ITS_FOURTH_STEP, *settings]
    assert subprocess.run(command, env=variables, capture_output=True).returncode == -signal.SIGKILL
    assert latest_checkpoint(run) is not None and not (run / "export").exists()
    command = [sys.executable, str(ROOT / "finetune.py"), *settings]
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
def test_lora_exports_whole_weights_with_its_adapter_beside_them(rooms, bases, tmp_path, tokenizer, base):
    run = tmp_path / "run"
    settings = {**flags(rooms, bases, run, base), "method": "lora", "max_steps": 3, "learning_rate": 0.03}
    finetune_here(**settings, merge="false")
    export, checkpoint = run / "export", load_file(latest_checkpoint(run) / "model.safetensors")
    assert (export / "adapter_model.safetensors").exists() and not (export / "model.safetensors").exists()
    # PEFT's card is a form to fill in, and release.card would respect it: this one is ours.
    assert "A LoRA adapter" in (export / "README.md").read_text()
    assert all("lora_" in name for name in checkpoint)  # the base is not saved again and again
    adapted = AutoModelForCausalLM.from_pretrained(export)
    expected = logits_of(adapted, tokenizer)
    assert not torch.equal(expected, logits_of(AutoModelForCausalLM.from_pretrained(bases / base), tokenizer))
    finetune_here(**settings)  # the run is complete: this only merges
    assert is_adapter(run / "adapter") and not is_adapter(export)
    merged = AutoModelForCausalLM.from_pretrained(export)
    # x @ (W + BA) against x @ W + x @ BA, in float32.
    torch.testing.assert_close(logits_of(merged, tokenizer), expected, rtol=1e-4, atol=1e-5)
    kept = AutoModelForCausalLM.from_pretrained(run / "adapter")
    torch.testing.assert_close(logits_of(kept, tokenizer), expected, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(export).eos_token_id == 299


@pytest.mark.parametrize(("base", "merge"), [("ours", "true"), ("gpt2", "true"), ("gpt2", "false")])
def test_loras_export_writes_in_one_line_by_its_own_defaults_from_any_folder(
    rooms, bases, tmp_path, monkeypatch, base, merge
):
    """transformers reads an adapter's generation config beside its base; that once was the untuned one, and a
    base named by a relative path was looked for on the Hub."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bases / base, "base-of-mine")
    settings = {**flags(rooms, bases, "run"), "model": "base-of-mine", "method": "lora", "max_steps": 2}
    finetune_here(**settings, merge=merge, sample_temperature=0.6)
    assert is_adapter(Path("run/export")) == (merge == "false")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write = pipeline("text-generation", model=str(tmp_path / "run" / "export"), trust_remote_code=True)
    config = write.model.generation_config
    assert config.do_sample and config.temperature == 0.6 and config.top_p == 0.95
    assert (
        config.repetition_penalty == 1.05 and config.eos_token_id == 299 and 0 < config.max_new_tokens <= 64
    )
    prompt = build_prompt(place="stair", features=["rope"])
    assert write(prompt)[0]["generated_text"].startswith(prompt)
    alone = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / ("adapter" if merge == "true" else "export")
    )
    assert alone.peft_config  # its base was found


def test_an_adapter_of_an_unconverted_base_says_whose_settings_it_writes_by(rooms, bases, tmp_path, capsys):
    finetune_here(**flags(rooms, bases, tmp_path / "run"), method="lora", max_steps=1, merge="false")
    assert "An adapter alone writes by its base's generation config" in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "export" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(bases / "ours")


def test_a_merge_that_a_kill_cut_short_or_that_comes_again_ends_as_it_should(rooms, bases, tmp_path):
    """The adapter was once moved onto the folder of an earlier one, which the system refuses."""
    run = tmp_path / "run"
    settings = {**flags(rooms, bases, run), "method": "lora", "eval_every_steps": 1}
    finetune_here(**settings, max_steps=2)
    whole = (run / "export" / "model.safetensors").read_bytes()
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "export")  # as a kill leaves it between moving the adapter and writing the whole
    finetune_here(**settings, max_steps=2)
    assert (run / "export" / "model.safetensors").read_bytes() == whole
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    finetune_here(**settings, max_steps=3, allow_change="true")  # goes on, and merges again
    assert (run / "export" / "model.safetensors").read_bytes() != whole and not is_adapter(run / "export")
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() != adapter
    assert (run / "export-previous-1" / "model.safetensors").read_bytes() == whole
    assert all(is_adapter(run / f"adapter-previous-{number}") for number in (1, 2))


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


def test_a_teacher_is_heard_in_its_own_precision(rooms, bases, tmp_path):
    settings = {"method": "distill", "teacher": bases / "bfloat16", "teacher_cache": tmp_path / "cache"}
    finetune_here(**flags(rooms, bases, tmp_path / "run"), **settings)
    told = json.loads((tmp_path / "run" / "finetuning.json").read_text())
    assert told["after"]["rooms"] < told["before"]["rooms"]
    states = [load_file(file)["states"] for file in (tmp_path / "cache").glob("*.safetensors")]
    assert states and {tensor.dtype for tensor in states} == {torch.bfloat16}


def test_rows_are_such_as_the_teacher_can_read(rooms, bases, tmp_path, capsys):
    """Only the student was asked once: a shorter teacher ended in an index error, and one that carries a
    state taught what other rooms of the row had told it."""
    fits = {"method": "distill", "max_steps": 1, "block_size": 128}
    for teacher, message in (
        ("short", ""),
        ("mamba", "A MambaForCausalLM would read one packed room in the next"),
    ):
        run = tmp_path / teacher
        finetune_here(**flags(rooms, bases, run), **fits, teacher=bases / teacher)
        assert (run / "export").exists() and message in capsys.readouterr().out
    with pytest.raises(SystemExit):
        finetune_here(
            **flags(rooms, bases, tmp_path / "packed"), **fits, teacher=bases / "mamba", packing="yes"
        )
    assert "--packing yes: a MambaForCausalLM would read" in " ".join(capsys.readouterr().err.split())
    long = tmp_path / "long.jsonl"
    long.write_text(
        "".join(json.dumps({**room(n), "description": f"rope {n} " * 20}) + "\n" for n in range(40))
    )
    with pytest.raises(SystemExit):
        finetune_here(**flags(rooms, bases, tmp_path / "long", data=long), **fits, teacher=bases / "short")
    assert re.search(
        r"longer than the context of 64 tokens .*teacher", " ".join(capsys.readouterr().err.split())
    )


def test_two_runs_may_fill_one_teacher_cache(bases, tmp_path):
    """Both once wrote a row under the same temporary name, and the second found it taken."""
    ids = torch.randint(0, 299, (1, 20))

    def distillation():
        teacher = GPTScratchForCausalLM.from_pretrained(bases / "teacher")
        return Distillation(teacher, vocabulary=300, share=0.5, temperature=2.0, cache=tmp_path)

    states = distillation().teacher_states({"input_ids": ids})
    (file,) = tmp_path.iterdir()
    file.rename(file.with_suffix(".tmp"))  # as another run has it that is about to rename it
    torch.testing.assert_close(distillation().teacher_states({"input_ids": ids}), states, rtol=0, atol=0)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".tmp"}
    start = threading.Barrier(4)

    def fill(objective):
        start.wait()
        for seed in range(5):
            rows = torch.randint(0, 299, (2, 20), generator=torch.Generator().manual_seed(seed))
            objective.teacher_states({"input_ids": rows})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fill, [distillation() for _ in range(4)]))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 + 10


# What cannot be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "distill", "teacher": "stranger"}, "has another vocabulary .* data.synthesize"),
        ({"method": "distill"}, "method distill needs a --teacher"),
        ({"teacher": "teacher"}, "--teacher and --teacher_cache are for --method distill, not full"),
        ({"base": "llama", "convert": "yes"}, "holds a model of type 'llama', and only stock GPT-2"),
        ({"base": "llama"}, "--dropout 0.1 is for GPT-2s"),
        ({"merge": "false"}, "--merge false is for --method lora; full has no adapter to export alone"),
        ({"base": "endless"}, "tokenizer has no end token"),
        ({"method": "lora", "lora_targets": "c_attn"}, "c_attn: no layer .* It has c_fc, c_proj, k_proj"),
        ({"base": "nowhere"}, "no model at --model .*Train the demo first"),
        (
            {"block_size": 16, "batch_tokens": 64},
            "40 of 40 train descriptions are longer than the context of 16",
        ),
        ({"n_layer": 3, "tokenizer": "x"}, "n_layer, tokenizer: decided by the base"),
        ({"columns": "text"}, "columns text: give OURS=THEIRS"),
        ({"columns": "seting=place"}, "--columns seting: no field is called so"),
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
    finetune_here(**flags(rooms, bases, run), method="lora", max_steps=2, merge="false")
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
