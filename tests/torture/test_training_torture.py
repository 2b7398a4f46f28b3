"""What the training run promises when something goes wrong, each promise tried for real."""

import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import faults
import pytest
import torch
from faults import PROCESSES, run
from promises import SAME, assert_like, finish, wait_until
from safetensors.torch import load_file
from training_toys import metrics_of, write_toy_shards

from training.checkpoint import MARKER, complete_checkpoints, latest_checkpoint

pytestmark = pytest.mark.slow

FILES_OF_A_CHECKPOINT = 13  # with the marker
SECOND_CHECKPOINT = range(FILES_OF_A_CHECKPOINT, 2 * FILES_OF_A_CHECKPOINT)

KILL = "`kill -9`"


@pytest.mark.fault(f"{KILL} in the middle of writing each file of a checkpoint", SAME)
@pytest.mark.parametrize("number", SECOND_CHECKPOINT)
def test_killed_while_a_file_of_a_checkpoint_is_written(undisturbed, settings, number):
    """Of the second checkpoint, so that there is one to go back to."""
    assert run(settings, faults.kill_in_file_write, number).code == -signal.SIGKILL
    assert list(complete_checkpoints(settings["run_dir"])) == [3]
    assert "Going on from step 3" in finish(settings).text
    assert_like(undisturbed, settings)


def test_a_checkpoint_has_as_many_files_as_are_killed(undisturbed):
    assert len(list(latest_checkpoint(undisturbed).iterdir())) == FILES_OF_A_CHECKPOINT


@pytest.mark.fault(f"{KILL} while a run directory is made", SAME)
@pytest.mark.parametrize("name", ["data.json", "settings.yaml"])
def test_killed_while_the_run_directory_is_made(undisturbed, settings, name):
    """What the first milliseconds leave was once taken for somebody else's folder, or for another run's."""
    assert run(settings, faults.kill_in_write_of, name).code == -signal.SIGKILL
    assert "A new run in" in finish(settings).text
    assert_like(undisturbed, settings)


@pytest.mark.fault(f"{KILL} during the first checkpoint of a run", SAME)
@pytest.mark.parametrize("fault", [(faults.kill_in_file_write, 9), (faults.kill_before_rename, 0)])
def test_killed_before_the_first_checkpoint(undisturbed, settings, fault):
    assert run(settings, *fault).code == -signal.SIGKILL
    assert "A new run in" in finish(settings).text
    assert_like(undisturbed, settings)


@pytest.mark.fault(f"{KILL} just before a checkpoint gets its name", SAME)
@pytest.mark.parametrize("number", [1, 2])
def test_killed_before_the_rename(undisturbed, settings, number):
    assert run(settings, faults.kill_before_rename, number).code == -signal.SIGKILL
    finish(settings)
    assert_like(undisturbed, settings)


@pytest.mark.fault(f"{KILL} at twenty random moments, from the start to the export, several in one run", SAME)
def test_killed_at_twenty_random_moments(undisturbed, settings, tmp_path):
    """Seeded; where in the run a moment falls is up to the machine, but the promise is for all of them: the
    same command takes up what a kill leaves, and a run ends by the kill or by itself, never with an error.
    """
    began = time.monotonic()
    assert run({**settings, "run_dir": tmp_path / "timed"}).code == 0
    usual_seconds = time.monotonic() - began
    randomness, kills, ends = random.Random(0), 0, 0
    while kills < 20:
        code = faults.run_killed_after(settings, randomness.uniform(0, usual_seconds))
        if code == 0:  # it came to its end before the kill: the next one is of a new run
            assert_like(undisturbed, settings)
            ends += 1
            settings = {**settings, "run_dir": tmp_path / f"run-{ends}"}
        else:
            assert code == -signal.SIGKILL
            kills += 1
    assert run(settings).code == 0
    assert_like(undisturbed, settings)


@pytest.mark.fault(
    "SIGTERM, SIGINT or SIGUSR1 in accumulation, update, validation, sampling or a checkpoint",
    f"the step is finished and saved, exit code 0, a line says how to go on; {SAME}",
)
@pytest.mark.parametrize("phase", ["accumulation", "update", "validation", "sampling", "checkpoint"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_in_each_phase(undisturbed, settings, phase, name):
    stopped = run(settings, faults.signal_in, phase, getattr(signal, name))
    assert stopped.code == 0, stopped.text
    assert "a signal asked for it. The same command goes on" in stopped.text
    assert not (settings["run_dir"] / "export").exists()
    finish(settings)
    assert_like(undisturbed, settings)


@pytest.mark.fault("SIGTERM before the first step or during the export", f"the process ends at once; {SAME}")
@pytest.mark.parametrize("phase", ["start", "export"])
def test_a_signal_when_there_is_no_step_to_finish(undisturbed, settings, phase):
    assert run(settings, faults.signal_in, phase).code == -signal.SIGTERM
    assert not (settings["run_dir"] / "export").exists()
    finish(settings)
    assert_like(undisturbed, settings)


@pytest.mark.fault(
    "the file STOP appears in the run directory",
    f"the step is finished and saved, a line says how to go on, and the file is removed; {SAME}",
)
def test_a_stop_file(undisturbed, settings):
    stopped = run(settings, faults.make_stop_file, 4, settings["run_dir"])
    assert stopped.code == 0 and "Stopped after step 5: the file STOP asked for it." in stopped.text
    assert not (settings["run_dir"] / "STOP").exists()
    assert "Going on from step 5" in finish(settings).text
    assert_like(undisturbed, settings)


@pytest.mark.fault(
    "`--max_minutes` is over",
    f"the step is finished and saved, exit code 0, a line says how to go on; {SAME}",
)
def test_the_time_is_over(undisturbed, settings):
    stopped = run({**settings, "max_minutes": 1e-9})
    assert stopped.code == 0
    assert "Stopped after step 1: max_minutes is over. The same command goes on from there." in stopped.text
    assert list(complete_checkpoints(settings["run_dir"])) == [1]
    assert "Going on from step 1" in finish(settings).text
    assert_like(undisturbed, settings)


@pytest.mark.fault(
    "an error that nobody foresaw, in accumulation, validation or sampling",
    f"metrics up to it are written, the checkpoint in flight is completed; {SAME}",
)
@pytest.mark.parametrize(
    ("phase", "last_step", "saved"),
    [("accumulation", 0, []), ("validation", 5, [3]), ("sampling", 5, [5])],
)
def test_an_unforeseen_error(undisturbed, settings, phase, last_step, saved):
    """A checkpoint due at the same step comes before the samples, and is whole although they fail."""
    both = {**settings, "save_every_steps": 5} if phase == "sampling" else settings
    failed = run({**both, "log_every_steps": 100}, faults.raise_in, phase)
    assert failed.code == 1 and "nobody foresaw this" in failed.text
    lines = metrics_of(settings["run_dir"]) if (settings["run_dir"] / "metrics.jsonl").exists() else []
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, last_step + 1))
    assert list(complete_checkpoints(settings["run_dir"])) == saved
    finish(settings)
    assert_like(undisturbed, settings)


@pytest.mark.fault(
    "one of two processes is killed",
    f"the other ends with an error instead of waiting for ever; {SAME}",
)
def test_one_of_two_processes_is_killed(shards, settings, tmp_path):
    reference = {**settings, "run_dir": tmp_path / "reference"}
    assert run(reference, processes=2).code == 0
    assert run(settings, faults.kill_one_of_two, processes=2).code != 0
    outcome = run(settings, processes=2)
    assert outcome.code == 0 and "Going on from step 3" in outcome.text
    assert_like(reference["run_dir"], settings)


@pytest.mark.fault("SIGTERM reaches one of two processes", f"both stop after the same step; {SAME}")
def test_a_signal_to_one_of_two_processes(shards, settings, tmp_path):
    reference = {**settings, "run_dir": tmp_path / "reference"}
    assert run(reference, processes=2).code == 0
    stopped = run(settings, faults.signal_in, "sampling", signal.SIGTERM, processes=2)
    assert stopped.code == 0 and stopped.text.count("Stopped after step") == 1, stopped.text
    assert run(settings, processes=2).code == 0
    assert_like(reference["run_dir"], settings)


@pytest.mark.fault(
    "the disk is full when the run directory is made",
    f"the run does not start; the error names the folder, the cause and the cure; then {SAME}",
)
@pytest.mark.parametrize("name", ["data.json", "settings.yaml"])
def test_a_full_disk_at_the_start(undisturbed, settings, name):
    refused = run(settings, faults.no_room_for, name)
    assert refused.code == 1 and "Traceback" not in refused.text, refused.text
    assert f"could not be written to {settings['run_dir']}: No space left" in refused.text
    assert "make room" in refused.text
    finish(settings)
    assert_like(undisturbed, settings)


@pytest.mark.fault(
    "the disk is full during a checkpoint, and has room again later",
    "a warning names cause and cure; training goes on and saves at the next occasion; the end is the same",
)
def test_a_full_disk_for_a_while(undisturbed, settings):
    outcome = run(settings, faults.disk_full, 2, 5)
    assert outcome.code == 0, outcome.text
    assert outcome.text.count("A checkpoint could not be written") == 1 and "make room" in outcome.text
    assert list(complete_checkpoints(settings["run_dir"])) == [6, 9, 10]
    assert_like(undisturbed, settings)


@pytest.mark.fault(
    "the disk is full and stays so",
    f"after three failures in a row the run ends with an error that names cause and cure; then {SAME}",
)
def test_a_full_disk_for_good(undisturbed, settings):
    outcome = run(settings, faults.disk_full, 4, 1000)
    assert outcome.code == 1
    assert "error: A checkpoint could not be written" in outcome.text and "make room" in outcome.text
    assert list(complete_checkpoints(settings["run_dir"])) == [3]
    finish(settings)
    assert_like(undisturbed, settings)


@pytest.mark.fault(
    "the disk is full in the middle of a line of metrics, and has room again later",
    "a warning names cause and cure; the line is written later, and none is lost or cut; the end is the same",
)
def test_a_disk_that_is_full_in_the_middle_of_a_line(undisturbed, settings):
    outcome = run({**settings, "log_every_steps": 1}, faults.no_room_for_metrics, 3, 5)
    assert outcome.code == 0, outcome.text
    assert outcome.text.count("Metrics could not be written") == 1 and "make room" in outcome.text
    assert_like(undisturbed, settings)


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for a run of the toy and no more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system; two tests above have a stand-in")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.fault(
    "the disk, a real one of 8 MB, has not a byte to spare while a checkpoint is due, and later has",
    "a warning names cause and cure; training goes on and saves at the next occasion; the end is the same",
)
def test_a_disk_without_a_byte_to_spare(undisturbed, settings, small_disk):
    settings["run_dir"] = small_disk / "run"
    outcome = run(settings, faults.fill_disk, 4, 7, small_disk)
    assert outcome.code == 0, outcome.text
    assert "A checkpoint could not be written" in outcome.text and "make room" in outcome.text
    assert list(complete_checkpoints(settings["run_dir"])) == [3, 9, 10]
    assert_like(undisturbed, settings)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "a bit flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.unlink()


DAMAGES = ["truncated", "a bit flipped", "emptied", "missing"]
DAMAGED_FILES = ["model.safetensors", "optimizer.safetensors", "training_state.json"]


@pytest.mark.fault(
    "the newest checkpoint is truncated, bit-flipped, emptied or lacks a file",
    f"it is set aside with a warning that names the file, and the one before it is used: {SAME}",
)
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("file", DAMAGED_FILES)
def test_a_damaged_checkpoint(undisturbed, settings, how, file):
    shutil.copytree(undisturbed, settings["run_dir"])
    shutil.rmtree(settings["run_dir"] / "export")
    damage(settings["run_dir"] / "checkpoints" / "step-0000010" / file, how)
    outcome = finish(settings)
    assert f"step-0000010 is damaged: {file}" in outcome.text and "Going on from step 9" in outcome.text
    assert (settings["run_dir"] / "checkpoints" / "step-0000010.damaged").exists()
    assert_like(undisturbed, settings)


@pytest.mark.fault(
    "the newest checkpoint's marker is missing or unreadable",
    f"it is not used but set aside with a warning: {SAME}",
)
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_marker(undisturbed, settings, how):
    shutil.copytree(undisturbed, settings["run_dir"])
    damage(settings["run_dir"] / "checkpoints" / "step-0000010" / MARKER, how)
    outcome = run(settings)
    assert outcome.code == 0, outcome.text
    assert any(f"step-0000010.{why}" in outcome.text for why in ("incomplete", "damaged"))
    assert "Going on from step 9" in outcome.text
    assert_like(undisturbed, settings)


@pytest.mark.fault("all checkpoints are damaged", f"all are set aside, and training starts again: {SAME}")
def test_nothing_but_damaged_checkpoints(undisturbed, settings):
    shutil.copytree(undisturbed, settings["run_dir"])
    shutil.rmtree(settings["run_dir"] / "export")
    for folder in complete_checkpoints(settings["run_dir"]).values():
        damage(folder / "model.safetensors", "truncated")
    assert finish(settings).text.count("Set aside") == 4
    assert_like(undisturbed, settings)


@pytest.mark.fault(
    "the shards are others than when the run began",
    f"refused: the error says that the data changed, and how to go on or start anew; then {SAME}",
)
def test_changed_shards(undisturbed, settings, tmp_path):
    shutil.copytree(undisturbed, settings["run_dir"])
    outcome = run({**settings, "shards": write_toy_shards(tmp_path / "other", seed=1)})
    assert outcome.code == 1 and "training data: " in outcome.text and "--allow_change" in outcome.text
    assert "another --run_dir" in outcome.text
    shutil.rmtree(settings["run_dir"] / "export")
    shutil.rmtree(latest_checkpoint(settings["run_dir"]))
    assert "Going on from step 9" in finish(settings).text  # with the shards that it began with
    assert_like(undisturbed, settings)


BAD_STATE = (
    "a step that is not finite changes nothing, no checkpoint of it is kept, after max_skipped_steps (or at "
    f"the next validation) the run ends with an error that names step, data and cure; {SAME}"
)


@pytest.mark.fault("a NaN in the weights", BAD_STATE)
@pytest.mark.parametrize("step", [5, 6])
def test_nan_in_the_weights(undisturbed, settings, step):
    outcome = run({**settings, "max_skipped_steps": 3}, faults.spoil_weights, step)
    assert outcome.code == 1 and "lower the learning rate" in outcome.text, outcome.text
    if step == 5:
        assert "A checkpoint was refused: transformer.wte.weight holds values that" in outcome.text
    else:
        assert "were not finite in 3 steps in a row, the last being step 9" in outcome.text
        assert "train-00000.arrow, documents " in outcome.text
    assert f"Going on from step {step // 3 * 3}" in finish(settings, max_skipped_steps=3).text
    assert_like(undisturbed, settings)


@pytest.mark.fault("a NaN in the optimizer's state", BAD_STATE)
@pytest.mark.parametrize("step", [4, 5])
def test_nan_in_the_optimizer_state(undisturbed, settings, step):
    """Before step 6 the spoiled update is what the checkpoint of step 6 would have saved."""
    outcome = run({**settings, "max_skipped_steps": 3}, faults.spoil_optimizer_state, step)
    assert outcome.code == 1 and "not finite" in outcome.text, outcome.text
    assert list(complete_checkpoints(settings["run_dir"])) == [3]
    finish(settings, max_skipped_steps=3)
    assert_like(undisturbed, settings)


@pytest.mark.fault(
    "a NaN in a gradient, once",
    "that update is skipped and counted: weights, moments and step counts stay, and training goes on",
)
def test_nan_in_a_gradient(settings):
    outcome = run({**settings, "save_every_steps": 1}, faults.spoil_gradient, 5)
    assert outcome.code == 0 and "step 6: loss or gradients were not finite" in outcome.text
    before, after, later = (settings["run_dir"] / "checkpoints" / f"step-000000{step}" for step in (5, 6, 7))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (before / name).read_bytes() == (after / name).read_bytes() != (later / name).read_bytes()
    assert (
        json.loads((latest_checkpoint(settings["run_dir"]) / "training_state.json").read_text())[
            "skipped_steps"
        ]
        == 1
    )
    assert [line["step"] for line in metrics_of(settings["run_dir"]) if line.get("skipped")] == [6]
    assert all(torch.isfinite(tensor).all() for tensor in load_file(later / "model.safetensors").values())


@pytest.mark.fault(
    "the wall clock jumps by days", "nothing: times are measured by a clock that does not jump"
)
def test_a_clock_that_jumps(undisturbed, settings):
    outcome = run({**settings, "max_minutes": 60, "save_every_minutes": 60}, faults.jumping_clock)
    assert outcome.code == 0
    lines = [json.loads(line) for line in (settings["run_dir"] / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["elapsed_seconds"] < 120 for line in lines if "elapsed_seconds" in line)
    assert_like(undisturbed, settings)


@pytest.mark.fault(
    "a second run is started in the same directory",
    "it is refused and names the first one's process; the first is not disturbed",
)
def test_two_runs_in_one_directory(undisturbed, settings, tmp_path):
    flag = settings["run_dir"] / "waiting"
    fault = (faults.wait_while_file_exists, 5, str(flag))
    first = PROCESSES.Process(target=faults.train, args=(settings, fault, {}, str(tmp_path / "first.log")))
    first.start()
    try:
        wait_until(lambda: flag.exists() or not first.is_alive(), (tmp_path / "first.log").read_text)
        assert first.is_alive(), (tmp_path / "first.log").read_text()
        second = run(settings)
        is_using = f"another run is using {settings['run_dir']} (process {first.pid}"
        assert second.code == 1 and is_using in second.text
        flag.unlink()
        first.join(60)
        assert first.exitcode == 0
    finally:
        first.kill()
    assert_like(undisturbed, settings)


@pytest.mark.fault(
    "the run directory cannot be written",
    f"the run does not start; the error names the folder, the cause and the cure; then {SAME}",
)
def test_an_unwritable_run_directory(undisturbed, settings):
    """The folder is its owner's alone, and the run is somebody else's: root may write anywhere."""
    with tempfile.TemporaryDirectory() as temporary:
        os.chmod(temporary, 0o755)  # pytest's folders can only be entered by their owner
        readable = shutil.copytree(settings["shards"], Path(temporary, "shards"))
        locked = Path(temporary, "runs")
        locked.mkdir(mode=0o555)
        settings = {**settings, "shards": readable, "run_dir": locked / "run"}
        refused = run(settings, faults.become_nobody)
        assert refused.code == 1 and "Traceback" not in refused.text, refused.text
        assert f"could not be written to {locked / 'run'}: Permission denied" in refused.text
        assert "make the folder writable or choose another --run_dir" in refused.text
        locked.chmod(0o755)
        finish(settings)
        assert_like(undisturbed, settings)


@pytest.mark.fault(
    "a tracker raises", "it is left out with a warning, and training goes on as if it were not there"
)
def test_a_tracker_that_raises(undisturbed, settings):
    outcome = run(settings, faults.raising_tracker)
    assert outcome.code == 0 and "The tracker gone failed and is left out: ConnectionError" in outcome.text
    assert_like(undisturbed, settings)
