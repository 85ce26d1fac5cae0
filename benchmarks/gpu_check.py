"""Check the kernels on this machine's GPU: tests, benchmarks and peak memory, in one file to send (`make gpu-check`).

Writes gpu-check-<GPU>.md beside the Makefile. Where there is no GPU it says so and succeeds.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import training_step
from end_to_end import ARRANGEMENTS, network, picture
from test_kernels import OPERATIONS, SHAPES, Shape, call, random_index

ROOT = Path(__file__).parents[1]


def run_pytest(*arguments: str) -> str:
    """The last line that pytest prints, after its output has gone to the terminal."""
    command = [sys.executable, "-m", "pytest", "--color=no", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        last = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return f"{last.strip('= ')} (exit code {process.returncode})"


def benchmark_table(report: Path) -> str:
    """Median milliseconds of every group, a column per backend or peer, and the Triton kernels' share of a copy."""
    groups: dict[str, dict[str, dict]] = {}
    for entry in json.loads(report.read_text())["benchmarks"]:
        name = (entry["params"] or {}).get("backend") or entry["name"].split("[")[0].removeprefix("test_peer_")
        groups.setdefault(entry["group"], {})[name] = entry
    columns = sorted({name for entries in groups.values() for name in entries})
    lines = [f"| ms | {' | '.join(columns)} | of a copy |", f"| --- |{' ---: |' * (len(columns) + 1)}"]
    for group, entries in sorted(groups.items()):
        cells = [f"{1e3 * entries[name]['stats']['median']:.3f}" if name in entries else "" for name in columns]
        share = entries["triton"]["extra_info"]["fraction_of_copy"] if "triton" in entries else float("nan")
        lines.append(f"| {group} | {' | '.join(cells)} | {share:.0%} |")
    return "\n".join(lines)


def peak_megabytes(operation: str, shape: Shape, backend: str) -> float:
    """Memory that one forward pass takes beyond its inputs."""
    maps, index = shape.maps(3), random_index(shape)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.inference_mode():
        call(operation, shape, backend, maps, index)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def memory_table() -> str:
    backends = ("reference", "torch", "triton")
    lines = [f"| MB | {' | '.join(backends)} |", f"| --- |{' ---: |' * len(backends)}"]
    for operation in OPERATIONS:
        for shape in SHAPES:
            cells = (f"{peak_megabytes(operation, shape, backend):.1f}" for backend in backends)
            lines.append(f"| {operation} {shape.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def redraw_cell(arrangement: str, size: int) -> str:
    """Median milliseconds and peak megabytes of redrawing a picture, its style of the same size included."""
    (run, _), content = network(arrangement, "cuda"), picture(size, "cuda")
    if arrangement == "published":
        content = content.float().div(255).contiguous()
    torch.cuda.reset_peak_memory_stats()
    milliseconds = []
    try:
        with torch.inference_mode():
            for _ in range(5):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run(content, content)
                end.record()
                torch.cuda.synchronize()
                milliseconds.append(start.elapsed_time(end))
    except torch.cuda.OutOfMemoryError:
        return "out of memory"
    return f"{statistics.median(milliseconds):.1f} ms, {torch.cuda.max_memory_allocated() / 1e6:.0f} MB"


def network_table() -> str:
    lines = [f"| picture | {' | '.join(ARRANGEMENTS)} |", f"| --- |{' ---: |' * len(ARRANGEMENTS)}"]
    for size in (256, 512, 1024, 2048):
        lines.append(f"| {size} px | {' | '.join(redraw_cell(x, size) for x in ARRANGEMENTS)} |")
    return "\n".join(lines)


def main() -> None:
    if not torch.cuda.is_available():
        print("gpu-check: this machine has no GPU that PyTorch can use; nothing was checked")
        return
    import triton

    gpu = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "benchmarks.json"
        tests = run_pytest("tests/a2k_kernels")
        benchmarks = run_pytest("benchmarks", f"--benchmark-json={report}")
        table = benchmark_table(report)
    text = f"""# {gpu}

torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}

- tests: {tests}
- benchmarks: {benchmarks}

## Time, bfloat16

{table}

## The whole network

*published* is float32 in the arrangement of the published code, *styled* the bundled network's shape in float32.

{network_table()}

## A training step of the published network, batch 4, crop 256

*published* is the arrangement of the published code, *float32* and *bfloat16* that of `a2k train`.

{training_step.gpu_table()}

## Peak memory beyond the inputs, forward

{memory_table()}
"""
    target = ROOT / f"gpu-check-{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}.md"
    target.write_text(text)
    print(f"gpu-check: wrote {target}")


if __name__ == "__main__":
    main()
