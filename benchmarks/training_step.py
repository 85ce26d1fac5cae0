"""One training step of the published network, as published and as `a2k train` takes it: `make training-step`.

Time, peak memory and losses, of processes of their own that take turns.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import published
import torch
from torch import Tensor, nn

from a2k import StyA2K
from a2k.allocator import keep_freed_memory, restart_without_thread_caches
from a2k.encoder import Encoder
from a2k.model import CONFIGS, init_kaiming
from a2k.train_losses import TrainingLosses
from a2k.train_options import RECIPES

ARRANGEMENTS = ("published", "float32", "bfloat16")


@dataclass(frozen=True)
class Measurement:
    """Seconds of a step, peak memory of process or GPU, and the losses of every step: [[global, local], ...]."""

    arrangement: str
    seconds: float
    megabytes: float
    losses: list[list[float]]


def network(device: str) -> tuple[StyA2K, Encoder]:
    """The published network and the perceptual one, whose random weights keep the size of the features."""
    torch.manual_seed(0)
    model = StyA2K(CONFIGS["vgg19"])
    for module in (model.encoder, model.decoder):
        module.apply(init_kaiming)
    nn.init.dirac_(model.encoder.input.weight)
    perceptual = Encoder("vgg19", model.config.channels).requires_grad_(False)
    perceptual.load_state_dict(model.encoder.state_dict())
    return model.to(device), perceptual.to(device)


def losses_of(arrangement: str, device: str) -> tuple[StyA2K, Callable[[Tensor, Tensor], dict[str, Tensor]]]:
    """The network, and the losses of a batch of photos and paintings."""
    model, perceptual = network(device)
    if arrangement == "published":
        return model, lambda content, style: published.training_losses(model, content, style)
    keep_freed_memory()
    for module in (model, perceptual):
        module.to(memory_format=torch.channels_last)
    return model, TrainingLosses(model, perceptual, RECIPES["vgg19"], dtype=getattr(torch, arrangement))


class Training:
    """Steps on one batch of noise."""

    def __init__(self, arrangement: str, crop: int, batch_size: int, device: str) -> None:
        self.model, self.losses = losses_of(arrangement, device)
        generator = torch.Generator().manual_seed(1)
        pairs = (torch.rand((batch_size, 3, crop, crop), generator=generator) for _ in range(2))
        layout = torch.contiguous_format if arrangement == "published" else torch.channels_last
        self.batch = [x.to(device, memory_format=layout) for x in pairs]
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=RECIPES["vgg19"].lr)

    def step(self) -> list[float]:
        """One step; returns the two losses."""
        losses = self.losses(*self.batch)
        self.optimizer.zero_grad()
        losses["total"].backward()
        nn.utils.clip_grad_norm_(self.parameters, RECIPES["vgg19"].clip)
        self.optimizer.step()
        return [losses[name].item() for name in ("global", "local")]


def measure(arrangement: str, crop: int, batch_size: int, steps: int, device: str = "cpu") -> Measurement:
    """In this process. The first step, which sets up, is not timed."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    training, losses, seconds = Training(arrangement, crop, batch_size, device), [], []
    for _ in range(1 + steps):
        started = time.perf_counter()
        losses.append(training.step())  # numbers, so a GPU has done its work
        seconds.append(time.perf_counter() - started)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e6
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # kilobytes, on Linux
    return Measurement(arrangement, min(seconds[1:]), peak, losses)


def measure_apart(arrangement: str, crop: int, batch_size: int, steps: int) -> Measurement:
    """measure() in a process of its own."""
    command = [sys.executable, __file__, "--one", arrangement, f"--crop={crop}", f"--batch-size={batch_size}"]
    run = subprocess.run([*command, f"--steps={steps}"], check=True, stdout=subprocess.PIPE, text=True)
    return Measurement(**json.loads(run.stdout))


def table(found: dict[str, list[Measurement]]) -> str:
    """A row per arrangement, in brackets beside the published one.

    Losses are the first step's: later ones drift apart, as Adam steps by the sign of gradients that are all rounding.
    """
    base = found["published"]
    seconds = {name: statistics.median(x.seconds for x in several) for name, several in found.items()}
    megabytes = {name: max(x.megabytes for x in several) for name, several in found.items()}
    lines = [
        "| | a step | peak memory | global, local loss | difference |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, several in found.items():
        first = several[0].losses[0]
        difference = max(abs(a / b - 1) for a, b in zip(first, base[0].losses[0], strict=True))
        ratio = f" ({seconds['published'] / seconds[name]:.2f}x)", f" ({megabytes[name] / megabytes['published']:.2f}x)"
        lines.append(
            f"| {name} | {seconds[name]:.2f} s{ratio[0]} | {megabytes[name] / 1e3:.2f} GB{ratio[1]} | "
            f"{', '.join(f'{x:.5g}' for x in first)} | {difference:.1e} |"
        )
    return "\n".join(lines)


def gpu_table(crop: int = 256, batch_size: int = 4, steps: int = 5, device: str = "cuda") -> str:
    """`table` of measurements in this process, for `make gpu-check`."""
    options = {"crop": crop, "batch_size": batch_size, "steps": steps, "device": device}
    try:
        return table({x: [measure(x, **options)] for x in ARRANGEMENTS})
    except torch.cuda.OutOfMemoryError:
        return "out of memory"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="timed, of every process; the fastest counts")
    parser.add_argument(
        "--rounds", type=int, default=1, help="processes of every arrangement, of which the median counts"
    )
    parser.add_argument("--one", choices=ARRANGEMENTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    options = (arguments.crop, arguments.batch_size, arguments.steps)
    if arguments.one:
        if arguments.one != "published":
            restart_without_thread_caches()  # as `a2k train` does
        print(json.dumps(asdict(measure(arguments.one, *options))))
        return
    found = {name: [] for name in ARRANGEMENTS}
    for _ in range(arguments.rounds):
        for name, several in found.items():
            several.append(measure_apart(name, *options))
    print(table(found))


if __name__ == "__main__":
    main()
