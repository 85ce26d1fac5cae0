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
