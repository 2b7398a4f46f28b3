"""The folder of a run: what a start that was cut short leaves, and disks without room."""

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from training_toys import ROOT, ended, environment, free_port

from training.recipe import TrainSettings
from training.run_directory import RunDirectory
from training.settings import SettingsError, settings_as_yaml


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def opened(accelerator: Accelerator, path: Path, **settings) -> RunDirectory:
    return RunDirectory(accelerator, path, TrainSettings(**settings), "fingerprint", allow_change=False)


@contextmanager
def disk_with_room_for(size: int) -> Iterator[None]:
    """The kernel refuses to let a file of this process grow beyond `size`, as a full disk would."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


DATA = json.dumps({"data_fingerprint": "fingerprint"})
SETTINGS = settings_as_yaml(TrainSettings())
CUT_SHORT = [
    {".lock": "1 on here"},
    {".lock": "1 on here", ".data.json.tmp": DATA[:9]},
    {".lock": "1 on here", "data.json": DATA},
    {".lock": "1 on here", "data.json": DATA, ".settings.yaml.tmp": SETTINGS[:9]},
    {".lock": "1 on here", "data.json": DATA, "settings.yaml": SETTINGS},
    # The other order was an earlier version's.
    {".lock": "1 on here", ".settings.yaml.tmp": SETTINGS[:9]},
    {".lock": "1 on here", "settings.yaml": SETTINGS},
    {".lock": "1 on here", "settings.yaml": SETTINGS, ".data.json.tmp": DATA[:9]},
]


@pytest.mark.parametrize("left", CUT_SHORT, ids=lambda left: "+".join(left))
def test_a_start_that_was_cut_short_is_started_again(accelerator, tmp_path, left):
    """A kill, or a full disk, in the first milliseconds once made the folder unusable for ever."""
    for name, content in left.items():
        (tmp_path / name).write_text(content)
    opened(accelerator, tmp_path).begin(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "data.json", "settings.yaml"]
    assert json.loads((tmp_path / "data.json").read_text()) == {"data_fingerprint": "fingerprint"}


@pytest.mark.parametrize(
    "theirs", [{"data.json": "[1, 2]"}, {"data.json": DATA, "notes": ""}, {"settings.yaml": "a: 1"}]
)
def test_a_folder_with_files_of_others_is_refused_and_left_alone(accelerator, tmp_path, theirs):
    for name, content in theirs.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(SettingsError, match=r"choose another|run with other settings"):
        opened(accelerator, tmp_path)
    assert all((tmp_path / name).read_text() == content for name, content in theirs.items())


def test_a_run_without_its_data_file_is_asked_about(accelerator, tmp_path):
    run = opened(accelerator, tmp_path / "run")
    run.begin(0)
    run.append_metrics([{"step": 1}])
    run._lock.close()
    (tmp_path / "run" / "data.json").unlink()
    with pytest.raises(SettingsError, match=r"unknown, for data.json cannot be read"):
        opened(accelerator, tmp_path / "run")


@pytest.mark.parametrize("room", [0, 60, 300])
def test_a_full_disk_at_the_start_is_said_and_room_is_all_that_it_takes(accelerator, tmp_path, room):
    """At the lock, at the data, at the settings."""
    with disk_with_room_for(room), pytest.raises(SettingsError, match=r"make room .* and run it again"):
        opened(accelerator, tmp_path / "run").begin(0)
    opened(accelerator, tmp_path / "run").begin(0)
    assert (tmp_path / "run" / "settings.yaml").read_text() == SETTINGS


def test_a_start_that_fails_has_not_changed_the_settings(accelerator, tmp_path):
    """They were written before anybody knew whether the checkpoint fits them."""
    run = opened(accelerator, tmp_path / "run")
    run.begin(0)
    run._lock.close()
    changed = TrainSettings(n_embd=32, n_head=2)
    RunDirectory(accelerator, tmp_path / "run", changed, "fingerprint", allow_change=True)._lock.close()
    opened(accelerator, tmp_path / "run")


def test_a_full_disk_at_a_resume_is_said(accelerator, tmp_path):
    """Forgetting the lines of later steps writes the file anew; other processes once waited on in vain."""
    run = opened(accelerator, tmp_path / "run")
    run.begin(0)
    run.append_metrics([{"step": step, "loss": 1.0} for step in range(1, 1000)])
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with disk_with_room_for(len(SETTINGS) + 100), pytest.raises(SettingsError, match="make room"):
        run.begin(500)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    run.begin(500)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 500


def test_lines_without_room_are_written_at_the_end_or_said_to_be_lost(accelerator, tmp_path, capsys):
    run = opened(accelerator, tmp_path / "run")
    run.begin(0)
    path = tmp_path / "run" / "metrics.jsonl"
    with disk_with_room_for(5):
        run.append_metrics([{"step": 1}, {"step": 2}])
        run.close()
        assert f"2 lines of {path} found no room until the end" in capsys.readouterr().out
    run.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


TWO_PROCESSES = """
import sys
from accelerate import PartialState
from training.run_directory import on_main_process
from training.settings import SettingsError
state = PartialState(cpu=True)
def fail():
    raise OSError("no room")
assert on_main_process(state, lambda: state.process_index + 7) == 7
try:
    on_main_process(state, fail)
except SettingsError as error:
    assert state.process_index == 1 and "no room" in str(error)
except OSError:
    assert state.process_index == 0
else:
    sys.exit("nobody failed")
state.destroy_process_group()  # a thread of gloo's that outlives the interpreter aborts it, at times
"""


def test_what_the_main_process_finds_or_fails_of_is_every_processes(tmp_path):
    """An error that was no SettingsError once left the others waiting until their network gave up."""
    port, processes = str(free_port()), []
    for rank in ("0", "1"):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", TWO_PROCESSES]
        processes.append(
            subprocess.Popen(command, env={**environment(), **world}, cwd=ROOT, stderr=subprocess.PIPE)
        )
    with ended(processes):
        errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
