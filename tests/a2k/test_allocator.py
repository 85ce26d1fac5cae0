import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import sys
import torch
from a2k import allocator

keep, size = getattr(allocator, sys.argv[1]), int(sys.argv[2])

def faults_of_a_map():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size >> 2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults_of_a_map()
default = faults_of_a_map()
keep()
# Small objects may take the end of a free place, which then is too small: aligned maps ask for more than they keep.
print(default, min(faults_of_a_map() for _ in range(40)))
"""


RESTART = """
import os
import sys
from a2k.allocator import restart_without_thread_caches

print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], flush=True)
restart_without_thread_caches()
print("once")
"""
of_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")


@of_glibc
@pytest.mark.parametrize(
    ("given", "tunables"),
    [
        (None, "glibc.malloc.tcache_count=0"),
        ("glibc.malloc.perturb=0", "glibc.malloc.perturb=0:glibc.malloc.tcache_count=0"),
    ],
)
def test_restart(monkeypatch, given, tunables):
    """As the same process, with the same arguments."""
    if given:
        monkeypatch.setenv("GLIBC_TUNABLES", given)
    else:
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    command = [sys.executable, "-c", RESTART, "train", "a b"]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    first, second, last = run.stdout.splitlines()
    pid = first.split()[0]
    assert first == f"{pid} {given} ['train', 'a b']"
    assert (second, last) == (f"{pid} {tunables} ['train', 'a b']", "once")


@of_glibc
@pytest.mark.parametrize(
    ("function", "size", "kept"),
    [
        ("keep_freed_memory", 128 << 20, True),
        ("keep_freed_tiles", 31 << 20, True),
        ("keep_freed_tiles", 128 << 20, False),
    ],
)
def test_freed_memory_is_kept(function, size, kept):
    """A map takes pages from the system anew every time, and where they are kept no more."""
    command = [sys.executable, "-c", SCRIPT, function, str(size)]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    before, after = map(int, run.stdout.split())
    assert (after < 0.1 * before) == kept
