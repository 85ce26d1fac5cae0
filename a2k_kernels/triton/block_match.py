"""block_match: a matrix product of whole blocks whose result never reaches memory, only its row-wise argmax."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from a2k_kernels.blocks import count_blocks
from a2k_kernels.triton.configs import match_splits, match_tiles
from a2k_kernels.triton.tiles import architecture, dot, is_large, on_device, without_spills

NO_INDEX = tl.constexpr(2147483647)


@triton.jit
def row_argmax(scores, number):
    """Per row: the largest score and the lowest number that has it; NaN is larger than all, as in torch.argmax.

    scores: [rows, columns]; number: [columns] int32. Returns [rows] each.
    """
    has_nan = tl.max((scores != scores).to(tl.int32), axis=1) > 0
    largest = tl.where(has_nan, float("nan"), tl.max(scores, axis=1))
    is_best = (scores == largest[:, None]) | (scores != scores)
    return largest, tl.min(tl.where(is_best, number[None, :], NO_INDEX), axis=1)


@triton.jit
def replaces(score, best):
    """Whether a later score beats the best so far: ties keep the earlier one, NaN beats all numbers."""
    return (best == best) & ((score > best) | (score != score))


@triton.jit
def block_origins(ptr, strides, batch, head, block, num_blocks, height, width, DIM, BLOCK_SIZE, LARGE: tl.constexpr):
    """Pointers to the first element of the given blocks, and how many rows and columns remain there: [blocks] each.

    Beyond the last block it is repeated: it wins no argmax, as ties go to the lowest index.
    """
    blocks_per_row = tl.cdiv(width, BLOCK_SIZE)
    block = tl.minimum(block, num_blocks - 1)
    row, col = block // blocks_per_row * BLOCK_SIZE, block % blocks_per_row * BLOCK_SIZE
    if LARGE:
        row, col, head = row.to(tl.int64), col.to(tl.int64), head.to(tl.int64)
    image = ptr + batch.to(tl.int64) * strides[0] + head * DIM * strides[1]
    return image + row * strides[2] + col * strides[3], height - row, width - col


@triton.jit
def load_depths(
    origin, rows, cols, strides, first,
    DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Elements first .. first + BLOCK_K - 1 of blocks laid out as (points, DIM), 0 where there is none."""
    depth = first + tl.arange(0, BLOCK_K)
    point, d = depth // DIM, depth % DIM
    row, col = point // BLOCK_SIZE, point % BLOCK_SIZE
    exists = (row[None, :] < rows[:, None]) & (col[None, :] < cols[:, None])
    exists &= (depth < BLOCK_SIZE * BLOCK_SIZE * DIM)[None, :]
    if LARGE:
        row, col, d = row.to(tl.int64), col.to(tl.int64), d.to(tl.int64)
    offset = row * strides[2] + col * strides[3] + d * strides[1]
    return tl.load(origin[:, None] + offset[None, :], mask=exists, other=0.0)  # [blocks, BLOCK_K]


@triton.jit
def block_match_kernel(
    query_ptr, key_ptr, score_ptr, index_ptr, query_strides, key_strides,
    height, width, key_height, key_width, num_blocks, num_key_blocks, tiles_per_split,
    DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, NUM_HEADS: tl.constexpr,
    PRECISION: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """index_x = argmax_z sum_y <q_{x,y}, k_{z,y}>. One program: BLOCK_M query blocks by one range of key blocks.

    Writes the best score and index of its range to (splits, B * NUM_HEADS, num_blocks).
    """
    split, map_number = tl.program_id(0), tl.program_id(2)  # splits first: neighbours read the same query blocks
    batch, head = map_number // NUM_HEADS, map_number % NUM_HEADS
    block = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    query, rows, cols = block_origins(
        query_ptr, query_strides, batch, head, block, num_blocks, height, width, DIM, BLOCK_SIZE, LARGE
    )
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    best_index = tl.full([BLOCK_M], NO_INDEX, tl.int32)

    for tile in range(split * tiles_per_split, (split + 1) * tiles_per_split):
        key_block = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        key, key_rows, key_cols = block_origins(
            key_ptr, key_strides, batch, head, key_block, num_key_blocks, key_height, key_width, DIM, BLOCK_SIZE, LARGE
        )
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(0, BLOCK_SIZE * BLOCK_SIZE * DIM, BLOCK_K):
            q = load_depths(query, rows, cols, query_strides, first, DIM, BLOCK_SIZE, BLOCK_K, LARGE)
            k = load_depths(key, key_rows, key_cols, key_strides, first, DIM, BLOCK_SIZE, BLOCK_K, LARGE)
            scores = dot(q, tl.trans(k), scores, PRECISION)
        score, index = row_argmax(scores, key_block)
        better = replaces(score, best) | (best_index == NO_INDEX)
        best = tl.where(better, score, best)
        best_index = tl.where(better, index, best_index)

    target = (split * tl.num_programs(2) + map_number).to(tl.int64) * num_blocks + block
    tl.store(score_ptr + target, best, mask=block < num_blocks)
    tl.store(index_ptr + target, best_index, mask=block < num_blocks)


@triton.jit
def best_split_kernel(score_ptr, index_ptr, out_ptr, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Best of the SPLITS ranges for BLOCK query blocks; inputs (SPLITS, count), output (count)."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    best = tl.load(score_ptr + place, mask=inside)
    best_index = tl.load(index_ptr + place, mask=inside)
    for split in range(1, SPLITS):
        score = tl.load(score_ptr + split * count + place, mask=inside)
        index = tl.load(index_ptr + split * count + place, mask=inside)
        better = replaces(score, best)  # never in an empty range, whose score is -inf
        best = tl.where(better, score, best)
        best_index = tl.where(better, index, best_index)
    tl.store(out_ptr + place, best_index, mask=inside)


def block_match(query: Tensor, key: Tensor, *, block_size: int, num_heads: int, precision: str) -> Tensor:
    """int32 (B, num_heads, n_query_blocks)."""
    (B, C, H, W), (key_height, key_width) = query.shape, key.shape[-2:]
    rows, cols = count_blocks((H, W), block_size)
    key_rows, key_cols = count_blocks((key_height, key_width), block_size)
    blocks, key_blocks, maps = rows * cols, key_rows * key_cols, B * num_heads
    if B == 0:
        return torch.empty((B, num_heads, blocks), dtype=torch.int32, device=query.device)
    depth = block_size**2 * (C // num_heads)
    tiles = without_spills(
        match_tiles(blocks, key_blocks, depth, maps, query.element_size(), architecture(query)), query
    )
    programs, key_tiles = -(-blocks // tiles["BLOCK_M"]), -(-key_blocks // tiles["BLOCK_N"])
    splits = match_splits(programs * maps, key_tiles)
    score = torch.empty((splits, maps, blocks), dtype=torch.float32, device=query.device)
    index = torch.empty((splits, maps, blocks), dtype=torch.int32, device=query.device)
    with on_device(query):
        block_match_kernel[(splits, programs, maps)](
            query, key, score, index, query.stride(), key.stride(),
            H, W, key_height, key_width, blocks, key_blocks, -(-key_tiles // splits),
            C // num_heads, block_size, num_heads, precision, is_large(query, key), **tiles,
        )  # fmt: skip
        if splits > 1:
            score, index = score.flatten(1), index.flatten(1)
            best = torch.empty(maps * blocks, dtype=torch.int32, device=query.device)
            best_split_kernel[(-(-(maps * blocks) // 128),)](score, index, best, maps * blocks, splits, 128)
            index = best
    return index.view(B, num_heads, blocks)
