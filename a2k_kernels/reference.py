"""The specification of the five operations, to be read beside the paper: Zhu et al., "All-to-key Attention for
Arbitrary Style Transfer", ICCV 2023, arXiv 2212.04105. Slow and plain; inputs are those of the public functions,
already validated. Half-precision inputs are computed in float32 and rounded once, at the end."""

import torch

from a2k_kernels.blocks import existing_points, merge_blocks, split_blocks
from a2k_kernels.dtypes import at_least_float32


def block_aggregate(key, value, alpha, beta, *, block_size, num_heads):
    """k_mean = sum_y k_y / m,  g_y = sigmoid(beta + alpha <k_mean, k_y>),  k_agg = (sum_y g_y k_y + k_mean) / (m + 1)

    and v_agg likewise, with the gate of the keys; m is the number of points of the block.
    """
    k, v = (at_least_float32(split_blocks(x, block_size, num_heads)) for x in (key, value))
    alpha, beta = at_least_float32(alpha), at_least_float32(beta)
    exists = existing_points(key.shape[-2:], block_size, key.device)[..., None].to(k.dtype)  # (n, r, 1)
    m = exists.sum(-2)  # (n, 1)
    k_mean, v_mean = k.sum(-2) / m, v.sum(-2) / m  # (B, heads, n, d)
    gate = torch.sigmoid(beta + alpha * (k * k_mean[..., None, :]).sum(-1, keepdim=True)) * exists
    k_agg = ((gate * k).sum(-2) + k_mean) / (m + 1)
    v_agg = ((gate * v).sum(-2) + v_mean) / (m + 1)
    return k_agg.to(key.dtype), v_agg.to(value.dtype)


def distributed_attention(query, key, value, alpha, beta, *, block_size, num_heads, scale):
    """out_x = sum_z softmax_z(scale <q_x, k_agg_z>) v_agg_z, z over the blocks of the key map."""
    k, v = at_least_float32(key), at_least_float32(value)
    k_agg, v_agg = block_aggregate(k, v, alpha, beta, block_size=block_size, num_heads=num_heads)
    return attend_aggregates(query, k_agg, v_agg, scale=scale)


def attend_aggregates(query, key_agg, value_agg, *, scale):
    """out_x = sum_z softmax_z(scale <q_x, k_agg_z>) v_agg_z."""
    q, k_agg, v_agg = (at_least_float32(x) for x in (query, key_agg, value_agg))
    q = q.flatten(2).unflatten(1, (k_agg.shape[1], -1)).mT  # (B, heads, H * W, d)
    out = (scale * q @ k_agg.mT).softmax(-1) @ v_agg
    return out.mT.flatten(1, 2).unflatten(2, query.shape[-2:]).to(query.dtype)


def block_match(query, key, *, block_size, num_heads):
    """index_x = argmax_z sum_y <q_{x,y}, k_{z,y}>, y over the positions in a block."""
    q, k = (at_least_float32(split_blocks(x, block_size, num_heads)) for x in (query, key))
    scores = q.flatten(-2) @ k.flatten(-2).mT  # (B, heads, n_query_blocks, n_key_blocks)
    return scores.argmax(-1).int()


def block_attention(query, key, value, index, *, block_size, num_heads, scale):
    """out_x = sum_y softmax_y(scale <q_x, k_y>) v_y, y over the points of the block that index names.

    Where api.check_index can't look (on a GPU), an index out of range gives zeros.
    """
    q, k, v = (at_least_float32(split_blocks(x, block_size, num_heads)) for x in (query, key, value))
    exists = existing_points(key.shape[-2:], block_size, key.device)  # (n, r)
    selected = index.long().clamp(0, len(exists) - 1)
    k, v = (torch.take_along_dim(x, selected[..., None, None], dim=2) for x in (k, v))
    scores = (scale * q @ k.mT).masked_fill(~exists[selected][..., None, :], float("-inf"))
    out = (scores.softmax(-1) @ v).masked_fill((index != selected)[..., None, None], 0)
    return merge_blocks(out, query.shape[-2:], block_size).to(query.dtype)
