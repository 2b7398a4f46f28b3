"""How much memory there is; and that freed memory stays with a process, which need not fetch it anew."""

import platform
import subprocess
import sys
import threading

import psutil
import pytest
import torch
from training_toys import environment

from training import memory
from training.checkpoint import BackgroundWriter

CPU = torch.device("cpu")

FAULTS = """
import resource, torch
from training.device import keep_freed_memory
if {keep}: keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
tensors = lambda: [torch.ones(2**24) for _ in range(2)]  # 64 MiB each
for _ in range(3): tensors()
before = faults()
for _ in range(5): tensors()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told to")
def test_tensors_of_a_later_step_find_their_pages_already_there():
    def faults(keep: bool) -> int:
        command = [sys.executable, "-c", FAULTS.format(keep=keep)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
        return int(done.stdout)

    pages = 5 * 2 * 2**26 // 4096
    # A system short of memory may take pages back in between: one of a few tries is the allocator's.
    kept = next((few for _ in range(5) if (few := faults(keep=True)) < pages / 100), None)
    assert kept is not None
    # Larger pages than 4 KiB need fewer faults; without the setting there are many all the same.
    assert faults(keep=False) > 20 * max(1, kept)


def test_the_thread_that_writes_a_checkpoint_ends_with_it():
    """While it stayed, its OpenMP threads kept training's from spinning: a third of the speed was gone."""
    writer = BackgroundWriter(warn=print)
    for _ in range(2):
        writer.start(lambda: None)
        writer.settle()
        for thread in threading.enumerate():
            if thread.name.startswith("checkpoint"):
                thread.join(60)
                assert not thread.is_alive()
    writer.close()


def test_this_process_has_taken_memory_and_may_have_what_it_has():
    """Its peak is not compared with what is there now: a peak may lie back, and neighbours come since."""
    now = psutil.Process().memory_info().rss
    assert memory.peak_memory(CPU) >= 0.99 * now  # the kernel's two counts of it are a little apart
    assert memory.peak_without_proc() >= 0.99 * now
    assert memory.available_memory(CPU) > 0.99 * now


@pytest.mark.parametrize(
    "own, limits",
    [
        ("0::/", {"memory.max": "4000000"}),
        # A cluster's job has a group of its own; its steps, in others within, have no limit again.
        ("0::/job_7/step_0", {"job_7/memory.max": "4000000", "job_7/step_0/memory.max": "max"}),
        # A container does not see the folder that is its root.
        ("0::/docker/ab12", {"memory.max": "4000000"}),
        ("3:cpu:/x\n9:memory:/job_7", {"memory/job_7/memory.limit_in_bytes": "4000000"}),
    ],
)
def test_the_processes_of_a_job_share_the_limit_of_its_control_group(tmp_path, monkeypatch, own, limits):
    """Each process once had all of the limit, and only the outermost group was looked at. Files as Linux has
    them, elsewhere."""
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")
    for name, text in {"own": own, **limits}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    for processes in (1, 4):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert memory.available_memory(CPU) == 4_000_000 / processes
