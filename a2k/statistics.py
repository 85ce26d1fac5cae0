"""Statistics of feature maps that come in tiles."""

from functools import cached_property

import torch
from torch import Tensor

EPS = 1e-5  # of norm()
PIECE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # taken at a time, so that they stay in the cache for all passes


class Statistics:
    """Mean and unbiased variance per channel of a map that comes in tiles (Chan et al. 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, tile: Tensor) -> None:
        """tile: (B, C, h, w)."""
        rows = max(1, PIECE_ELEMENTS[tile.device.type] // max(1, tile[:, :, :1].numel()))
        for piece in tile.split(rows, 2):
            self._merge(piece.shape[2] * piece.shape[3], *moments(piece))
        for name in ("center", "deviation"):
            vars(self).pop(name, None)

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        total = self.count + count
        if self.count:
            shift = mean - self.mean
            squares = squares + self.squares + shift.square() * (self.count * count / total)
            mean = self.mean + shift * (count / total)
        self.count, self.mean, self.squares = total, mean, squares

    @cached_property
    def center(self) -> Tensor:
        """(B, C) float32."""
        return self.mean.float()

    @cached_property
    def deviation(self) -> Tensor:
        """sqrt(var + eps): (B, C) float32."""
        return (self.squares / max(1, self.count - 1) + EPS).sqrt().float()


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared differences from it, (B, C) float64, of maps (B, C, h, w)."""
    points = x.shape[2] * x.shape[3]
    if x.device.type == "cuda":
        variance, mean = torch.var_mean(x.float(), (2, 3), correction=0)
    elif x.dtype in (torch.bfloat16, torch.float16):
        mean, variance = (torch.stack(parts) for parts in zip(*map(moments_in_16_bit, x), strict=True))
    else:  # over channels_last maps torch.var_mean is slow on a processor
        x = x.permute(0, 2, 3, 1).flatten(2).view(len(x), *x.shape[2:], -1).float()
        rounded = sum_of_points(x) / points
        x = x - rounded[:, None, None]
        rest = sum_of_points(x).double() / points
        return rounded + rest, sum_of_points(x.square_()) - rest.square() * points
    return mean.double(), variance.double() * points


def sum_of_points(x: Tensor) -> Tensor:
    """(B, h, w, C) to (B, C). Whole rows first: of long ones a processor adds more values at a time than of points."""
    return x.flatten(2).sum(1).view(len(x), *x.shape[2:]).sum(1)


def moments_in_16_bit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance, (C) float32, of a map (C, h, w): one long sum each, fast and as exact as such maps."""
    unused = (x.new_zeros(len(x), dtype=torch.float32) for _ in range(2))  # whose dtype is that of the sums
    return torch.batch_norm_update_stats(x[None].contiguous(memory_format=torch.channels_last), *unused, 0.0)
