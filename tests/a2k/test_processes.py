import subprocess
import sys

import pytest

from a2k.processes import KEPT_BETWEEN_PICTURES

SCRIPT = """
import resource
import sys
import torch
from a2k.processes import keep_freed_memory

most, size = map(int, sys.argv[1:])

def faults_of_a_map():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size >> 2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults_of_a_map()
default = faults_of_a_map()
keep_freed_memory(most)
print(default, min(faults_of_a_map() for _ in range(8)))  # small objects may take the start of a free place, at first
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
@pytest.mark.parametrize(("most", "size"), [(2**31 - 1, 512 << 20), (KEPT_BETWEEN_PICTURES, 128 << 20)])
def test_freed_memory_is_kept(most, size):
    """A map takes pages from the system anew every time, and then no more."""
    command = [sys.executable, "-c", SCRIPT, str(most), str(size)]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    default, kept = map(int, run.stdout.split())
    assert kept < 0.1 * default
