"""How long a run is that has tokens, money or minutes: it ends in time, with its learning rate come down."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from training_toys import as_flags, metrics_of, train_here, write_toy_shards

from training.budget import RunLength
from training.checkpoint import TrainState
from training.interruption import STARTED
from training.recipe import TrainSettings
from training.schedule import schedule_at
from training.settings import SettingsError, parse_settings
from training.throughput import Machine, TimeSpent

# A dollar a second.
MACHINE = Machine("a device", 1, 1e12, "", 1e6, price_per_hour_usd=3600.0)
MONEY = {"price_per_gpu_hour_usd": 3600.0, "max_steps": 10**6}
MINUTES = {"fit_schedule": True, "max_steps": 10**6}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_toy_shards(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Course:
    """The loop as the length of a run sees it, on a clock of its own.

    `step_seconds(step)` is what a step takes, `validation_seconds` a validation.
    """

    def __init__(self, accelerator, run_dir, settings, step_seconds, validation_seconds=0.0, state=None):
        self.now = STARTED
        self.state = state or TrainState(None, None)
        self.length = RunLength(accelerator, run_dir, settings, MACHINE, self.state, clock=lambda: self.now)
        self._settings, self._step_seconds, self._validation = settings, step_seconds, validation_seconds
        self.parts: list[float] = []  # of the highest rate, by step
        self.said: dict[int, str] = {}
        self.grown: dict[int, int] = {}  # step -> to which length
        self.spent: dict[str, TimeSpent] = {}

    def go(self, steps: int = 10**9) -> "Course":
        state, last = self.state, self.state.step + steps
        while state.step < self.length.max_steps and state.step < last:
            self.parts.append(schedule_at(state.step, self.length.settings))
            self._take("training", self._step_seconds(state.step))
            state.step += 1
            if self.length.is_due(state):
                before, said = self.length.max_steps, self.length.fit(state, self.spent)
                self.grown |= {state.step: self.length.max_steps} if self.length.max_steps > before else {}
                self.said |= {state.step: said} if said else {}
            is_last = state.step >= self.length.max_steps
            if self._validation and (is_last or state.step % self._settings.eval_every_steps == 0):
                self._take("validation", self._validation)
                state.validation_step = state.step
        return self

    def _take(self, activity: str, seconds: float) -> None:
        self.now += seconds
        self.state.elapsed_seconds += seconds
        self.spent.setdefault(activity, TimeSpent()).add(seconds)

    @property
    def seconds(self) -> float:
        return self.now - STARTED


def test_a_budget_of_tokens_is_the_runs_length_and_its_schedules(shards, tmp_path, capsys):
    train_here(shards=shards, run_dir=tmp_path / "run", max_steps=500, budget_tokens=9 * 256 + 100)
    steps = [line for line in metrics_of(tmp_path / "run") if "loss" in line]
    assert len(steps) == 9 and steps[-1]["tokens"] == 9 * 256
    assert steps[-1]["learning_rate"] == pytest.approx(0.05 * 3e-3)
    assert "9 steps of 256 tokens" in capsys.readouterr().out
    train_here(shards=shards, run_dir=tmp_path / "run", max_steps=500, budget_tokens=9 * 256 + 100)
    assert "is complete (9 steps)" in capsys.readouterr().out


@pytest.mark.parametrize("log_every_steps", [1, 20, 1000])
def test_a_length_is_fitted_however_seldom_the_run_logs(shards, tmp_path, capsys, log_every_steps):
    """With logs every 20 steps or more the first fit once divided by a time of zero.

    A million dollars at a dollar an hour pay for all steps, so that nothing hangs on the machine's speed.
    """
    budget = {"price_per_gpu_hour_usd": 1, "budget_usd": 10**6, "max_steps": 24}
    train_here(shards=shards, run_dir=tmp_path / "run", log_every_steps=log_every_steps, **budget)
    length = json.loads((tmp_path / "run" / "length.json").read_text())
    assert length["max_steps"] == 24 and length["step"] == 20
    assert "the run will have 24 steps" in capsys.readouterr().out
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()


def slower_from(step: int, factor: float):
    return lambda at: 0.1 * (factor if at >= step else 1.0)


@pytest.mark.parametrize("budget", [MONEY | {"budget_usd": 120.0}, MINUTES | {"max_minutes": 2.0}])
@pytest.mark.parametrize("schedule", ["cosine", "trapezoidal"])
@pytest.mark.parametrize(
    "step_seconds, validation_seconds",
    [
        (slower_from(0, 1), 0.0),
        (slower_from(0, 1), 3.0),  # a quarter of the time
        (slower_from(0, 1), 15.0),  # the last one alone takes an eighth of all the time
        (slower_from(10, 1.5), 0.0),
        (slower_from(500, 2), 3.0),
        (slower_from(700, 2), 0.0),
        (slower_from(1000, 1.3), 0.0),
        (slower_from(1100, 5), 0.0),
        (lambda step: 0.1 + 0.03 * (step % 7 == 0), 1.0),
    ],
)
def test_a_fitted_run_ends_in_time_with_its_rate_come_down(
    accelerator, tmp_path, budget, schedule, step_seconds, validation_seconds
):
    """Also where the machine slows down late: its time was once over before its cooldown was."""
    every = 100 if validation_seconds < 10 else 300
    settings = TrainSettings(
        **budget, schedule=schedule, warmup_steps=50, eval_every_steps=every, save_every_steps=100
    )
    course = Course(accelerator, tmp_path, settings, step_seconds, validation_seconds).go()
    assert not any("spent" in said for said in course.said.values()), course.said
    assert course.parts[-1] == pytest.approx(settings.final_learning_rate_ratio)
    assert 0.9 * 120 < course.seconds < 120
    # From half-way on, more or less, it only comes down.
    assert all(step < 0.7 * length for step, length in course.grown.items())
    last = max([*course.grown, settings.warmup_steps])
    assert all(late <= early for early, late in pairwise(course.parts[last:]))


def test_the_first_steps_which_compile_are_no_part_of_the_rate(accelerator, tmp_path):
    settings = TrainSettings(**MONEY, budget_usd=100.0, save_every_steps=10)
    course = Course(accelerator, tmp_path, settings, lambda step: 0.1 if step > 2 else 5.0).go(20)
    assert course.length.max_steps == pytest.approx(20 + (97 - 16.7) / 0.1, abs=1)


def test_a_machine_that_stands_still_ends_the_run_at_once_and_in_order(accelerator, tmp_path):
    settings = TrainSettings(**MONEY, budget_usd=100.0, save_every_steps=10)
    course = Course(accelerator, tmp_path, settings, lambda step: 0.1 if step != 600 else 1000.0).go()
    assert course.state.step == 601 == course.length.max_steps
    assert course.said[601] == "The budget is spent: this step is the last."


def test_what_is_fitted_into_minutes_does_not_stop_and_other_minutes_do(accelerator, tmp_path):
    """Both once looked at the same limit, and a run that was to end with its export stopped without."""

    def minutes(**settings) -> float:
        settings = TrainSettings(max_minutes=3.0, **settings)
        return RunLength(accelerator, tmp_path, settings, MACHINE, TrainState(None, None)).stop_minutes

    assert minutes(fit_schedule=True) == 0.0 and minutes() == 3.0


def test_a_run_whose_minutes_are_over_is_finished_and_exported(shards, tmp_path, capsys):
    """This process is older than the minutes that the run is given: the first step is the last."""
    run = tmp_path / "run"
    train_here(shards=shards, run_dir=run, max_minutes=1e-9, fit_schedule="true", save_every_steps=1)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "finished" and events[-1]["step"] == 1
    assert (run / "export" / "model.safetensors").exists()
    assert "Stopped" not in capsys.readouterr().out


def test_a_fitted_length_outlives_the_process(accelerator, tmp_path):
    settings = TrainSettings(**MONEY, budget_usd=10.02, save_every_steps=5)
    first = Course(accelerator, tmp_path, settings, lambda step: 0.1).go(30)
    # 8.02 seconds are left after step 20, of which three hundredths of 10.02 are kept: 77 steps more.
    assert first.length.max_steps == 97 and first.length.settings.warmup_steps == 24
    assert list(first.said) == [20]
    # On a machine of twice the speed it keeps its length; on a slower one it shrinks into what is left.
    again = Course(accelerator, tmp_path, settings, lambda step: 0.05, state=first.state)
    assert again.length.max_steps == 97 and again.length.settings == first.length.settings
    again.go(30)
    assert again.length.max_steps == 97 and not again.said
    slow = Course(accelerator, tmp_path, settings, lambda step: 0.2, state=again.state).go()
    assert 80 < slow.state.step < 97 and slow.state.elapsed_seconds < 10.02


def test_a_length_that_grew_is_resumed_with_the_warm_up_that_it_had(accelerator, tmp_path):
    """It was once the longer run's own again, and the resumed run's rate not the unbroken one's."""
    budget = {**MONEY, "budget_usd": 100.0, "warmup_steps": 200}
    settings = TrainSettings(**budget, eval_every_steps=50, save_every_steps=10)
    seconds = {"step_seconds": lambda step: 0.2 if step < 20 else 0.05}
    first = Course(accelerator, tmp_path, settings, **seconds, validation_seconds=0.1).go(120)
    assert first.grown and first.length.settings.warmup_steps < 200
    again = Course(accelerator, tmp_path, settings, **seconds, state=first.state)
    assert again.length.settings == first.length.settings


def test_tokens_and_money_together_end_where_the_first_of_them_does(accelerator, tmp_path):
    settings = TrainSettings(
        **MONEY, budget_usd=1e6, budget_tokens=524_288 * 40, save_every_steps=5, warmup_steps=2
    )
    assert Course(accelerator, tmp_path, settings, lambda step: 0.1).go().state.step == 40


def test_money_that_does_not_reach_the_first_checkpoint_is_refused(accelerator, tmp_path):
    settings = TrainSettings(budget_usd=10.02, price_per_gpu_hour_usd=3600.0, save_every_steps=1000)
    course = Course(accelerator, tmp_path, settings, lambda step: 0.1)
    with pytest.raises(
        SettingsError, match=r"pays for 97 steps.*save_every_steps=1,000.*10.3 times the budget"
    ):
        course.go(30)


def test_what_a_kill_undid_was_paid_for_all_the_same(shards, tmp_path):
    """A run on a machine that is taken away often: each start once forgot what came after its checkpoint."""
    run = tmp_path / "run"
    train_here(shards=shards, run_dir=run, max_steps=4)
    # A kill before the first log of the next start leaves an event, a later one lines of metrics as well.
    with open(run / "events.jsonl", "a") as file:
        file.write('{"event": "resumed", "unix_time": 1.7e9, "step": 4, "elapsed_seconds": 2000}\n')
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "tokens": 1792, "loss": 1.0, "elapsed_seconds": 3000}\n')
    train_here(shards=shards, run_dir=run, max_steps=8, allow_change="true")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    elapsed = {line["step"]: line["elapsed_seconds"] for line in lines if "loss" in line}
    assert elapsed[4] < 2000 and 3000 < elapsed[8] < 4000


@pytest.mark.parametrize("cut", ["", '{"event": "loss_spi'])
def test_a_line_that_a_crash_cut_off_does_not_swallow_the_next(shards, tmp_path, cut):
    """Metrics, samples and events are appended to: what came next once stood on the same line."""
    run = tmp_path / "run"
    train_here(shards=shards, run_dir=run, max_steps=4)
    names = ("metrics.jsonl", "samples.jsonl", "events.jsonl")
    for name in names:
        whole = Path(run, name).read_text()
        Path(run, name).write_text(whole + cut if cut else whole.rstrip("\n"))
    train_here(shards=shards, run_dir=run, max_steps=8, allow_change="true")
    metrics, samples, events = (
        [json.loads(line) for line in Path(run, name).read_text().splitlines()] for name in names
    )
    assert [line["step"] for line in metrics if "loss" in line] == list(range(1, 9))
    assert [line["step"] for line in metrics if "validation_loss" in line] == [4, 6, 8]
    assert {line["step"] for line in samples} == {4, 8}
    assert [event["event"] for event in events] == ["started", "finished", "resumed", "finished"]


def test_budgets_that_make_no_sense_are_refused_all_at_once():
    def complaints(**settings) -> str:
        with pytest.raises(SettingsError) as caught:
            parse_settings(TrainSettings, as_flags(settings))
        return str(caught.value)

    assert "--price_per_gpu_hour_usd must be at least 0, is -1.0" in complaints(price_per_gpu_hour_usd=-1)
    text = complaints(budget_tokens=1_000_000, budget_usd=5, fit_schedule="true")
    assert (
        "are 1 steps of 524,288, fewer than save_every_steps=5,000" in text
        and "--save_every_steps 1 or" in text
    )
    assert "budget_usd needs price_per_gpu_hour_usd" in text and "fit_schedule needs max_minutes" in text
