import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from a2k.processes import keep_freed_memory

def faults_of_a_map():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 25)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults_of_a_map()
default = faults_of_a_map()
keep_freed_memory()
print(default, min(faults_of_a_map() for _ in range(8)))  # small objects may take the start of a free place, at first
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_kept():
    """A map of 128 MiB takes pages from the system anew every time, and then no more."""
    run = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True, timeout=120)
    default, kept = map(int, run.stdout.split())
    assert kept < 0.1 * default
