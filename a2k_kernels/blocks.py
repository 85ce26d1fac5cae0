"""Block geometry, shared by all backends: which points a block has, and cutting maps into blocks and back."""

import torch
import torch.nn.functional as F
from torch import Tensor


def count_blocks(size: tuple[int, int], block_size: int) -> tuple[int, int]:
    """Rows and columns of blocks that cover a map of the given (height, width)."""
    height, width = size
    return -(-height // block_size), -(-width // block_size)


def split_blocks(x: Tensor, block_size: int, num_heads: int) -> Tensor:
    """Cut a feature map into blocks, zero-filled where the border cuts them.

    x: (B, C, H, W). Returns (B, num_heads, n, r, d) with r = block_size**2 and d = C / num_heads.
    """
    b, (B, C, H, W) = block_size, x.shape
    rows, cols = count_blocks((H, W), b)
    if (rows * b, cols * b) != (H, W):
        x = F.pad(x, (0, cols * b - W, 0, rows * b - H))
    grid = x.unflatten(3, (cols, b)).unflatten(2, (rows, b)).unflatten(1, (num_heads, C // num_heads))
    return grid.permute(0, 1, 3, 5, 4, 6, 2).reshape(B, num_heads, rows * cols, b * b, C // num_heads)


def merge_blocks(blocks: Tensor, size: tuple[int, int], block_size: int, out: Tensor | None = None) -> Tensor:
    """Inverse of split_blocks: (B, num_heads, n, r, d) -> (B, num_heads * d, *size), into out or channels_last."""
    b, (H, W), (B, num_heads, _, _, d) = block_size, size, blocks.shape
    rows, cols = count_blocks(size, b)
    grid = blocks.view(B, num_heads, rows, cols, b, b, d).permute(0, 2, 4, 3, 5, 1, 6)
    if out is not None and (rows * b, cols * b) == (H, W):
        out.permute(0, 2, 3, 1).unflatten(3, (num_heads, d)).unflatten(2, (cols, b)).unflatten(1, (rows, b)).copy_(grid)
        return out
    merged = grid.reshape(B, rows * b, cols * b, num_heads * d)[:, :H, :W].permute(0, 3, 1, 2)
    return merged if out is None else out.copy_(merged)


def existing_points(size: tuple[int, int], block_size: int, device: torch.device | str = "cpu") -> Tensor:
    """Boolean (n, r): False where the border of a map of that size cuts a point off its block."""
    return split_blocks(torch.ones(1, 1, *size, dtype=torch.bool, device=device), block_size, 1)[0, 0, ..., 0]
