"""Precision and compilation are what the device can do; FP8 where it has it, a clear word where not."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from transformers import AutoModelForCausalLM

from data.tokenizer import train_tokenizer
from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from training import device as training_device
from training.checkpoint import Keep, TrainState, restore_checkpoint, save_checkpoint
from training.device import (
    COMPILE_MINIMUM_FLOPS,
    choose_compilation,
    choose_precision,
    computes_in_fp8,
    fp8_recipe,
    start_accelerator,
)
from training.export import export_model
from training.objective import count_targets, language_modeling_loss
from training.optimizer import build_optimizer
from training.recipe import TrainSettings
from training.settings import SettingsError
from training.sharding import prepare
from training.weights import bare_model, named_weights


@pytest.fixture
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def toy_model() -> GPTScratchForCausalLM:
    torch.manual_seed(0)
    return GPTScratchForCausalLM(
        GPTScratchConfig(vocab_size=320, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    )


def take_steps(accelerator: Accelerator, count: int) -> tuple[TrainState, list[float]]:
    """The state after `count` steps on one batch, and their losses."""
    model = toy_model()
    settings = TrainSettings(learning_rate=3e-3)
    model, optimizer = accelerator.prepare(model, build_optimizer(model, settings))
    input_ids = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": input_ids, "labels": input_ids}
    losses = []
    for _ in range(count):
        loss = language_modeling_loss(model.train(), batch, count_targets(batch))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return TrainState(model, optimizer, step=count), losses


CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))


@pytest.mark.parametrize(
    ("device", "has_bfloat16", "precision"),
    [
        (CPU, True, "bf16"),
        (CPU, False, "no"),
        (CUDA, True, "bf16"),
        (CUDA, False, "fp16"),
        (MPS, True, "no"),
    ],
)
def test_the_precision_is_what_the_device_has_in_hardware(monkeypatch, device, has_bfloat16, precision):
    monkeypatch.setattr(training_device, "cpu_has_bfloat16", lambda: has_bfloat16)
    capability = (8, 0) if has_bfloat16 else (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert choose_precision(device, "auto").value == precision
    assert choose_precision(device, "no").value == "no"


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(SettingsError, match="fp16 is for GPUs"):
        choose_precision(CPU, "fp16")


LONG = TrainSettings(n_layer=12, n_embd=768, batch_tokens=2**19, max_steps=1000)
SHORT = TrainSettings(n_layer=1, n_embd=64, batch_tokens=2**10, max_steps=10)


@pytest.fixture
def compilers(tmp_path, monkeypatch):
    """Makes a PATH on which there are these compilers and no others."""

    def only(*names: str) -> None:
        for name in names:
            (tmp_path / name).touch(mode=0o755)

    for variable in ("CC", "CXX", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(training_device.sys, "platform", "linux")
    return only


def test_long_runs_are_compiled_on_cpus_and_gpus(compilers):
    compilers("g++", "gcc")
    assert max(COMPILE_MINIMUM_FLOPS.values()) < 72 * 12 * 768**2 * 2**19 * 1000
    for device in (CPU, CUDA):
        assert choose_compilation(device, LONG).value == "whole"
        assert choose_compilation(device, SHORT).value == "none"
    assert choose_compilation(MPS, LONG).value == "none"
    for asked in ("none", "regional", "whole"):
        assert choose_compilation(CPU, replace(SHORT, compile=asked)).value == asked


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("compile", ["none", "regional", "whole"])
def test_a_prepared_model_names_its_embedding_and_its_head(compile):
    """Compiled by blocks without FSDP2 it once named none, and the first HellaSwag score ended the run."""
    settings = TrainSettings(mixed_precision="no", compile=compile, cpu_threads=1)
    accelerator, _ = start_accelerator(settings)
    given = toy_model()
    model, _ = prepare(accelerator, given, build_optimizer(given, settings))
    for found in (given, bare_model(accelerator, model)):
        assert found.get_input_embeddings().weight is found.get_output_embeddings().weight


def test_the_compiler_that_is_looked_for_is_the_one_that_will_be_called(compilers, monkeypatch):
    """With gcc but no g++ a long run on a CPU once died at its first step."""
    compilers("gcc", "cc")
    choice = choose_compilation(CPU, LONG)
    assert choice.value == "none" and choice.reason == "this machine has no C++ compiler (g++)"
    choice = choose_compilation(CPU, replace(LONG, compile="whole"))
    assert choice.value == "none" and choice.reason.startswith(
        "it was asked for, but this machine has no C++"
    )
    assert choose_compilation(CUDA, LONG).value == "whole"
    monkeypatch.setenv("CXX", "my-c++")
    monkeypatch.setenv("CC", "my-cc")
    assert "(my-c++)" in choose_compilation(CPU, LONG).reason
    assert "no C compiler (my-cc)" in choose_compilation(CUDA, LONG).reason
    compilers("my-c++", "my-cc")
    assert choose_compilation(CPU, LONG).value == choose_compilation(CUDA, LONG).value == "whole"


def test_a_sharded_model_is_compiled_block_by_block(compilers, monkeypatch):
    """See tests/test_training_sharding.py for what became of one that was compiled whole."""
    compilers("g++", "gcc")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert choose_compilation(CUDA, LONG).value == "regional"
    choice = choose_compilation(CUDA, replace(LONG, compile="whole"))
    assert choice.value == "regional" and "not whole as asked" in choice.reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine's GPU may well have FP8")
def test_fp8_without_the_hardware_is_refused_and_says_what_to_choose():
    with pytest.raises(SettingsError) as caught:
        choose_precision(torch.device("cpu"), "fp8")
    assert "compute capability 8.9" in str(caught.value) and "CPU" in str(caught.value)
    assert f"Choose {choose_precision(torch.device('cpu'), 'auto').value}, or auto" in str(caught.value)


def test_every_layer_of_the_blocks_computes_in_fp8_and_the_head_does_not():
    linear = {name: m for name, m in toy_model().named_modules() if isinstance(m, nn.Linear)}
    chosen = [name for name, module in linear.items() if computes_in_fp8(module, name)]
    assert set(linear) - set(chosen) == {"lm_head"} and len(chosen) == 2 * 6
    assert not computes_in_fp8(nn.Linear(32, 24), "odd") and not computes_in_fp8(nn.Linear(24, 32), "odd")
    assert not computes_in_fp8(nn.Embedding(32, 32), "wte")


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao.float8", reason="FP8 computes with torchao")


def test_the_fp8_recipe_converts_layers_that_train_and_save_like_others(tmp_path, torchao, fresh_accelerate):
    """Emulated: rounded to FP8 as the hardware does, multiplied in another type."""
    _, usual = take_steps(Accelerator(cpu=True), 8)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="fp8", kwargs_handlers=[fp8_recipe(emulate=True)])
    state, losses = take_steps(accelerator, 8)
    converted = [name for name, m in state.model.named_modules() if type(m).__name__ == "Float8Linear"]
    assert len(converted) == 2 * 6 and "lm_head" not in converted
    # Three bits of mantissa: close, yet not the same, or nothing was rounded.
    assert losses == pytest.approx(usual, rel=0.05) and losses != pytest.approx(usual, rel=1e-5)
    assert losses[-1] < losses[0] - 0.5

    folder = save_checkpoint(accelerator, tmp_path, state, keep=Keep())
    again, _ = take_steps(accelerator, 1)
    restore_checkpoint(accelerator, folder, again)
    for name, weight in named_weights(state.model).items():
        assert torch.equal(weight, named_weights(again.model)[name]), name


def test_an_fp8_run_exports_ordinary_layers(tmp_path, torchao, fresh_accelerate):
    accelerator = Accelerator(cpu=True, mixed_precision="fp8", kwargs_handlers=[fp8_recipe(emulate=True)])
    state, _ = take_steps(accelerator, 1)
    tokenizer = train_tokenizer(["the dungeon is deep"] * 20, 270)
    export_model(accelerator, state.model, tokenizer, tmp_path / "export")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert {type(m) for m in exported.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    weight = named_weights(state.model)["transformer.h.1.attn.o_proj.weight"]
    assert torch.equal(exported.state_dict()["transformer.h.1.attn.o_proj.weight"], weight)
