"""block_attention: forward, and a backward in which every program owns a key block (or a segment of its queries).

Matching is a function: every query block has one key block. So the program that owns a key block owns all query
blocks that chose it, and writes grad_query, grad_key and grad_value without atomics, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from a2k_kernels.blocks import count_blocks
from a2k_kernels.triton.configs import attention_backward_tiles, attention_tiles, fits_one_tile
from a2k_kernels.triton.tiles import (
    LOG2E,
    architecture,
    block_points,
    dot,
    is_large,
    load_tile,
    on_device,
    store_tile,
    without_spills,
)

SEGMENT = 16  # query blocks of one key block that a backward program handles


@triton.jit
def attention_weights(scores, key_exists, scale):
    """softmax(scale * scores) over the key points that exist: [BLOCK_M, BLOCK_N]."""
    scores = tl.where(key_exists[None, :], scores * (scale * LOG2E), float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def key_block_points(block, num_blocks, height, width, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row, column and existence of a key block's points, and which of them to load: four [BLOCK_N] vectors.

    A block out of range has the shape of block 0, of which nothing is loaded: its keys and values are zero.
    """
    in_range = (block >= 0) & (block < num_blocks)
    row, col, exists = block_points(tl.where(in_range, block, 0), 0, height, width, BLOCK_SIZE, BLOCK_N)
    return row, col, exists, exists & (row < tl.where(in_range, height, 0))


@triton.jit
def block_attention_fwd_kernel(
    query_ptr, key_ptr, value_ptr, index_ptr, out_ptr,
    query_strides, key_strides, value_strides, out_strides,
    height, width, key_height, key_width, num_blocks, num_key_blocks, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, NUM_HEADS: tl.constexpr,
    PRECISION: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """out_x = sum_y softmax_y(scale <q_x, k_y>) v_y. One program: BLOCK_M points of one query block of one head."""
    TILES: tl.constexpr = (BLOCK_SIZE * BLOCK_SIZE + BLOCK_M - 1) // BLOCK_M
    program, batch = tl.program_id(0), tl.program_id(1)
    head, tile, block = program % NUM_HEADS, program // NUM_HEADS % TILES, program // (NUM_HEADS * TILES)
    selected = tl.load(index_ptr + (batch * NUM_HEADS + head).to(tl.int64) * num_blocks + block)
    row, col, exists = block_points(block, tile * BLOCK_M, height, width, BLOCK_SIZE, BLOCK_M)
    key_row, key_col, key_exists, loadable = key_block_points(
        selected, num_key_blocks, key_height, key_width, BLOCK_SIZE, BLOCK_N
    )
    # The first chunk of the value before the products, for both loads to be under way at once.
    v = load_tile(value_ptr, value_strides, batch, head, 0, key_row, key_col, loadable, VALUE_DIM, BLOCK_DV, LARGE)
    scores = tile_products(
        query_ptr, query_strides, row, col, exists, key_ptr, key_strides, key_row, key_col, loadable, batch, head,
        DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, LARGE,
    )  # fmt: skip
    weights = attention_weights(scores, key_exists, scale).to(v.dtype)

    for chunk in range(0, tl.cdiv(VALUE_DIM, BLOCK_DV)):
        out = dot(weights, v, tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), PRECISION)
        store_tile(out_ptr, out_strides, out, batch, head, chunk, row, col, exists, VALUE_DIM, BLOCK_DV, LARGE)
        v = load_tile(
            value_ptr, value_strides, batch, head, chunk + 1, key_row, key_col, loadable, VALUE_DIM, BLOCK_DV, LARGE
        )  # [BLOCK_N, BLOCK_DV]


@triton.jit
def read_segment(list_start_ptr, segment_start_ptr, slot_start_ptr, owner, program, map_number, num_lists, SEGMENT):
    """(first item, end, workspace slot or -1) of the segment of owner's list that belongs to this program."""
    lists = map_number * (num_lists + 1) + owner
    segment = program - tl.load(segment_start_ptr + lists)
    first = tl.load(list_start_ptr + lists) + segment * SEGMENT
    end = tl.minimum(first + SEGMENT, tl.load(list_start_ptr + lists + 1))
    slot = tl.load(slot_start_ptr + lists) + segment
    is_split = tl.load(slot_start_ptr + lists + 1) > tl.load(slot_start_ptr + lists)
    return first, end, tl.where(is_split, slot, -1)


@triton.jit
def slot_pointers(
    ptr, map_number, num_slots, slot, chunk, BLOCK_R: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Pointers to one chunk of a workspace slot; the workspace is (maps, slots, chunks, BLOCK_R, BLOCK_D)."""
    tile = (map_number.to(tl.int64) * num_slots + slot) * tl.cdiv(DIM, BLOCK_D) + chunk
    return ptr + tile * (BLOCK_R * BLOCK_D) + tl.arange(0, BLOCK_R)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def block_attention_bwd_kernel(
    query_ptr, key_ptr, value_ptr, grad_out_ptr, grad_query_ptr, grad_key_ptr, grad_value_ptr,
    key_workspace_ptr, value_workspace_ptr,
    order_ptr, list_start_ptr, segment_start_ptr, slot_start_ptr, owner_ptr,
    query_strides, key_strides, value_strides, grad_out_strides,
    grad_query_strides, grad_key_strides, grad_value_strides,
    height, width, key_height, key_width, num_blocks, num_lists, num_slots, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, NUM_HEADS: tl.constexpr,
    SEGMENT: tl.constexpr, PRECISION: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dV = P^T dO, dP = dO V^T, dS = scale P (dP - rowsum(P dP)), dQ = dS K, dK = dS^T Q.

    One program: one key block of one head, which fits in one tile, and at most SEGMENT of its query blocks, BLOCK_M
    points at a time. The list after the last key block holds the query blocks whose index is out of range: they get
    zero gradient.
    """
    TILES: tl.constexpr = (BLOCK_SIZE * BLOCK_SIZE + BLOCK_M - 1) // BLOCK_M
    program, map_number = tl.program_id(0), tl.program_id(1)
    batch, head = map_number // NUM_HEADS, map_number % NUM_HEADS
    owner = tl.load(owner_ptr + map_number * tl.num_programs(0) + program)
    if owner >= num_lists:
        return
    key_row, key_col, key_exists, stored = key_block_points(
        owner, num_lists - 1, key_height, key_width, BLOCK_SIZE, BLOCK_N
    )
    k = load_tile(key_ptr, key_strides, batch, head, 0, key_row, key_col, stored, DIM, BLOCK_D, LARGE)
    v = load_tile(value_ptr, value_strides, batch, head, 0, key_row, key_col, stored, VALUE_DIM, BLOCK_DV, LARGE)
    first, end, slot = read_segment(
        list_start_ptr, segment_start_ptr, slot_start_ptr, owner, program, map_number, num_lists, SEGMENT
    )
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    for item in range(first * TILES, end * TILES):
        block = tl.load(order_ptr + map_number.to(tl.int64) * num_blocks + item // TILES)
        row, col, exists = block_points(block, item % TILES * BLOCK_M, height, width, BLOCK_SIZE, BLOCK_M)
        q = load_tile(query_ptr, query_strides, batch, head, 0, row, col, exists, DIM, BLOCK_D, LARGE)
        grad_out = load_tile(
            grad_out_ptr, grad_out_strides, batch, head, 0, row, col, exists, VALUE_DIM, BLOCK_DV, LARGE
        )  # [BLOCK_M, BLOCK_DV]
        weights = attention_weights(dot(q, tl.trans(k), zeros, PRECISION), key_exists, scale)
        grad_weights = dot(grad_out, tl.trans(v), zeros, PRECISION)
        grad_scores = softmax_gradient(weights, grad_weights, scale).to(k.dtype)  # [BLOCK_M, BLOCK_N]
        if grad_query_ptr is not None:
            grad_q = dot(grad_scores, k, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), PRECISION)
            store_tile(
                grad_query_ptr, grad_query_strides, grad_q, batch, head, 0, row, col, exists, DIM, BLOCK_D, LARGE
            )
        if grad_key_ptr is not None:
            grad_k = dot(tl.trans(grad_scores), q, grad_k, PRECISION)
        if grad_value_ptr is not None:
            grad_v = dot(tl.trans(weights.to(v.dtype)), grad_out, grad_v, PRECISION)

    if grad_key_ptr is not None:
        if slot >= 0:  # add_segments_kernel adds them up
            tl.store(slot_pointers(key_workspace_ptr, map_number, num_slots, slot, 0, BLOCK_N, DIM, BLOCK_D), grad_k)
        else:
            store_tile(
                grad_key_ptr, grad_key_strides, grad_k, batch, head, 0, key_row, key_col, stored, DIM, BLOCK_D, LARGE
            )
    if grad_value_ptr is not None:
        if slot >= 0:
            tl.store(
                slot_pointers(value_workspace_ptr, map_number, num_slots, slot, 0, BLOCK_N, VALUE_DIM, BLOCK_DV), grad_v
            )
        else:
            store_tile(
                grad_value_ptr, grad_value_strides, grad_v, batch, head, 0, key_row, key_col, stored,
                VALUE_DIM, BLOCK_DV, LARGE,
            )  # fmt: skip


@triton.jit
def softmax_gradient(weights, grad_weights, scale):
    """Gradient of the unscaled scores: scale P (dP - rowsum(P dP))."""
    delta = tl.sum(weights * grad_weights, axis=1)
    return weights * (grad_weights - delta[:, None]) * scale


@triton.jit
def tile_products(
    a_ptr, a_strides, a_row, a_col, a_exists, b_ptr, b_strides, b_row, b_col, b_exists, batch, head,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """<a_x, b_y> of all points x, y of two blocks, the channels in chunks: [BLOCK_M, BLOCK_N]."""
    products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for chunk in range(0, tl.cdiv(DIM, BLOCK_D)):
        a = load_tile(a_ptr, a_strides, batch, head, chunk, a_row, a_col, a_exists, DIM, BLOCK_D, LARGE)
        b = load_tile(b_ptr, b_strides, batch, head, chunk, b_row, b_col, b_exists, DIM, BLOCK_D, LARGE)
        products = dot(a, tl.trans(b), products, PRECISION)
    return products


@triton.jit
def block_attention_bwd_query_kernel(
    query_ptr, key_ptr, value_ptr, grad_out_ptr, index_ptr, grad_query_ptr,
    query_strides, key_strides, value_strides, grad_out_strides, grad_query_strides,
    height, width, key_height, key_width, num_blocks, num_key_blocks, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, NUM_HEADS: tl.constexpr,
    PRECISION: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dQ = dS K where a block does not fit one tile. One program: BLOCK_M points of one query block of one head."""
    TILES: tl.constexpr = (BLOCK_SIZE * BLOCK_SIZE + BLOCK_M - 1) // BLOCK_M
    program, batch = tl.program_id(0), tl.program_id(1)
    head, tile, block = program % NUM_HEADS, program // NUM_HEADS % TILES, program // (NUM_HEADS * TILES)
    selected = tl.load(index_ptr + (batch * NUM_HEADS + head).to(tl.int64) * num_blocks + block)
    row, col, exists = block_points(block, tile * BLOCK_M, height, width, BLOCK_SIZE, BLOCK_M)
    key_row, key_col, key_exists, loadable = key_block_points(
        selected, num_key_blocks, key_height, key_width, BLOCK_SIZE, BLOCK_N
    )
    scores = tile_products(
        query_ptr, query_strides, row, col, exists, key_ptr, key_strides, key_row, key_col, loadable, batch, head,
        DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, LARGE,
    )  # fmt: skip
    grad_weights = tile_products(
        grad_out_ptr, grad_out_strides, row, col, exists, value_ptr, value_strides, key_row, key_col, loadable,
        batch, head, VALUE_DIM, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, LARGE,
    )  # fmt: skip
    weights = attention_weights(scores, key_exists, scale)
    grad_scores = softmax_gradient(weights, grad_weights, scale)  # [BLOCK_M, BLOCK_N]
    for chunk in range(0, tl.cdiv(DIM, BLOCK_D)):
        k = load_tile(key_ptr, key_strides, batch, head, chunk, key_row, key_col, loadable, DIM, BLOCK_D, LARGE)
        grad_q = dot(grad_scores.to(k.dtype), k, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), PRECISION)
        store_tile(
            grad_query_ptr, grad_query_strides, grad_q, batch, head, chunk, row, col, exists, DIM, BLOCK_D, LARGE
        )


@triton.jit
def block_attention_bwd_key_kernel(
    query_ptr, key_ptr, value_ptr, grad_out_ptr, grad_ptr, workspace_ptr,
    order_ptr, list_start_ptr, segment_start_ptr, slot_start_ptr, owner_ptr,
    query_strides, key_strides, value_strides, grad_out_strides, grad_strides,
    height, width, key_height, key_width, num_blocks, num_lists, num_slots, scale,
    OF_KEY: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr, SEGMENT: tl.constexpr, PRECISION: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dK = dS^T Q (OF_KEY) or dV = P^T dO where a block does not fit one tile.

    One program: one chunk of channels of one key block of one head and at most SEGMENT of its query blocks.
    """
    TILES: tl.constexpr = (BLOCK_SIZE * BLOCK_SIZE + BLOCK_M - 1) // BLOCK_M
    GRAD_DIM: tl.constexpr = DIM if OF_KEY else VALUE_DIM
    GRAD_BLOCK: tl.constexpr = BLOCK_D if OF_KEY else BLOCK_DV
    program, map_number, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = map_number // NUM_HEADS, map_number % NUM_HEADS
    owner = tl.load(owner_ptr + map_number * tl.num_programs(0) + program)
    if owner >= num_lists - 1:  # the last list has no key block
        return
    first, end, slot = read_segment(
        list_start_ptr, segment_start_ptr, slot_start_ptr, owner, program, map_number, num_lists, SEGMENT
    )
    key_row, key_col, key_exists = block_points(owner, 0, key_height, key_width, BLOCK_SIZE, BLOCK_N)
    grad = tl.zeros([BLOCK_N, GRAD_BLOCK], tl.float32)

    for item in range(first * TILES, end * TILES):
        block = tl.load(order_ptr + map_number.to(tl.int64) * num_blocks + item // TILES)
        row, col, exists = block_points(block, item % TILES * BLOCK_M, height, width, BLOCK_SIZE, BLOCK_M)
        scores = tile_products(
            query_ptr, query_strides, row, col, exists, key_ptr, key_strides, key_row, key_col, key_exists,
            batch, head, DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, LARGE,
        )  # fmt: skip
        weights = attention_weights(scores, key_exists, scale)
        if OF_KEY:
            grad_weights = tile_products(
                grad_out_ptr, grad_out_strides, row, col, exists, value_ptr, value_strides, key_row, key_col,
                key_exists, batch, head, VALUE_DIM, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, LARGE,
            )  # fmt: skip
            weights = softmax_gradient(weights, grad_weights, scale)
            x = load_tile(query_ptr, query_strides, batch, head, chunk, row, col, exists, DIM, BLOCK_D, LARGE)
        else:
            x = load_tile(
                grad_out_ptr, grad_out_strides, batch, head, chunk, row, col, exists, VALUE_DIM, BLOCK_DV, LARGE
            )
        grad = dot(tl.trans(weights.to(x.dtype)), x, grad, PRECISION)

    if slot >= 0:
        tl.store(slot_pointers(workspace_ptr, map_number, num_slots, slot, chunk, BLOCK_N, GRAD_DIM, GRAD_BLOCK), grad)
    else:
        store_tile(
            grad_ptr, grad_strides, grad, batch, head, chunk, key_row, key_col, key_exists, GRAD_DIM, GRAD_BLOCK, LARGE
        )


@triton.jit
def add_segments_kernel(
    workspace_ptr, grad_ptr, slot_start_ptr, grad_strides, height, width, num_lists, num_slots,
    DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, NUM_HEADS: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Sum over the segments, in a fixed order, of a key block whose list was split. One program: ROWS points of a chunk
    of channels of a block; SLOTS segments are read at a time, three times as many ahead."""
    TILES: tl.constexpr = BLOCK_R // ROWS
    block, map_number = tl.program_id(0), tl.program_id(1)
    chunk, first_point = tl.program_id(2) // TILES, tl.program_id(2) % TILES * ROWS
    batch, head = map_number // NUM_HEADS, map_number % NUM_HEADS
    slot_start = slot_start_ptr + map_number * (num_lists + 1) + block
    first, end = tl.load(slot_start), tl.load(slot_start + 1)
    if first == end:
        return
    slots = tl.arange(0, SLOTS)[:, None, None]
    points = first_point + tl.arange(0, ROWS)[None, :, None]
    tile = tl.cdiv(DIM, BLOCK_D) * BLOCK_R * BLOCK_D  # elements of a slot
    place = chunk * (BLOCK_R * BLOCK_D) + points * BLOCK_D + tl.arange(0, BLOCK_D)[None, None, :]
    grad = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for slot in tl.range(first, end, SLOTS, num_stages=4):
        pointers = workspace_ptr + (map_number.to(tl.int64) * num_slots + slot + slots) * tile + place
        grad += tl.sum(tl.load(pointers, mask=slot + slots < end, other=0.0), axis=0)  # of [SLOTS, ROWS, BLOCK_D]
    row, col, exists = block_points(block, first_point, height, width, BLOCK_SIZE, ROWS)
    store_tile(grad_ptr, grad_strides, grad, batch, head, chunk, row, col, exists, DIM, BLOCK_D, LARGE)


def block_attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, out: Tensor,
    *, block_size: int, num_heads: int, scale: float, precision: str,
) -> None:  # fmt: skip
    """Fill out: (B, C_v, H, W). index: contiguous."""
    (B, C, H, W), (key_height, key_width) = query.shape, key.shape[-2:]
    dim, value_dim, blocks = C // num_heads, value.shape[1] // num_heads, index.shape[-1]
    tiles = without_spills(attention_tiles(block_size, dim, value_dim, query.element_size()), query)
    grid = (blocks * -(-(block_size**2) // tiles["BLOCK_M"]) * num_heads, B)
    key_rows, key_cols = count_blocks((key_height, key_width), block_size)
    if B == 0:
        return
    with on_device(query):
        block_attention_fwd_kernel[grid](
            query, key, value, index, out,
            query.stride(), key.stride(), value.stride(), out.stride(),
            H, W, key_height, key_width, blocks, key_rows * key_cols, scale,
            dim, value_dim, block_size, num_heads, precision, is_large(query, key, value, out),
            **tiles,
        )  # fmt: skip


class QueryLists:
    """Which query blocks chose each key block, in segments of at most SEGMENT (see block_attention_bwd_kernel).

    list_start, segment_start, slot_start: where each list, its segments and its workspace slots begin; order: the
    query blocks by list; owner: the list of every program. All int32, one row per batch and head.
    """

    def __init__(self, index: Tensor, num_key_blocks: int) -> None:
        maps, blocks = index.flatten(0, 1), index.shape[-1]
        self.num_lists = num_key_blocks + 1  # the last one: index out of range
        self.num_programs = -(-blocks // SEGMENT) + self.num_lists
        self.num_slots = 2 * -(-blocks // SEGMENT)  # a split list has at most 2 * count / SEGMENT segments
        maps = torch.where((maps < 0) | (maps >= num_key_blocks), num_key_blocks, maps)
        values, order = maps.sort(dim=-1, stable=True)
        order = order.int()
        numbers = torch.arange(self.num_lists + 1, device=index.device, dtype=values.dtype)
        starts = torch.searchsorted(values, numbers.expand(len(maps), -1).contiguous(), out_int32=True)
        segments = ((starts.diff(dim=-1) + SEGMENT - 1) // SEGMENT).clamp(min=1)
        segment_start = exclusive_sum(segments)
        self.slot_start = exclusive_sum(torch.where(segments > 1, segments, 0))
        programs = torch.arange(self.num_programs, device=index.device, dtype=torch.int32)
        owner = torch.searchsorted(
            segment_start[:, 1:].contiguous(),
            programs.expand(len(maps), -1).contiguous(),
            right=True,
            out_int32=True,
        )
        self.tensors = (order, starts, segment_start, self.slot_start, owner)  # as the kernels take them

    def workspace(self, maps: int, block_r: int, dim: int, block_d: int) -> Tensor:
        """float32 partial gradients of the split lists, see slot_pointers."""
        shape = (maps, self.num_slots, -(-dim // block_d), block_r, block_d)
        return torch.empty(shape, dtype=torch.float32, device=self.slot_start.device)


def exclusive_sum(x: Tensor) -> Tensor:
    """(maps, n) -> int32 (maps, n + 1): sums of everything before each place, and of all."""
    return torch.nn.functional.pad(x.cumsum(-1, dtype=torch.int32), (1, 0))


def block_attention_bwd(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, grad_out: Tensor,
    grad_query: Tensor | None, grad_key: Tensor | None, grad_value: Tensor | None,
    *, block_size: int, num_heads: int, scale: float, precision: str,
) -> None:  # fmt: skip
    """Fill those of the three gradients that are not None, each of its input's shape."""
    (B, C, H, W), (key_height, key_width) = query.shape, key.shape[-2:]
    dim, value_dim, blocks = C // num_heads, value.shape[1] // num_heads, index.shape[-1]
    key_rows, key_cols = count_blocks((key_height, key_width), block_size)
    if B == 0:
        return
    lists = QueryLists(index, key_rows * key_cols)
    grads = [grad for grad in (grad_query, grad_key, grad_value) if grad is not None]
    shape = (dim, value_dim, block_size, num_heads)
    size = (H, W, key_height, key_width, blocks)
    large = is_large(query, key, value, grad_out, *grads)
    tiles = without_spills(
        attention_backward_tiles(block_size, dim, value_dim, query.element_size(), architecture(query)), query
    )
    maps, inputs = B * num_heads, (query, key, value, grad_out)
    key_workspace, value_workspace = (
        lists.workspace(maps, tiles["BLOCK_N"], channels, tiles[block]) if grad is not None else None
        for grad, channels, block in ((grad_key, dim, "BLOCK_D"), (grad_value, value_dim, "BLOCK_DV"))
    )
    strides = [x.stride() for x in inputs]
    with on_device(query):
        if fits_one_tile(block_size, dim, value_dim):
            block_attention_bwd_kernel[(lists.num_programs, maps)](
                *inputs, grad_query, grad_key, grad_value, key_workspace, value_workspace, *lists.tensors,
                *strides, *(None if grad is None else grad.stride() for grad in (grad_query, grad_key, grad_value)),
                *size, lists.num_lists, lists.num_slots, scale, *shape, SEGMENT, precision, large, **tiles,
            )  # fmt: skip
        else:
            if grad_query is not None:
                block_attention_bwd_query_kernel[(blocks * -(-(block_size**2) // tiles["BLOCK_M"]) * num_heads, B)](
                    *inputs, index, grad_query, *strides, grad_query.stride(),
                    *size, key_rows * key_cols, scale, *shape, precision, large, **tiles,
                )  # fmt: skip
            for of_key, grad, workspace, channels, block in (
                (True, grad_key, key_workspace, dim, "BLOCK_D"),
                (False, grad_value, value_workspace, value_dim, "BLOCK_DV"),
            ):
                if grad is not None:
                    block_attention_bwd_key_kernel[(lists.num_programs, maps, -(-channels // tiles[block]))](
                        *inputs, grad, workspace, *lists.tensors, *strides, grad.stride(),
                        *size, lists.num_lists, lists.num_slots, scale,
                        of_key, *shape, SEGMENT, precision, large, **tiles,
                    )  # fmt: skip
        if blocks <= SEGMENT:  # no list can have been split
            return
        for grad, workspace, channels, block in (
            (grad_key, key_workspace, dim, "BLOCK_D"),
            (grad_value, value_workspace, value_dim, "BLOCK_DV"),
        ):
            if grad is not None:
                parts = -(-channels // tiles[block]) * (tiles["BLOCK_N"] // 16)
                add_segments_kernel[(key_rows * key_cols, maps, parts)](
                    workspace, grad, lists.slot_start, grad.stride(), key_height, key_width,
                    lists.num_lists, lists.num_slots, channels, block_size, num_heads, large,
                    BLOCK_R=tiles["BLOCK_N"], BLOCK_D=tiles[block], ROWS=16, SLOTS=min(4, 256 // tiles[block]),
                    num_warps=max(1, tiles[block] // 16),
                )  # fmt: skip
