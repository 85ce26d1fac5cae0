"""Dtypes of computation, shared by the backends."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
