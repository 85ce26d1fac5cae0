import subprocess
import sys

import pytest
import torch
from tiny import files

from a2k.train_state import StateFiles


@pytest.mark.parametrize("keep", (1, 3))
def test_the_last_states_are_kept(tmp_path, keep):
    states = StateFiles(tmp_path, keep)
    for step in (5, 10, 15, 2000):
        states.save(step, {"step": step})
    names = [f"step_{step:08d}.pt" for step in (5, 10, 15, 2000)]
    assert files(tmp_path / "states") == names[-keep:]
    assert states.load({"step"})[0] == {"step": 2000}


def test_no_state_is_deleted_before_the_new_one_is_whole(tmp_path, monkeypatch):
    states = StateFiles(tmp_path, 1)
    states.save(5, {"step": 5})

    def fail(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left on device"):
        states.save(10, {"step": 10})
    assert files(tmp_path / "states") == ["step_00000005.pt"]
    assert states.load({"step"})[0] == {"step": 5}


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from a2k.train_state import StateFiles

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (0, 100, 5000, 100_000, 200_000, 361_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        StateFiles(Path(sys.argv[1]), 3).save(1, {"a": torch.rand(300, 300)})
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(error, flush=True)
"""


def test_a_full_disk_is_told(tmp_path):
    """Wherever in the state it is met; the limit on a file's size stands in for the disk."""
    process = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    path = tmp_path / "states" / "step_00000001.pt"
    expected = f"cannot write {path}: File too large; choose another path or make room"
    assert process.stdout.splitlines() == 6 * [expected]
    assert files(tmp_path) == []
