"""What a training run writes to go on later: its states, of which it keeps the last few, and the names of its files."""

import json
from pathlib import Path

import torch

from a2k.checkpoint import WeightsError, write_atomically
from a2k.convert import read_file
from a2k.files import TEMPORARY
from a2k.train_options import TrainingError


class StateFiles:
    """States of a run, states/step_00001000.pt; the last `keep` of them are kept.

    A new state is whole on the disk before an old one is deleted, so a full disk loses nothing.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self.folder, self.keep = run / "states", keep

    def all(self) -> list[Path]:
        """From the first to the last."""
        return sorted(self.folder.glob("step_*.pt"))

    def delete_halves(self) -> None:
        """What a run that was killed while it saved has left; no other run writes here."""
        for half in self.folder.glob("*".join(TEMPORARY)):
            half.unlink(missing_ok=True)

    def save(self, step: int, state: dict) -> None:
        def write(temporary: str) -> None:
            with open(temporary, "wb") as file:
                try:
                    torch.save(state, file)
                except RuntimeError as error:
                    if isinstance(error.__context__, OSError):  # as of a full disk, which torch then hides
                        raise error.__context__ from None
                    raise

        write_atomically(self.folder / f"step_{step:08d}.pt", write)
        for old in self.all()[: -self.keep]:
            old.unlink(missing_ok=True)

    def load(self, keys: set[str]) -> tuple[dict, Path]:
        """The last state and its file. Raises TrainingError if it is damaged or lacks a key."""
        *earlier, path = self.all()
        remedy = "delete it to go on from the one before" if earlier else "delete it and leave out --resume"
        try:
            state = read_file(path, "state")
        except WeightsError as error:
            reason = str(error).rsplit("; get ", 1)[0]  # a state is nowhere to be got
            raise TrainingError(f"{reason}; {remedy}") from None
        if not keys <= state.keys():
            raise TrainingError(f"{path} is not the state of a training; {remedy}")
        return state, path


def list_file(run: Path, kind: str) -> Path:
    """Where the run keeps the names of its files of one kind, as they were when it began."""
    return run / f"{kind}_files.json"


def write_json(value: object, target: Path) -> None:
    write_atomically(target, lambda path: Path(path).write_text(json.dumps(value, indent=2) + "\n"))


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Of PyTorch's generators. Data do not draw from them, see `a2k.data.PairDataset`."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
