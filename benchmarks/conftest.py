"""Timing on CPU and GPU, and what every benchmark reports besides its time."""

import time

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Every run is saved, so that `--benchmark-compare` has something to compare with from the second run on."""
    config.option.benchmark_autosave = config.option.benchmark_autosave or "run"


def pytest_report_header():
    return f"device: {torch.cuda.get_device_name() if DEVICE == 'cuda' else f'{torch.get_num_threads()} CPU threads'}"


def gpu_timer() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of copying 256 MiB on this device."""
    source = torch.zeros(1 << 26, device=DEVICE)
    target = torch.empty_like(source)
    timer = gpu_timer if DEVICE == "cuda" else time.perf_counter
    target.copy_(source)
    seconds = []
    for _ in range(5):
        started = timer()
        target.copy_(source)
        seconds.append(timer() - started)
    return 2 * source.nbytes / min(seconds)


@pytest.fixture
def time_of(benchmark):
    """time_of(function): time something that takes a while."""

    def run(function) -> None:
        if DEVICE == "cuda":
            benchmark._timer = gpu_timer
        benchmark.pedantic(function, rounds=3, warmup_rounds=1)
        benchmark.extra_info.update(device=DEVICE)

    return run


@pytest.fixture
def measure(benchmark, copy_bandwidth):
    """measure(function, flops, bytes): time it and report achieved rates."""

    def run(function, flops: float, moved: float) -> None:
        if DEVICE == "cuda":
            benchmark._timer = gpu_timer
        benchmark.pedantic(function, rounds=7, warmup_rounds=2)
        benchmark.extra_info.update(device=DEVICE, gflop=flops / 1e9, megabytes=moved / 1e6)
        if benchmark.stats:  # not with --benchmark-disable
            seconds = benchmark.stats.stats.min
            benchmark.extra_info.update(
                gflops=flops / seconds / 1e9,
                gigabytes_per_second=moved / seconds / 1e9,
                fraction_of_copy=moved / seconds / copy_bandwidth,
            )

    return run
