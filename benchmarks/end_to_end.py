"""Time and peak memory of the whole network against size, into docs/performance.md (`make performance`).

Every figure comes from a process of its own. Networks of the published shape have random weights; pictures are noise.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from a2k.cli import prepare_process

ROOT = Path(__file__).parents[1]
ARRANGEMENTS = ("published", "float32", "bfloat16", "styled")
LARGEST_PUBLISHED = 1024  # one score tensor of a 2048 px picture would take 32 GiB
LARGEST = {"published": LARGEST_PUBLISHED, "float32": 4096, "bfloat16": 2048, "styled": 8192}
SIZES = (256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Measurement:
    """Seconds for one picture, style included, and the process's peak memory.

    floor: seconds that the operations would take at the rate of one convolution, measured in the same process.
    """

    arrangement: str
    size: int
    style_size: int
    seconds: float
    megabytes: float
    floor: float


def network(arrangement: str, device: str = "cpu"):
    """A function (content, style) that redraws the content, and one (size, style size) that counts its operations."""
    import published

    from a2k import StyA2K
    from a2k.inference import CompiledStyA2K, FusedStyA2K
    from a2k.model import CONFIGS, init_kaiming

    torch.manual_seed(0)
    model = StyA2K(CONFIGS["styled" if arrangement == "styled" else "vgg19"]).eval().requires_grad_(False)
    model.encoder.apply(init_kaiming)
    model.decoder.apply(init_kaiming)
    model.to(device, torch.bfloat16 if arrangement == "bfloat16" else torch.float32)
    if arrangement == "compiled":
        fused = CompiledStyA2K(model.to(memory_format=torch.channels_last))
    else:
        fused = FusedStyA2K(model)

    def redraw(content: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        return fused.stylize(content, fused.encode_style(style))

    def work(size: int, style_size: int) -> int:
        return fused.work((style_size, style_size)) + fused.work((size, size), fused.encode_style(picture(style_size)))

    if arrangement == "published":
        return lambda content, style: published.stya2k(model, content, style), work
    return redraw, work


def layer_run(arrangement: str, channels: int, side: int, device: str = "cpu"):
    """A function that applies one A2K module to a content and a style of that side, and its operations."""
    import published

    from a2k import A2K
    from a2k.inference import FusedA2K, Statistics

    torch.manual_seed(0)
    module = A2K(channels).to(device).requires_grad_(False)
    content, style = torch.randn(2, 1, channels, side, side, device=device).relu()
    if arrangement == "published":
        return lambda: published.a2k_layer(module, content, style), None
    content, style = (x.contiguous(memory_format=torch.channels_last) for x in (content, style))
    fused = FusedA2K(module)

    def keys():
        statistics = Statistics()
        statistics.add(style)
        return fused.style_keys(style, statistics)

    def run() -> torch.Tensor:
        statistics, out = Statistics(), content.clone(memory_format=torch.channels_last)
        statistics.add(content)
        for _ in fused.redraw(out, statistics, keys(), 1.0):
            pass
        return out

    projections = 4 * channels**2 * side**2  # of the style, to keys and values
    return run, fused.flops((side, side), keys()) + projections


def picture(size: int, device: str = "cpu") -> torch.Tensor:
    """uint8 noise, laid out as a decoded picture is."""
    pixels = torch.randint(256, (1, size, size, 3), generator=torch.Generator().manual_seed(size), dtype=torch.uint8)
    return pixels.permute(0, 3, 1, 2).to(device)


def measure(arrangement: str, size: int, style_size: int) -> Measurement:
    """In this process: the faster of two runs, the second one left out for large pictures."""
    if arrangement != "published":
        prepare_process()  # as `a2k stylize` does
    (run, work), content, style = network(arrangement), picture(size), picture(style_size)
    rate = convolution_rate(torch.bfloat16 if arrangement == "bfloat16" else torch.float32)
    if arrangement == "published":
        content, style = content.float().div(255).contiguous(), style.float().div(255).contiguous()
    seconds = []
    with torch.inference_mode():
        for _ in range(2 if size <= 1024 else 1):
            started = time.perf_counter()
            run(content, style)
            seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # kilobytes, on Linux
    return Measurement(arrangement, size, style_size, min(seconds), peak, work(size, style_size) / rate)


STAGES = {  # of FusedStyA2K, by functions of `a2k.inference` and methods of its classes
    "FusedStyA2K._encode": "encoder",
    "FusedA2K.style_keys": "style's keys",
    "project": "queries",
    "attend_aggregates": "distributed attention",
    "progressive_attention": "progressive attention",
    "add_projected": "results' projections",
    "FusedDecoder.run": "decoder",
    "FusedStyledDecoder.run": "decoder",
}
STAGES_SIZE = 1024


def stage_seconds(arrangement: str, size: int) -> dict[str, float]:
    """Seconds of the stages of one picture, its style included, in this process, by the second of two runs."""
    from a2k import inference

    prepare_process()
    (run, _), content, style = network(arrangement), picture(size), picture(size)
    spent, inside = {}, []

    def timed(stage: str, function):
        def call(*args, **options):
            if inside:  # a part of another stage
                return function(*args, **options)
            inside.append(stage)
            started = time.perf_counter()
            result = function(*args, **options)
            spent[stage] = spent.get(stage, 0.0) + time.perf_counter() - started
            inside.clear()
            return result

        return call

    for place, stage in STAGES.items():
        owner, _, name = place.rpartition(".")
        owner = getattr(inference, owner) if owner else inference
        setattr(owner, name, timed(stage, getattr(owner, name)))
    with torch.inference_mode():
        for _ in range(2):
            spent.clear()
            run(content, style)
    return spent


def stage_table() -> str:
    """Seconds of every stage at STAGES_SIZE, a row per stage, a column per arrangement of ours."""
    columns = {}
    for arrangement in ARRANGEMENTS[1:]:
        command = [sys.executable, __file__, "--stages", arrangement]
        columns[arrangement] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    lines = [f"| {STAGES_SIZE} px, seconds | {' | '.join(columns)} |", "| --- | ---: | ---: | ---: |"]
    for stage in dict.fromkeys(STAGES.values()):
        lines.append(f"| {stage} | {' | '.join(f'{spent[stage]:.2f}' for spent in columns.values())} |")
    return "\n".join(lines)


LAYERS = {
    "relu3_1, 256 px": (256, 64),
    "relu3_1, 512 px": (256, 128),
    "relu3_1, 1024 px": (256, 256),
    "relu4_1, 512 px": (512, 64),
    "relu4_1, 1024 px": (512, 128),
}


def layer_table() -> str:
    """One A2K module, style included, in this process: medians of turns, and the floor as for `Measurement`."""
    rate = convolution_rate(torch.float32)
    lines = ["| A2K module | published | float32 | floor |", "| --- | ---: | ---: | ---: |"]
    for name, shape in LAYERS.items():
        (published, _), (ours, flops) = (layer_run(arrangement, *shape) for arrangement in ("published", "float32"))
        seconds = {published: [], ours: []}
        with torch.inference_mode():
            for _ in range(4):
                for function, found in seconds.items():
                    started = time.perf_counter()
                    function()
                    found.append(time.perf_counter() - started)
        base, time_of_ours = (statistics.median(found[1:]) for found in seconds.values())  # the first sets up
        cells = f"{base * 1e3:.0f} ms", f"{time_of_ours * 1e3:.0f} ms ({base / time_of_ours:.1f}x)"
        lines.append(f"| {name} | {' | '.join(cells)} | {flops / rate * 1e3:.0f} ms |")
    return "\n".join(lines)


COMPILED_SIZE = 384


def compiled_seconds() -> str:
    """Of one picture, its style included, with torch.compile and without."""
    compiled, ours = (measure_apart(x, COMPILED_SIZE, COMPILED_SIZE).seconds for x in ("compiled", "float32"))
    return f"{compiled:.2f} s with it and {ours:.2f} s without"


def convolution_rate(dtype: torch.dtype) -> float:
    """Operations per second of a 3x3 convolution of 256 channels."""
    x, weight = torch.randn(1, 256, 64, 64, dtype=dtype), torch.randn(256, 256, 3, 3, dtype=dtype)
    x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    seconds = []
    with torch.inference_mode():
        for _ in range(8):
            started = time.perf_counter()
            torch.nn.functional.conv2d(x, weight, padding=1)
            seconds.append(time.perf_counter() - started)
    return 2 * weight.numel() * 64 * 64 / min(seconds)


def measure_apart(arrangement: str, size: int, style_size: int) -> Measurement:
    """measure() in a process of its own."""
    command = [sys.executable, __file__, "--one", arrangement, str(size), str(style_size)]
    return Measurement(**json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def measure_all(sizes: tuple[int, ...], rounds: int) -> list[Measurement]:
    """Medians over rounds in which the arrangements take turns, so that a slow minute hits all of them."""
    turns = [
        (size, arrangement)
        for size in sizes
        for _ in range(rounds if size <= LARGEST_PUBLISHED else 1)
        for arrangement in ARRANGEMENTS
        if size <= LARGEST[arrangement]
    ]
    found: dict[tuple, list[Measurement]] = {}
    for size, arrangement in tqdm(turns, unit="run"):
        style_size = size if size <= 2048 else 1024
        found.setdefault((size, style_size, arrangement), []).append(measure_apart(arrangement, size, style_size))
    return [
        Measurement(
            arrangement,
            size,
            style_size,
            statistics.median(x.seconds for x in several),
            max(x.megabytes for x in several),
            statistics.median(x.floor for x in several),
        )
        for (size, style_size, arrangement), several in found.items()
    ]


def table(found: list[Measurement]) -> str:
    """A row per size, a column per arrangement: seconds, ratio to published, peak memory."""
    cells = {(x.size, x.style_size, x.arrangement): x for x in found}
    lines = [
        "| content, style | published | float32 | bfloat16 | styled |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for size, style_size in dict.fromkeys((x.size, x.style_size) for x in found):
        row = []
        for arrangement in ARRANGEMENTS:
            x, base = cells.get((size, style_size, arrangement)), cells.get((size, style_size, "published"))
            if x is None:
                row.append("")
                continue
            ratio = f" ({base.seconds / x.seconds:.1f}x)" if base and arrangement not in ("published", "styled") else ""
            row.append(f"{x.seconds:.2f} s{ratio}, {x.megabytes / 1e3:.2f} GB")
        lines.append(f"| {size}, {style_size} px | {' | '.join(row)} |")
    return "\n".join(lines)


def floor_table(found: list[Measurement]) -> str:
    """Time over floor, a row per size, a column per arrangement of ours."""
    lines = [f"| content, style | {' | '.join(ARRANGEMENTS[1:])} |", "| ---: | ---: | ---: | ---: |"]
    for size, style_size in dict.fromkeys((x.size, x.style_size) for x in found):
        row = {x.arrangement: x for x in found if (x.size, x.style_size) == (size, style_size)}
        cells = (f"{row[x].seconds:.2f} / {row[x].floor:.2f} s" if x in row else "" for x in ARRANGEMENTS[1:])
        lines.append(f"| {size}, {style_size} px | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: list[Measurement], target: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name, label in zip(axes, ("seconds", "megabytes"), ("seconds", "peak memory, MB"), strict=True):
        for arrangement in ARRANGEMENTS:
            points = sorted((x.size, getattr(x, name)) for x in found if x.arrangement == arrangement)
            axis.plot(*zip(*points, strict=True), marker="o", label=arrangement)
        axis.set(xscale="log", yscale="log", xlabel="picture's side, px")
        axis.set(ylabel=label, xticks=SIZES, xticklabels=SIZES)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(target, dpi=110)


def page(found: list[Measurement], stages: str, layers: str, compiled: str, command: str) -> str:
    cores = torch.get_num_threads()
    return f"""# Performance

Time for one picture, its style included, and the peak memory of the process, on {cores} CPU cores ({cpu_name()}), torch
{torch.__version__}. `{command}` makes this page.

![Time and peak memory against size](performance.png)

{table(found)}

- *published*: the arrangement of the published code, float32: contiguous NCHW maps, one convolution per projection,
  unfolded copies of blocks, whole score tensors ([benchmarks/published.py](../benchmarks/published.py), tested against
  results of the published code). Beyond {LARGEST_PUBLISHED} px it would need tens of gigabytes.
- *float32*, *bfloat16*: the same network of the published size (VGG19, random weights) as `a2k stylize` runs it, which
  has the C library keep freed tiles and the processor take denormal numbers for zero; in your own programs
  `a2k.allocator.keep_freed_tiles()` and `torch.set_flush_denormal(True)`, first, do. The ratio is to *published*
  in the same run.
- *styled*: the shape of the bundled network, in float32, whatever its default dtype.

Up to {LARGEST_PUBLISHED} px the figures are medians of rounds in which the arrangements take turns.

## How near the floor

Most of the time goes into convolutions. Below, the time over what all operations of the network would take at the rate
of one 3x3 convolution of 256 channels, measured in the same process: a floor for whoever does not compute less.

{floor_table(found)}

Ours computes less than the published arrangement: a convolution after upsampling is done before it, with 4/9 of the
operations, and the projections of a style are made once for all its photos. For 128 x 256 channels and more, minimal
filtering ([a2k/winograd.py](../a2k/winograd.py)) needs a quarter of the multiplications of a 3x3 convolution, and about
half of its time. Where multiplications take longer, smaller layers gain as well: in float32 from 128 x 128 channels on
Intel's processors and 64 x 128 on AMD's Zen 4, there in bfloat16 from 128 x 128.

Where the time goes, style and content of one size:

{stages}

Encoder and decoder are what the published network is mostly made of; whoever wants less time than they take needs a
smaller network.

One A2K module alone, content and style of one size. The floor is again the time that its operations would take at the
rate of a convolution, without exponentials, sums and searches for the largest score:

{layers}

`StyleTransfer(compile=True)` runs the plain network through torch.compile. It is meant for GPUs: here a picture of
{COMPILED_SIZE} px takes the published network {compiled}.
"""


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.processor() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--one", nargs=3, metavar=("ARRANGEMENT", "SIZE", "STYLE_SIZE"), help=argparse.SUPPRESS)
    parser.add_argument("--stages", choices=ARRANGEMENTS[1:], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stages:
        print(json.dumps(stage_seconds(arguments.stages, STAGES_SIZE)))
        return
    if arguments.one:
        arrangement, size, style_size = arguments.one
        print(json.dumps(asdict(measure(arrangement, int(size), int(style_size)))))
        return
    found = measure_all(tuple(arguments.sizes), arguments.rounds)
    plot(found, arguments.output.with_suffix(".png"))
    arguments.output.write_text(page(found, stage_table(), layer_table(), compiled_seconds(), "make performance"))
    print(table(found))


if __name__ == "__main__":
    main()
