"""distributed_attention: a flash-style pass over one aggregated key per block, forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from a2k_kernels.triton.configs import (
    distributed_key_tiles,
    distributed_query_tiles,
    distributed_splits,
    distributed_tiles,
)
from a2k_kernels.triton.tiles import (
    LOG2E,
    architecture,
    dot,
    is_large,
    load_tile,
    on_device,
    store_tile,
    without_spills,
)


@triton.jit
def rows_of(ptr, map_number, num_rows, DIM: tl.constexpr):
    """Pointer to the rows of one map of a contiguous (maps, num_rows, DIM) tensor."""
    return ptr + map_number.to(tl.int64) * num_rows * DIM


@triton.jit
def load_rows(
    rows_ptr, first, num_rows,
    WHOLE: tl.constexpr, DIM: tl.constexpr, LARGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + BLOCK_N - 1 of a contiguous (num_rows, DIM) matrix.

    The last row is repeated beyond the end, where there may be an end: if not WHOLE.
    """
    row, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    if not WHOLE:
        row = tl.minimum(row, num_rows - 1 - first)
    # 32 bits if they do: with a counter of 64, a loop takes registers that some kernels lack.
    start = rows_ptr + first * tl.full([], DIM, tl.int64 if LARGE else tl.int32)
    pointers = start + row[:, None] * DIM + d[None, :]
    return tl.load(pointers, mask=(d < DIM)[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]


@triton.jit
def attend_to_tile(
    q, keys, values, first, num_keys, factor, running_max, running_sum, out,
    WHOLE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PRECISION: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """(running_max, running_sum, out) after BLOCK_N more keys, or fewer if not WHOLE. factor >= 0."""
    k = load_rows(keys, first, num_keys, WHOLE, DIM, LARGE, BLOCK_N, BLOCK_D)
    v = load_rows(values, first, num_keys, WHOLE, VALUE_DIM, LARGE, BLOCK_N, BLOCK_DV)
    scores = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
    new_max = tl.maximum(running_max, tl.max(scores, axis=1) * factor)
    weights = tl.exp2(scores * factor - new_max[:, None])  # [BLOCK_M, BLOCK_N]
    if not WHOLE:
        weights = tl.where((first + tl.arange(0, BLOCK_N) < num_keys)[None, :], weights, 0.0)
    shrink = tl.exp2(running_max - new_max)
    running_sum = running_sum * shrink + tl.sum(weights, axis=1)
    return new_max, running_sum, dot(weights.to(v.dtype), v, out * shrink[:, None], PRECISION)


@triton.jit
def distributed_fwd_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, query_strides, out_strides, height, width, num_keys, scale,
    NEGATIVE: tl.constexpr, DENSE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, NUM_HEADS: tl.constexpr,
    PRECISION: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """out_x = sum_z softmax_z(scale <q_x, k_z>) v_z; lse_x = log2 sum_z 2^(scale <q_x, k_z> log2 e).

    One program: BLOCK_M query points of one head. NEGATIVE: scale < 0. DENSE: rows follow one another without a gap.
    """
    program, batch = tl.program_id(0), tl.program_id(1)
    head, point = program % NUM_HEADS, program // NUM_HEADS * BLOCK_M + tl.arange(0, BLOCK_M)
    map_number = batch * NUM_HEADS + head
    row, col, exists = point // width, point % width, point < height * width
    if DENSE:
        row, col = tl.zeros_like(point), point
    q = load_tile(query_ptr, query_strides, batch, head, 0, row, col, exists, DIM, BLOCK_D, LARGE)
    if NEGATIVE:  # so that the largest score has the largest weight
        q = (-q.to(tl.float32)).to(q.dtype)
    factor = tl.abs(scale) * LOG2E
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    keys, values = rows_of(key_ptr, map_number, num_keys, DIM), rows_of(value_ptr, map_number, num_keys, VALUE_DIM)
    whole = num_keys // BLOCK_N * BLOCK_N
    for first in range(0, whole, BLOCK_N):
        running_max, running_sum, out = attend_to_tile(
            q, keys, values, first, num_keys, factor, running_max, running_sum, out,
            True, DIM, VALUE_DIM, PRECISION, LARGE, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    for first in tl.range(whole, num_keys, BLOCK_N, num_stages=1):  # once or never
        running_max, running_sum, out = attend_to_tile(
            q, keys, values, first, num_keys, factor, running_max, running_sum, out,
            False, DIM, VALUE_DIM, PRECISION, LARGE, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    out = out * (1.0 / running_sum)[:, None]  # a division a row
    store_tile(out_ptr, out_strides, out, batch, head, 0, row, col, exists, VALUE_DIM, BLOCK_DV, LARGE)
    lse = lse_ptr + map_number.to(tl.int64) * height * width + point
    tl.store(lse, running_max + tl.log2(running_sum), mask=exists)


@triton.jit
def distributed_bwd_query_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, grad_out_ptr, grad_query_ptr,
    query_strides, out_strides, grad_out_strides, grad_query_strides, height, width, num_keys, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, NUM_HEADS: tl.constexpr, PRECISION: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dQ = scale P (dO V^T - rowsum(dO O)) K. One program: BLOCK_M query points of one head."""
    program, batch = tl.program_id(0), tl.program_id(1)
    head, point = program % NUM_HEADS, program // NUM_HEADS * BLOCK_M + tl.arange(0, BLOCK_M)
    map_number = batch * NUM_HEADS + head
    row, col, exists = point // width, point % width, point < height * width
    q = load_tile(query_ptr, query_strides, batch, head, 0, row, col, exists, DIM, BLOCK_D, LARGE)
    out = load_tile(out_ptr, out_strides, batch, head, 0, row, col, exists, VALUE_DIM, BLOCK_DV, LARGE)
    grad_out = load_tile(
        grad_out_ptr, grad_out_strides, batch, head, 0, row, col, exists, VALUE_DIM, BLOCK_DV, LARGE
    )  # [BLOCK_M, BLOCK_DV]
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), axis=1)
    lse = tl.load(lse_ptr + map_number.to(tl.int64) * height * width + point, mask=exists, other=0.0)
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    keys, values = rows_of(key_ptr, map_number, num_keys, DIM), rows_of(value_ptr, map_number, num_keys, VALUE_DIM)
    for first in range(0, num_keys, BLOCK_N):
        k = load_rows(keys, first, num_keys, False, DIM, LARGE, BLOCK_N, BLOCK_D)
        v = load_rows(values, first, num_keys, False, VALUE_DIM, LARGE, BLOCK_N, BLOCK_DV)
        weights = tl.exp2(dot(q, tl.trans(k), zeros, PRECISION) * (scale * LOG2E) - lse[:, None])
        weights = tl.where((first + tl.arange(0, BLOCK_N) < num_keys)[None, :], weights, 0.0)
        grad_weights = dot(grad_out, tl.trans(v), zeros, PRECISION)
        grad_scores = weights * (grad_weights - delta[:, None]) * scale  # [BLOCK_M, BLOCK_N]
        grad_q = dot(grad_scores.to(k.dtype), k, grad_q, PRECISION)
    store_tile(grad_query_ptr, grad_query_strides, grad_q, batch, head, 0, row, col, exists, DIM, BLOCK_D, LARGE)


@triton.jit
def distributed_bwd_key_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, grad_out_ptr, grad_key_ptr, grad_value_ptr,
    query_strides, out_strides, grad_out_strides, height, width, num_keys, tiles_per_split, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, NUM_HEADS: tl.constexpr, PRECISION: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dV = P^T dO, dK = scale (P (dO V^T - rowsum(dO O)))^T Q. One program: BLOCK_N keys by a range of query points.

    Writes float32 partial sums to (splits, B * NUM_HEADS, num_keys, d).
    """
    tile, split, map_number = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = map_number // NUM_HEADS, map_number % NUM_HEADS
    keys, values = rows_of(key_ptr, map_number, num_keys, DIM), rows_of(value_ptr, map_number, num_keys, VALUE_DIM)
    k = load_rows(keys, tile * BLOCK_N, num_keys, False, DIM, LARGE, BLOCK_N, BLOCK_D)
    v = load_rows(values, tile * BLOCK_N, num_keys, False, VALUE_DIM, LARGE, BLOCK_N, BLOCK_DV)
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for query_tile in range(split * tiles_per_split, (split + 1) * tiles_per_split):
        point = query_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row, col, exists = point // width, point % width, point < height * width
        q = load_tile(query_ptr, query_strides, batch, head, 0, row, col, exists, DIM, BLOCK_D, LARGE)
        out = load_tile(out_ptr, out_strides, batch, head, 0, row, col, exists, VALUE_DIM, BLOCK_DV, LARGE)
        grad_out = load_tile(
            grad_out_ptr, grad_out_strides, batch, head, 0, row, col, exists, VALUE_DIM, BLOCK_DV, LARGE
        )  # [BLOCK_M, BLOCK_DV]
        delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), axis=1)
        lse = tl.load(lse_ptr + map_number.to(tl.int64) * height * width + point, mask=exists, other=float("inf"))
        weights = tl.exp2(dot(q, tl.trans(k), zeros, PRECISION) * (scale * LOG2E) - lse[:, None])
        grad_weights = dot(grad_out, tl.trans(v), zeros, PRECISION)
        grad_scores = weights * (grad_weights - delta[:, None]) * scale  # [BLOCK_M, BLOCK_N]
        grad_v = dot(tl.trans(weights.to(v.dtype)), grad_out, grad_v, PRECISION)
        grad_k = dot(tl.trans(grad_scores.to(k.dtype)), q, grad_k, PRECISION)
    partial = split * tl.num_programs(2) + map_number
    store_rows(grad_key_ptr, grad_k, partial, tile * BLOCK_N, num_keys, DIM, BLOCK_N, BLOCK_D)
    store_rows(grad_value_ptr, grad_v, partial, tile * BLOCK_N, num_keys, VALUE_DIM, BLOCK_N, BLOCK_DV)


@triton.jit
def store_rows(ptr, x, map_number, first, num_rows, DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Inverse of load_rows."""
    row, d = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    pointers = ptr + (map_number.to(tl.int64) * num_rows + row)[:, None] * DIM + d[None, :]
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=(row < num_rows)[:, None] & (d < DIM)[None, :])


def has_dense_rows(*maps: Tensor) -> bool:
    """Whether the points of each map, rows one after the other, are equally far apart."""
    return all(x.stride(2) == x.shape[3] * x.stride(3) for x in maps)


def attend_fwd(
    query: Tensor, keys: Tensor, values: Tensor, out: Tensor, *, num_heads: int, scale: float, precision: str
) -> Tensor:
    """Fill out: (B, C_v, H, W) from aggregated keys and values (B, heads, n, d), contiguous. Returns lse."""
    B, C, H, W = query.shape
    dim, value_dim, num_keys = C // num_heads, values.shape[-1], keys.shape[2]
    tiles = without_spills(
        distributed_tiles(num_keys, dim, value_dim, query.element_size(), architecture(query)), query
    )
    lse = torch.empty((B, num_heads, H * W), dtype=torch.float32, device=query.device)
    if B == 0:
        return lse
    with on_device(query):
        distributed_fwd_kernel[(-(-(H * W) // tiles["BLOCK_M"]) * num_heads, B)](
            query, keys, values, out, lse, query.stride(), out.stride(), H, W, num_keys, scale,
            scale < 0, has_dense_rows(query, out), dim, value_dim, num_heads, precision,
            is_large(query, out, keys, values), **tiles,
        )  # fmt: skip
    return lse


def attend_bwd(
    query: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
    grad_query: Tensor | None, needs_keys: bool, *, num_heads: int, scale: float, precision: str,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Fill grad_query, if given; returns the float32 gradients of keys and values if needs_keys."""
    B, C, H, W = query.shape
    dim, value_dim, num_keys, maps = C // num_heads, values.shape[-1], keys.shape[2], B * num_heads
    if B == 0:
        return tuple(torch.empty_like(x, dtype=torch.float32) for x in (keys, values)) if needs_keys else None
    tiles = without_spills(distributed_query_tiles(num_keys, dim, value_dim, query.element_size()), query)
    large = is_large(query, out, grad_out, keys, values)
    inputs = (query, keys, values, out, lse, grad_out)
    strides = (query.stride(), out.stride(), grad_out.stride())
    shape = (dim, value_dim, num_heads, precision)
    with on_device(query):
        if grad_query is not None:
            distributed_bwd_query_kernel[(-(-(H * W) // tiles["BLOCK_M"]) * num_heads, B)](
                *inputs, grad_query, *strides, grad_query.stride(), H, W, num_keys, scale,
                *shape, large or is_large(grad_query), **tiles,
            )  # fmt: skip
        if not needs_keys:
            return None
        tiles = without_spills(
            distributed_key_tiles(num_keys, dim, value_dim, query.element_size(), architecture(query)), query
        )
        query_tiles, key_tiles = -(-(H * W) // tiles["BLOCK_M"]), -(-num_keys // tiles["BLOCK_N"])
        splits = distributed_splits(key_tiles * maps, query_tiles)
        grad_keys = torch.empty((splits, *keys.shape), dtype=torch.float32, device=query.device)
        grad_values = torch.empty((splits, *values.shape), dtype=torch.float32, device=query.device)
        distributed_bwd_key_kernel[(key_tiles, splits, maps)](
            *inputs, grad_keys, grad_values, *strides, H, W, num_keys, -(-query_tiles // splits), scale,
            *shape, large, **tiles,
        )  # fmt: skip
    return grad_keys.sum(0), grad_values.sum(0)
