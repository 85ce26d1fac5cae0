"""Statistics of feature maps that come in tiles."""

from functools import cached_property

import torch
from torch import Tensor

EPS = 1e-5  # of norm()
PIECE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # taken at a time, so that they stay in the cache for all passes


class Statistics:
    """Mean and unbiased variance per channel of a map that comes in tiles (Chan et al. 1983)."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def add(self, tile: Tensor) -> None:
        """tile: (B, C, h, w)."""
        rows = max(1, PIECE_ELEMENTS[tile.device.type] // max(1, tile[:, :, :1].numel()))
        for piece in tile.split(rows, 2):
            points = piece.permute(0, 2, 3, 1).flatten(1, 2).float()
            rounded = points.mean(1)
            points = points - rounded[:, None]
            self.pieces.append((points.shape[1], rounded, points.mean(1), points.square_().sum(1)))
        vars(self).pop("moments", None)

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, (B, C) float64."""
        counts, *parts = zip(*self.pieces, strict=True)
        rounded, rest, squares = (torch.stack(part).double() for part in parts)
        counts = torch.tensor(counts, dtype=torch.float64, device=rest.device)[:, None, None]
        means, total = rounded + rest, counts.sum()
        mean = (counts * means).sum(0) / total
        squares = (squares + counts * ((means - mean).square() - rest.square())).sum(0)
        return mean, squares / (total - 1).clamp_min(1)

    @property
    def center(self) -> Tensor:
        """(B, C) float32."""
        return self.moments[0].float()

    @property
    def deviation(self) -> Tensor:
        """sqrt(var + eps): (B, C) float32."""
        return (self.moments[1] + EPS).sqrt().float()
