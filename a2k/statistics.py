"""Statistics of feature maps that come in tiles."""

from torch import Tensor

EPS = 1e-5  # of norm()
PIECE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # taken at a time, so that they stay in the cache for all passes


class Statistics:
    """Mean and unbiased variance per channel of a map that comes in tiles (Chan et al. 1983)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, tile: Tensor) -> None:
        """tile: (B, C, h, w)."""
        rows = max(1, PIECE_ELEMENTS[tile.device.type] // max(1, tile[:, :, :1].numel()))
        for piece in tile.split(rows, 2):
            self._add(piece.permute(0, 2, 3, 1).flatten(1, 2).float())

    def _add(self, points: Tensor) -> None:
        """points: (B, n, C)."""
        count, rounded = points.shape[1], points.mean(1)
        points = points - rounded[:, None]
        rest = points.mean(1).double()
        mean, squares = rounded.double() + rest, points.square_().sum(1).double() - count * rest.square()
        difference, total = mean - self.mean, self.count + count
        self.squares = self.squares + squares + difference.square() * (self.count * count / total)
        self.mean = self.mean + difference * (count / total)
        self.count = total

    @property
    def center(self) -> Tensor:
        """(B, C) float32."""
        return self.mean.float()

    @property
    def deviation(self) -> Tensor:
        """sqrt(var + eps): (B, C) float32."""
        return (self.squares / max(1, self.count - 1) + EPS).sqrt().float()
