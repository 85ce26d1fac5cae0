"""The processes of one training, one or as many as `torchrun` started."""

import os
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
