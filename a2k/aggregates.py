"""block_aggregate of projections that are never computed point by point."""

import torch
from torch import Tensor

from a2k_kernels.blocks import existing_points, split_blocks

Projection = tuple[Tensor, Tensor]  # weight (C_out, C_in) and bias (C_out); a batch of them has one more dimension


def projected_aggregates(
    x: Tensor, key: Projection, value: Projection, *, block_size: int, num_heads: int, alpha: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """As `a2k_kernels.block_aggregate` of two projections of x (B, C, H, W), of batches of float32 parameters.

    With k_y = K x_y + b in one head: <k_mean, k_y> = <K^T k_mean, x_y> + <k_mean, b>, so gates need one vector per
    block, not one key per point. And for the aggregates, with x_agg = (sum_y g_y x_y + x_mean) / (m + 1):
    k_agg = K x_agg + b (sum_y g_y + 1) / (m + 1), v_agg likewise.
    """
    exists = existing_points(x.shape[-2:], block_size, x.device)[:, None]  # (n, 1, r)
    points = exists.sum(-1)  # (n, 1)
    blocks = split_blocks(x, block_size, 1)[:, 0].float()  # (B, n, r, C), 0 where a cut block lacks a point
    mean = blocks.sum(2) / points
    key, value = (
        (weight.unflatten(1, (num_heads, -1)), bias.unflatten(1, (num_heads, 1, -1))) for weight, bias in (key, value)
    )  # (B, heads, d, C) and (B, heads, 1, d)
    weight, bias = key
    key_mean = mean[:, None] @ weight.mT + bias  # (B, heads, n, d)
    direction, offset = key_mean @ weight, (key_mean * bias).sum(-1, keepdim=True)  # (B, heads, n, C), (B, heads, n, 1)
    direction, offset = direction.transpose(1, 2), offset.transpose(1, 2)
    gate = torch.sigmoid(beta.float() + alpha.float() * (direction @ blocks.mT + offset)) * exists  # (B, n, heads, r)
    aggregate = (gate @ blocks + mean[:, :, None]) / (points + 1)[..., None]  # (B, n, heads, C)
    total = (gate.sum(-1) + 1) / (points + 1)  # (B, n, heads)
    aggregate, total = aggregate.transpose(1, 2), total.mT[..., None]
    k_agg, v_agg = ((aggregate @ weight.mT + total * bias).to(x.dtype) for weight, bias in (key, value))
    return k_agg, v_agg
