"""Memory that a training process keeps: in processes of their own, because it concerns a whole process."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from cobra.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(8):
    if step == 4:  # in the first, malloc finds places for blocks of this size
        before = faults()
    torch.ones(50_000_000)  # 200 MB, more than malloc ever keeps by itself
print(faults() - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_freed_memory_is_not_asked_for_again():
    """Pages that the system hands out, whatever their size, are what is saved; not a time."""
    assert faults("keep") * 10 < faults("give back")
