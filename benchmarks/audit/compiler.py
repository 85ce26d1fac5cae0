"""Compiles what the layers need for every target, in two processes, and keeps what was read from the machine code."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from triton.compiler import CompiledKernel

from benchmarks.audit import launches, machine_code, traffic
from benchmarks.audit.shapes import Layer

BUILD = Path(__file__).parents[2] / "build" / "audit"
WORKERS = 2


@dataclass(frozen=True)
class Task:
    """One layer compiled for one target and dtype, at all sizes of the picture."""

    target: str
    dtype: str
    layer: Layer

    def run(self) -> list[dict]:
        """One entry per operation and size of the picture."""
        launches.target_is(self.target)
        torch.set_num_threads(1)
        found = []
        for picture in self.layer.pictures:
            operations = launches.record_operations(self.layer, picture, getattr(torch, self.dtype))
            for name, recording in operations.items():
                found.append(
                    {
                        "target": self.target,
                        "dtype": self.dtype,
                        "layer": self.layer.name,
                        "picture": picture,
                        "operation": name,
                        "launches": [describe(launch) for launch in recording.launches],
                        "torch_calls": len(recording.torch_calls),
                        "torch_bytes": recording.torch_bytes,
                    }
                )
        return found


def describe(launch: launches.Launch) -> dict:
    work = traffic.count_work(launch.kernel, launch.grid, launch.arguments)
    return {
        "kernel": launch.kernel,
        "grid": launch.grid,
        "work": asdict(work),
        "code": read_cached(launch.compiled),
    }


def read_cached(compiled: CompiledKernel) -> dict:
    """machine_code.read, remembered on disk under the kernel's hash and that of the reader."""
    reader = hashlib.sha256(Path(machine_code.__file__).read_bytes()).hexdigest()[:16]
    path = BUILD / "code" / reader / f"{compiled.hash}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(machine_code.read(compiled)))
        partial.replace(path)
    return json.loads(path.read_text())


def run_tasks(tasks: list[Task]) -> Iterator[list[dict]]:
    """Results in the order in which they come."""
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        pending = [pool.submit(task.run) for task in tasks]
        try:
            yield from (future.result() for future in as_completed(pending))
        finally:
            pool.shutdown(cancel_futures=True)


def save(entries: list[dict]) -> None:
    """Everything that is known, for other tools: build/audit/audit.json."""
    partial = BUILD / "audit.json.partial"
    partial.write_text(json.dumps(entries))
    partial.replace(BUILD / "audit.json")
