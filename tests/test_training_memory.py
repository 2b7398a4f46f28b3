"""Freed memory stays with the process on a CPU, so that a step does not fetch its pages anew."""

import platform
import subprocess
import sys
import threading

import pytest
from training_toys import environment

from training.checkpoint import BackgroundWriter

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
    faults = {}
    for keep in (True, False):
        command = [sys.executable, "-c", FAULTS.format(keep=keep)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
        faults[keep] = int(done.stdout)
    pages = 5 * 2 * 2**26 // 4096
    assert faults[True] < pages / 100
    # Larger pages than 4 KiB need fewer faults; without the setting there are many all the same.
    assert faults[False] > 20 * max(1, faults[True])


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
