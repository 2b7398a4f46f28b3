"""FP8 where a device has it, and a clear word where it has not."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from transformers import AutoModelForCausalLM

from data.tokenizer import train_tokenizer
from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from training.checkpoint import Keep, TrainState, restore_checkpoint, save_checkpoint
from training.device import choose_precision, computes_in_fp8, fp8_recipe
from training.export import export_model
from training.objective import count_targets, language_modeling_loss
from training.optimizer import build_optimizer
from training.recipe import TrainSettings
from training.settings import SettingsError
from training.weights import named_weights


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
