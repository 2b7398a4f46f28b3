"""Experiment trackers, each tried with its real package and without a network."""

import json
import sqlite3
import subprocess
import sys

import pytest
from training_toys import (
    ROOT,
    TOY_SETTINGS,
    as_flags,
    environment,
    metrics_of,
    run_training,
    train_here,
    write_toy_shards,
)

from training.settings import SettingsError
from training.trackers import check_trackers


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_toy_shards(tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_without_its_package_is_named_with_the_command_that_installs_it(name, monkeypatch):
    for package in (name, f"{name}X"):  # Accelerate takes tensorboardX as well
        monkeypatch.setitem(sys.modules, package, None)  # Python's own way to say: not there
    with pytest.raises(SettingsError, match=f"log_with: {name} not installed; `pip install {name}`"):
        check_trackers((name,))


def test_tensorboard_reads_back_what_the_metrics_say(shards, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    train_here(shards=shards, run_dir=run, log_with="tensorboard")
    (folder,) = {
        path.parent for path in run.rglob("events.out.tfevents.*") if path.parent.name == "gpt-scratch"
    }
    events = reader.EventAccumulator(str(folder)).Reload()
    lines = {line["step"]: line for line in metrics_of(run) if "loss" in line}
    assert [event.step for event in events.Scalars("loss")] == [3, 4, 6, 8, 9, 12]  # of logs and saves
    for tag in ("loss", "learning_rate", "gradient_norm"):
        for event in events.Scalars(tag):
            assert event.value == pytest.approx(lines[event.step][tag], rel=1e-6)  # stored as float32
    validations = {
        line["step"]: line["validation_loss"] for line in metrics_of(run) if "validation_loss" in line
    }
    assert {event.step: event.value for event in events.Scalars("validation_loss")} == pytest.approx(
        validations
    )


@pytest.mark.slow
def test_wandb_offline_leaves_its_files(shards, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for variable, value in {"WANDB_MODE": "offline", "WANDB_DIR": tmp_path, "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(variable, str(value))
    done = run_training(shards=shards, run_dir=tmp_path / "run", log_with="wandb")
    assert "The tracker" not in done.stdout and "could not start" not in done.stdout, done.stdout
    (log,) = tmp_path.rglob("run-*.wandb")
    content = log.read_bytes()
    assert b"gradient_norm" in content and b"validation_loss" in content


@pytest.mark.slow
def test_trackio_keeps_the_numbers_on_this_machine(shards, tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = tmp_path / "run"
    done = run_training(shards=shards, run_dir=run, log_with="trackio")
    assert "The tracker" not in done.stdout and "could not start" not in done.stdout, done.stdout
    (database,) = (tmp_path / "trackio").rglob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT step, metrics FROM metrics").fetchall()
    found = [(step, json.loads(metrics)) for step, metrics in rows]
    lines = {line["step"]: line for line in metrics_of(run) if "loss" in line}
    losses = {step: numbers["loss"] for step, numbers in found if "loss" in numbers}
    assert losses == {step: lines[step]["loss"] for step in (3, 4, 6, 8, 9, 12)}
    assert [step for step, numbers in found if "validation_loss" in numbers] == [6, 12]


@pytest.mark.slow
def test_a_tracker_that_cannot_start_takes_no_other_along(shards, tmp_path, monkeypatch):
    """W&B without a login; and the other one's last numbers were once never flushed."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("wandb")
    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    nobody = {
        "HOME": tmp_path,
        "NETRC": tmp_path / "none",
        "WANDB_DIR": tmp_path,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
    }
    for variable, value in nobody.items():
        monkeypatch.setenv(variable, str(value))
    run = tmp_path / "run"
    flags = as_flags({**TOY_SETTINGS, "shards": shards, "run_dir": run})
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_accelerate.py"), *flags, "--log_with", "wandb", "tensorboard"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0 and "log_with: wandb could not start" in done.stdout, (
        done.stdout + done.stderr
    )
    (folder,) = {
        path.parent for path in run.rglob("events.out.tfevents.*") if path.parent.name == "gpt-scratch"
    }
    assert reader.EventAccumulator(str(folder)).Reload().Scalars("loss")[-1].step == 12
