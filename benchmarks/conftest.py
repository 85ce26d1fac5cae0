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


class EventTimer:
    """Seconds on a GPU between two calls, by CUDA events.

    Before the first one the GPU gets some milliseconds of work, which empties its cache too: meanwhile the host queues
    what is timed, so that the time is the GPU's and not that of Python and the launches.
    """

    FILLS = 16  # of 1 GiB, a quarter of a millisecond each on an H200

    def __init__(self) -> None:
        self.work = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        self.started = None

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        if self.started is None:
            for _ in range(self.FILLS):
                self.work.zero_()
            event.record()
            self.started = event
            return 0.0
        event.record()
        event.synchronize()
        seconds = self.started.elapsed_time(event) / 1e3
        self.started = None
        return seconds


@pytest.fixture(scope="session")
def timer():
    return EventTimer() if DEVICE == "cuda" else time.perf_counter


@pytest.fixture(scope="session")
def copy_bandwidth(timer) -> float:
    """Bytes per second, read and written, of copying 256 MiB on this device."""
    source = torch.zeros(1 << 26, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = []
    for _ in range(5):
        started = timer()
        target.copy_(source)
        seconds.append(timer() - started)
    return 2 * source.nbytes / min(seconds)


@pytest.fixture
def time_of(benchmark, timer):
    """time_of(function): time something that takes a while."""

    def run(function) -> None:
        benchmark._timer = timer
        benchmark.pedantic(function, rounds=3, warmup_rounds=1)
        benchmark.extra_info.update(device=DEVICE)

    return run


@pytest.fixture
def measure(benchmark, timer, copy_bandwidth):
    """measure(function, flops, bytes): time it and report achieved rates."""

    def run(function, flops: float, moved: float) -> None:
        benchmark._timer = timer
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
