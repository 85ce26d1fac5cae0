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
            points = piece.permute(0, 2, 3, 1).flatten(1, 2).float()
            self._merge(points.shape[1], *moments(points))
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


def moments(points: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared differences from it, (B, C) float64, of points (B, n, C)."""
    if points.device.type == "cuda":
        variance, mean = torch.var_mean(points, 1, correction=0)
        return mean.double(), variance.double() * points.shape[1]
    rounded = points.mean(1)  # over channels_last maps torch.var_mean is slow on a processor
    points = points - rounded[:, None]
    rest = points.mean(1).double()
    return rounded + rest, points.square_().sum(1) - rest.square() * points.shape[1]
