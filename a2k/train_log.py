"""What a training run says of itself: log.jsonl, the same numbers for TensorBoard, and a plot of the losses."""

import json
import math
from pathlib import Path

from a2k.checkpoint import write_atomically

LOSSES = ("pixel", "hint", "global", "local", "content", "sharpness", "identity")
VALIDATION = ("validation_style", "validation_content")


class TrainLog:
    """Goes on with the log of a run after `step`: later lines, of a run that was killed, are dropped.

    TensorBoard's files go to tensorboard/ where the package tensorboard is installed.
    """

    def __init__(self, run: Path, step: int) -> None:
        self.file = run / "log.jsonl"
        trim_log(self.file, step)
        self.lines = open(self.file, "a", buffering=1)  # noqa: SIM115 - closed by close()
        self.board = open_tensorboard(run / "tensorboard", step)

    def write(self, entry: dict[str, float | int | None]) -> None:
        self.lines.write(json.dumps(entry) + "\n")
        if self.board:
            for name, value in entry.items():
                if name != "step" and value is not None:
                    self.board.add_scalar(f"loss/{name}" if name in LOSSES else name, value, entry["step"])

    def close(self) -> None:
        self.lines.close()
        if self.board:
            self.board.close()


def open_tensorboard(folder: Path, step: int):
    """A SummaryWriter that hides what was written after `step`, or None where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def trim_log(log_file: Path, step: int) -> None:
    """Keep the whole entries up to that step: a run that was killed has logged more than it saved."""
    if log_file.exists():
        lines = [line for line in log_file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = "".join(line for line in lines if json.loads(line)["step"] <= step)
        write_atomically(log_file, lambda path: Path(path).write_text(kept))


def significant(value: float) -> float:
    """Rounded to nine digits, which tell any two float32 numbers apart."""
    return float(f"{value:.9g}")


def describe(entry: dict[str, float | int | None]) -> str:
    return " ".join(f"{name} {entry[name]:.3g}" for name in LOSSES if entry.get(name) is not None)


def plot_losses(log_file: Path, target: Path) -> None:
    """Plot every loss of a log.jsonl against the step, smoothed; needs matplotlib (the `train` extra)."""
    from matplotlib.figure import Figure

    entries = [json.loads(line) for line in log_file.read_text().splitlines()]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in (*LOSSES, *VALIDATION):
        points = [(e["step"], e[name]) for e in entries if e.get(name) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            style = {"marker": "."} if name in VALIDATION else {}
            axes.plot(steps, values if name in VALIDATION else smooth(values), label=name.replace("_", " "), **style)
    axes.set(xlabel="step", ylabel="loss (weight 1)", yscale="log", title="Running mean of 50 steps")
    if entries:
        axes.legend()
    axes.grid(alpha=0.3)
    write_atomically(target, lambda path: figure.savefig(path, format="png", dpi=110))


def smooth(values: tuple[float, ...], window: int = 50) -> list[float]:
    """Mean of the last `window` values at every place."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + (value if math.isfinite(value) else 0.0))
    return [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]
