"""The processes of one training, one or as many as `torchrun` started; and what a process asks of its allocator."""

import ctypes
import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """This process's number, how many there are, and its device."""

    rank: int
    count: int
    device: torch.device

    def mean(self, x: Tensor) -> Tensor:
        """The mean of x over the processes, in all of them."""
        if self.count > 1:
            dist.all_reduce(x)
            x /= self.count
        return x

    def parallel(self, module: nn.Module, some_unused: bool) -> nn.Module:
        """The module with gradients averaged over the processes. some_unused: not all parameters get gradients."""
        if self.count == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices, find_unused_parameters=some_unused)

    def leave(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()


def join_processes(device: str) -> Processes:
    """Meet the other processes that `torchrun` started, if it did: over NCCL on GPUs, one each, else over gloo."""
    place = torch.device(device)
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        return Processes(0, 1, place)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    return Processes(dist.get_rank(), count, place)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of mallopt(3)
LARGEST_KEPT = 32 << 20  # bytes of a map; glibc allows no more
MOST_KEPT = 256 << 20  # bytes at the end of the heap


def keep_freed_memory() -> None:
    """Have glibc keep memory that is freed for what comes next: for training, whose steps are all alike.

    By default it returns that of large maps to the system, which must then clear every page anew in every step.
    """
    set_malloc({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1})


def keep_freed_tiles() -> None:
    """As `keep_freed_memory`, but of maps up to 32 MiB, and 256 MiB at the end of the heap: for redrawing pictures tile
    by tile, where whole maps of a large picture must not stay.
    """
    set_malloc({M_MMAP_THRESHOLD: LARGEST_KEPT, M_TRIM_THRESHOLD: MOST_KEPT})


def set_malloc(options: dict[int, int]) -> None:
    """Set options of glibc's allocator; other systems have none."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has none
    if mallopt:
        for option, value in options.items():
            mallopt(option, value)
