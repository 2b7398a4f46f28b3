"""The average of the weights, and the schedule that holds its rate."""

import copy
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from training.averaging import WeightAverage
from training.optimizer import build_optimizer
from training.recipe import TrainSettings
from training.schedule import learning_rate_at


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train_a_little(accelerator, decay, optimizer_name, steps=4):
    torch.manual_seed(0)
    model = GPTScratchForCausalLM(GPTScratchConfig.preset("tiny", vocab_size=64))
    settings = TrainSettings(optimizer=optimizer_name, learning_rate=1e-2)
    model, optimizer = accelerator.prepare(model, build_optimizer(model, settings))
    average = WeightAverage(accelerator, model, optimizer, decay)
    history = []
    for step in range(1, steps + 1):
        ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(step)
        history.append(copy.deepcopy(model.state_dict()))
    return model, optimizer, average, history


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
def test_the_average_is_that_of_the_weights_after_each_step(accelerator, optimizer_name):
    model, _, average, history = train_a_little(accelerator, 0.5, optimizer_name)
    expected = {name: tensor.double() for name, tensor in history[0].items()}
    for step, weights in enumerate(history[1:], start=2):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = {n: decay * expected[n] + (1 - decay) * weights[n].double() for n in expected}
    inside = average.use(lambda: copy.deepcopy(model.state_dict()))
    for name, tensor in inside.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-7)  # float32 sums
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, history[-1][name]), f"{name} did not come back"


def test_weights_come_back_when_an_evaluation_fails(accelerator):
    model, _, average, history = train_a_little(accelerator, 0.9, "adamw")

    def fail():
        raise RuntimeError("the evaluation failed")

    with pytest.raises(RuntimeError):
        average.use(fail)
    assert all(torch.equal(tensor, history[-1][name]) for name, tensor in model.state_dict().items())


def test_averaging_changes_no_weight(accelerator):
    with_average, without = (train_a_little(accelerator, decay, "adamw")[3][-1] for decay in (0.9, 0.0))
    assert all(torch.equal(with_average[name], without[name]) for name in without)


def test_without_a_decay_nothing_is_kept_and_nothing_called(accelerator):
    _, optimizer, average, _ = train_a_little(accelerator, 0.0, "adamw")
    assert average.use(lambda: pytest.fail("called")) is None
    assert all(kinds.keys() == {"step", "exp_avg", "exp_avg_sq"} for kinds in optimizer.state.values())


def test_nothing_to_average_yet_is_no_error(accelerator):
    """On devices where a first step that is not finite leaves no optimizer's state."""
    model = GPTScratchForCausalLM(GPTScratchConfig.preset("tiny", vocab_size=64))
    model, optimizer = accelerator.prepare(model, build_optimizer(model, TrainSettings()))
    average = WeightAverage(accelerator, model, optimizer, 0.9)
    average.update(1)
    before = copy.deepcopy(model.state_dict())
    average.use(lambda: None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_trapezoidal_rate_stays_up_and_comes_down_linearly():
    settings = TrainSettings(
        schedule="trapezoidal",
        learning_rate=1.0,
        warmup_steps=10,
        max_steps=101,
        cooldown_ratio=0.5,
        final_learning_rate_ratio=0.1,
    )
    rates = [learning_rate_at(step, settings) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert set(rates[10:51]) == {1.0}
    assert rates[75] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    falls = [early - late for early, late in pairwise(rates[50:])]
    assert falls == pytest.approx([0.9 / 50] * 50)
