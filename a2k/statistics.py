"""Statistics of feature maps that come in tiles."""

from functools import cached_property

import torch
from torch import Tensor

EPS = 1e-5  # of norm()
# Points taken at a time: of sums in float32, whose rounding grows with their number, and where copies take memory.
PIECE_POINTS = {"cpu": 1 << 13, "cuda": 1 << 20}


class Statistics:
    """Mean and unbiased variance per channel of a map that comes in tiles (Chan et al. 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, tile: Tensor) -> None:
        """tile: (B, C, h, w)."""
        rows = max(1, PIECE_POINTS[tile.device.type] // tile.shape[3])
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
    if x.device.type == "cuda":
        variance, mean = torch.var_mean(x.float(), (2, 3), correction=0)
    else:
        mean, variance = (torch.stack(parts) for parts in zip(*map(moments_on_cpu, x), strict=True))
    return mean.double(), variance.double() * (x.shape[2] * x.shape[3])


def moments_on_cpu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance, (C), of a map (C, h, w).

    Over channels_last maps torch.batch_norm_update_stats is many times as fast as torch.var_mean. Its mean, the end of
    one long sum, is not exact enough for float32; the variance is then corrected for a better one.
    """
    unused = x.new_zeros(len(x), dtype=torch.float32), x.new_zeros(len(x), dtype=torch.float32)
    mean, variance = torch.batch_norm_update_stats(x[None].contiguous(memory_format=torch.channels_last), *unused, 0.0)
    if x.dtype == torch.float32:
        rough, mean = mean.double(), x.permute(1, 2, 0).flatten(0, 1).mean(0).double()
        variance = (variance - (mean - rough).square()).clamp_min(0)
    return mean, variance
