"""The parts of a step, each alone: rate, decay, counting, the guard."""

import json
import math
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from training import objective
from training.budget import RunLength
from training.checkpoint import TrainState
from training.guard import SPIKE_WINDOW_STEPS, SpikeWatch, StepGuard
from training.journal import Journal
from training.objective import count_targets, language_modeling_loss, send, to_device
from training.optimizer import build_optimizer
from training.recipe import TrainSettings
from training.run_directory import RunDirectory
from training.schedule import learning_rate_at
from training.start import _align
from training.throughput import describe_machine
from training.trackers import Trackers


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def toy_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=61, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


def test_the_rate_rises_linearly_and_ends_at_its_final_part():
    settings = TrainSettings(learning_rate=1.0, final_learning_rate_ratio=0.1, warmup_steps=10, max_steps=110)
    rates = [learning_rate_at(step, settings) for step in range(110)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0 and rates[109] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in pairwise(rates[9:]))
    middle = 10 + 99 // 2
    assert rates[middle] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (middle - 10) / 99)))
    no_warmup = TrainSettings(learning_rate=1.0, warmup_steps=0, max_steps=1)
    assert learning_rate_at(0, no_warmup) == 1.0


def test_matrices_decay_and_vectors_do_not():
    model = toy_gpt2()
    decayed, kept = build_optimizer(model, TrainSettings(weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.dim() >= 2 for p in decayed["params"])
    assert kept["weight_decay"] == 0.0 and all(p.dim() < 2 for p in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def test_the_first_label_of_a_row_and_masked_ones_are_no_targets():
    labels = torch.tensor([[1, 2, 3, 4], [-100, 5, -100, 6], [-100, -100, -100, -100]])
    assert count_targets({"labels": labels}).item() == 3 + 2 + 0


def test_two_half_batches_take_the_same_step_as_one_whole_batch():
    """Also when one half has many more targets than the other: a mean of means would weigh them alike."""
    torch.manual_seed(1)
    input_ids = torch.randint(61, (4, 16))
    labels = input_ids.clone()
    labels[:2, 3:] = -100
    whole, halves = toy_gpt2(), toy_gpt2()
    batch = {"input_ids": input_ids, "labels": labels}
    language_modeling_loss(whole, batch, count_targets(batch)).backward()
    for half in (slice(0, 2), slice(2, 4)):
        part = {name: tensor[half] for name, tensor in batch.items()}
        language_modeling_loss(halves, part, count_targets(batch)).backward()
    for one, other in zip(whole.parameters(), halves.parameters(), strict=True):
        # Sums in another order, in float32.
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("skips", ["device", "host"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_step_leaves_weights_moments_and_counts_alone(accelerator, where, skips, monkeypatch):
    """On MPS the fused optimizer ignores the flag: the host must skip, as here for a CPU like that."""
    if skips == "host":
        monkeypatch.setattr("training.guard.DEVICES_THAT_SKIP", ())
    model = nn.Linear(3, 2)
    optimizer = accelerator.prepare(build_optimizer(model, TrainSettings()))
    guard = StepGuard(accelerator.device)

    def step(spoil: bool) -> float:
        loss = model(torch.ones(1, 3)).square().sum()
        loss.backward()
        norm = torch.tensor(1.0)
        if spoil and where == "gradient":
            model.weight.grad[0, 0] = float("nan")
            norm = torch.tensor(float("nan"))
        if spoil and where == "loss":
            loss = loss * float("inf")
        skipped = guard.check(optimizer, loss.detach(), norm)
        optimizer.step()
        optimizer.zero_grad()
        return skipped.item()

    def everything() -> list[torch.Tensor]:
        states = optimizer.optimizer.state
        moments = [value for p in model.parameters() for value in states[p].values()]
        return [tensor.detach().clone() for tensor in [*model.parameters(), *moments]]

    assert step(spoil=False) == 0.0
    before = everything()
    assert step(spoil=True) == 1.0 and step(spoil=True) == 1.0
    assert all(torch.equal(one, other) for one, other in zip(before, everything(), strict=True))
    assert guard.read() == (2, 2)
    assert step(spoil=False) == 0.0
    assert not torch.equal(before[0], model.weight)
    assert guard.read() == (2, 0)


@pytest.mark.parametrize("where", ["loss", "norm"])
def test_fp16_skips_what_only_the_loss_or_the_norm_shows(accelerator, where):
    """The scaler looks at gradients alone, and under FSDP2 at this process's: the step was counted as skipped
    and taken. A CPU has the scaler too.
    """
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model = nn.Linear(3, 2)
    optimizer = accelerator.prepare(build_optimizer(model, TrainSettings()))
    guard = StepGuard(accelerator.device)

    def step(loss: float, norm: float) -> None:
        accelerator.scaler.scale(model(torch.ones(1, 3)).square().sum()).backward()
        accelerator.scaler.unscale_(optimizer.optimizer)
        guard.check(optimizer, torch.tensor(loss), torch.tensor(norm))
        optimizer.step()
        optimizer.zero_grad()

    step(1.0, 1.0)
    before = model.weight.detach().clone()
    step(*((math.inf, 1.0) if where == "loss" else (1.0, math.inf)))
    assert torch.equal(before, model.weight) and guard.read() == (1, 1)
    assert accelerator.scaler.get_scale() == 512.0
    step(1.0, 1.0)
    assert not torch.equal(before, model.weight) and guard.read() == (1, 0)


def test_tokens_are_counted_exactly_beside_a_loss_of_few_digits(accelerator, tmp_path):
    """They were once cast to the loss's type: 12,345 in bfloat16 is 12,352, and the error added up."""
    settings = TrainSettings(run_dir=str(tmp_path))
    run = RunDirectory(accelerator, tmp_path, settings, "", allow_change=False)
    machine = describe_machine(accelerator, settings, toy_gpt2())
    state = TrainState(nn.Linear(1, 1), None)
    guard, length = StepGuard(accelerator.device), RunLength(accelerator, tmp_path, settings, machine, state)
    journal = Journal(accelerator, run, guard, state, settings, lambda first, rows: "", machine, length)
    loss, tokens = torch.tensor(2.875, dtype=torch.bfloat16), torch.tensor(2**24 + 1)
    for state.step in (1, 2):
        journal.add(state, 0.1, loss, torch.tensor(1.0), torch.tensor(0.0), tokens, loss[None])
    journal.flush(state)
    journal.close()
    assert state.tokens == 2 * (2**24 + 1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["loss"], line["tokens"]) for line in lines] == [(2.875, 2**24 + 1), (2.875, 2**25 + 2)]


def test_a_tensor_under_two_names_is_sent_once(monkeypatch):
    """As labels that nobody masked are the inputs."""
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(objective, "send", lambda tensor, device: sent.append(tensor) or send(tensor, device))
    input_ids, mask = torch.ones(2, 3, dtype=torch.int64), torch.zeros(2, 3)
    batch = {"input_ids": input_ids, "labels": input_ids, "attention_mask": mask}
    there = to_device(batch, torch.device("meta"))
    assert len(sent) == 2 and there["input_ids"] is there["labels"] is not there["attention_mask"]
    assert list(there) == list(batch) and all(tensor.is_meta for tensor in there.values())


@pytest.mark.parametrize(
    ("rows_before", "batch_tokens", "rows_after"), [(0, 256, 24), (24, 256, 24), (24, 512, 24), (25, 512, 28)]
)
def test_the_data_goes_on_at_the_next_whole_micro_batch(
    accelerator, capsys, rows_before, batch_tokens, rows_after
):
    """Where another batch was read before; a checkpoint that has not counted rows has read its batches."""
    settings = TrainSettings(block_size=32, micro_batch_size=4, batch_tokens=batch_tokens)
    state = TrainState(nn.Linear(1, 1), None, step=3, rows=rows_before)
    _align(accelerator, settings, state)
    assert state.rows == rows_after
    assert ("the data goes on 3 rows further" in capsys.readouterr().out) == (rows_before == 25)


def test_a_spike_is_far_above_the_last_losses_and_does_not_hide_the_next():
    usual = [3.0 + 0.01 * math.sin(step) for step in range(SPIKE_WINDOW_STEPS)]
    watch = SpikeWatch()
    # Before there are enough losses to compare with, as in the steep beginning of a run, nothing stands out.
    assert not any(watch.is_spike(loss) for loss in [11.0, *usual])
    assert not watch.is_spike(3.02)
    assert watch.is_spike(3.5)
    assert watch.is_spike(3.5)
    assert not watch.is_spike(2.0)  # a fall is none


def test_a_tracker_that_cannot_start_is_left_out_with_a_warning(accelerator):
    """wandb without a login raises when it starts; a run once ended because of it."""

    class LoggedOut(GeneralTracker):
        name, requires_logging_directory, tracker = "logged-out", False, None

        def start(self):
            raise RuntimeError("no login")

        def log(self, values, step=None):
            raise AssertionError("it never started")

    accelerator.log_with = [LoggedOut()]
    warnings: list[str] = []
    trackers = Trackers(accelerator, {"seed": 1}, warn=warnings.append)
    trackers.log({"loss": 1.0}, step=1)
    trackers.close()
    assert len(warnings) == 1 and "logged-out could not start" in warnings[0] and "no login" in warnings[0]
