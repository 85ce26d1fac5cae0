"""What every kernel reads, writes and computes, from the arguments of a launch.

The bytes are those that the loads and stores in the kernels' source ask for, masked lanes left out; tests/benchmarks
compares them with what Triton's interpreter sees.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32 = INT32 = 4


@dataclass(frozen=True)
class Access:
    """Bytes of one tensor that a launch asks for, all programs together.

    again: the same program has just read them before. is_tile: whole tiles of a map, not a number or a row. in_step:
    programs that read the same bytes at about the same time, so that a cache serves all but one. window: bytes that
    every running program reads over and over; where those of all, or all of the tensor's, fit the cache, memory moves
    `once` bytes.
    """

    tensor: str
    bytes: float
    is_store: bool = False
    again: bool = False
    is_tile: bool = True
    in_step: float = 1
    window: float = 0
    once: float = 0


@dataclass(frozen=True)
class Work:
    """active: programs that do not return at once. loops: iterations of the source's loops, in its order, per active
    program; an inner loop's over all of the outer's. exponentials: of the softmax. padding: channels in a tile over
    channels of a head."""

    active: int
    accesses: tuple[Access, ...]
    loops: tuple[float, ...] = ()
    flops: float = 0
    exponentials: float = 0
    padding: float = 1


def load(tensor: str, size: float, **more) -> Access:
    return Access(tensor, size, **more)


def store(tensor: str, size: float, **more) -> Access:
    return Access(tensor, size, is_store=True, **more)


def block_sizes(height: int, width: int, block_size: int) -> Tensor:
    """Points of every block of a map: (n)."""
    rows, cols = (
        torch.tensor([min(block_size, extent - first) for first in range(0, extent, block_size)])
        for extent in (height, width)
    )
    return (rows[:, None] * cols).flatten()


def cover(extent: int, tile: int) -> int:
    return -(-extent // tile)


def count_work(kernel: str, grid: tuple[int, ...], arguments: dict) -> Work:
    """arguments: by the kernel's parameter names."""
    return KERNELS[kernel](grid, arguments)


def aggregate_forward(grid: tuple[int, ...], a: dict) -> Work:
    programs, element = grid[0] * grid[1], a["key_ptr"].element_size()
    points = a["height"] * a["width"] * a["NUM_HEADS"] * grid[1]
    chunks = cover(a["DIM"], a["BLOCK_D"])
    key = points * a["DIM"] * element
    return Work(
        programs,
        (
            load("key", key),
            load("key", key, again=chunks == 1),
            load("value", points * a["VALUE_DIM"] * element),
            load("alpha", programs * a["alpha_ptr"].element_size(), is_tile=False),
            load("beta", programs * a["beta_ptr"].element_size(), is_tile=False),
            store("key_out", programs * a["DIM"] * element, is_tile=False),
            store("value_out", programs * a["VALUE_DIM"] * element, is_tile=False),
        ),
        loops=constant_loops(chunks, chunks, cover(a["VALUE_DIM"], a["BLOCK_DV"])),
        padding=chunks * a["BLOCK_D"] / a["DIM"],
    )


def aggregate_backward(grid: tuple[int, ...], a: dict) -> Work:
    programs, element = grid[0] * grid[1], a["key_ptr"].element_size()
    points = a["height"] * a["width"] * a["NUM_HEADS"] * grid[1]
    chunks, value_chunks = cover(a["DIM"], a["BLOCK_D"]), cover(a["VALUE_DIM"], a["BLOCK_DV"])
    key, value = points * a["DIM"] * element, points * a["VALUE_DIM"] * element
    row, value_row = programs * a["DIM"] * element, programs * a["VALUE_DIM"] * element
    accesses = [
        load("key", key),
        load("key", key, again=chunks == 1),
        load("value", value),
        load("grad_key_agg", row, is_tile=False),
        load("grad_value_agg", value_row, is_tile=False),
        load("alpha", programs * a["alpha_ptr"].element_size(), is_tile=False),
        load("beta", programs * a["beta_ptr"].element_size(), is_tile=False),
        store("grad_alpha", programs * FLOAT32, is_tile=False),
        store("grad_beta", programs * FLOAT32, is_tile=False),
    ]
    if a["grad_value_ptr"] is not None:
        accesses += [
            load("grad_value_agg", value_row, again=value_chunks == 1, is_tile=False),
            store("grad_value", value),
        ]
    if a["grad_key_ptr"] is not None:
        accesses += [
            load("key", key, again=chunks == 1),
            load("grad_key_agg", row, again=chunks == 1, is_tile=False),
            store("grad_key", key),
        ]
    loops = constant_loops(chunks, chunks, value_chunks, chunks, value_chunks)
    return Work(programs, tuple(accesses), loops, padding=chunks * a["BLOCK_D"] / a["DIM"])


def constant_loops(*iterations: int) -> tuple[float, ...]:
    """Loops that run once are none."""
    return tuple(n for n in iterations if n > 1)


def chosen_points(a: dict) -> Tensor:
    """Points of the key block that every query block chose, 0 where the index is out of range: index's shape."""
    sizes = block_sizes(a["key_height"], a["key_width"], a["BLOCK_SIZE"])
    index = a["index_ptr"].long()
    in_range = (index >= 0) & (index < len(sizes))
    return torch.where(in_range, sizes[index.clamp(0, len(sizes) - 1)], 0)


def attention_forward(grid: tuple[int, ...], a: dict) -> Work:
    programs, element = grid[0] * grid[1], a["query_ptr"].element_size()
    points = a["height"] * a["width"] * a["NUM_HEADS"] * grid[1]
    tiles = cover(a["BLOCK_SIZE"] ** 2, a["BLOCK_M"])
    key_points = chosen_points(a)
    pairs = (key_points * block_sizes(a["height"], a["width"], a["BLOCK_SIZE"])).sum().item()
    read = key_points.sum().item() * tiles * element
    return Work(
        programs,
        (
            load("index", programs * INT32, is_tile=False),
            load("query", points * a["DIM"] * element),
            load("key", read * a["DIM"], in_step=tiles),
            load("value", read * a["VALUE_DIM"], in_step=tiles),
            store("out", points * a["VALUE_DIM"] * element),
        ),
        loops=constant_loops(cover(a["DIM"], a["BLOCK_D"]), cover(a["VALUE_DIM"], a["BLOCK_DV"])),
        flops=2 * pairs * (a["DIM"] + a["VALUE_DIM"]),
        exponentials=pairs,
    )


def attention_backward_query(grid: tuple[int, ...], a: dict) -> Work:
    programs, element = grid[0] * grid[1], a["query_ptr"].element_size()
    points = a["height"] * a["width"] * a["NUM_HEADS"] * grid[1]
    tiles, chunks = cover(a["BLOCK_SIZE"] ** 2, a["BLOCK_M"]), cover(a["DIM"], a["BLOCK_D"])
    key_points = chosen_points(a)
    pairs = (key_points * block_sizes(a["height"], a["width"], a["BLOCK_SIZE"])).sum().item()
    key = key_points.sum().item() * tiles * a["DIM"] * element
    return Work(
        programs,
        (
            load("index", programs * INT32, is_tile=False),
            load("query", points * a["DIM"] * element),
            load("key", key, in_step=tiles),
            load("key", key, in_step=tiles, again=chunks == 1),
            load("value", key // a["DIM"] * a["VALUE_DIM"], in_step=tiles),
            load("grad_out", points * a["VALUE_DIM"] * element),
            store("grad_query", points * a["DIM"] * element),
        ),
        loops=constant_loops(chunks, cover(a["VALUE_DIM"], a["BLOCK_DV"]), chunks),
        flops=2 * pairs * (2 * a["DIM"] + a["VALUE_DIM"]),
        exponentials=pairs,
        padding=chunks * a["BLOCK_D"] / a["DIM"],
    )


@dataclass(frozen=True)
class Segments:
    """The segments that a backward launch works on, one per program that does not return at once.

    points: of the key block, 0 for the list without one. items: query blocks. split: whether the segment goes
    through the workspace.
    """

    points: Tensor
    items: Tensor
    split: Tensor


def find_segments(a: dict, with_last_list: bool) -> Segments:
    sizes = block_sizes(a["key_height"], a["key_width"], a["BLOCK_SIZE"])
    sizes = torch.cat([sizes, torch.zeros(1, dtype=sizes.dtype)])
    owner, starts, segment_start, slot_start = (
        a[f"{name}_ptr"].long() for name in ("owner", "list_start", "segment_start", "slot_start")
    )
    active = owner < a["num_lists"] - (not with_last_list)
    lists = owner.clamp(max=a["num_lists"] - 1)
    number = torch.arange(owner.shape[1]) - segment_start.gather(1, lists)
    first = starts.gather(1, lists) + number * a["SEGMENT"]
    items = torch.minimum(first + a["SEGMENT"], starts.gather(1, lists + 1)) - first
    split = slot_start.gather(1, lists + 1) > slot_start.gather(1, lists)
    return Segments(sizes[lists][active], items[active].clamp(min=0), split[active])


LIST_NUMBERS = 6 * INT32  # what a segment's program reads of the lists


def attention_backward(grid: tuple[int, ...], a: dict) -> Work:
    element, maps = a["query_ptr"].element_size(), grid[1]
    points = a["height"] * a["width"] * maps
    segments = find_segments(a, with_last_list=True)
    items, active = segments.items.sum().item(), len(segments.items)
    tiles = cover(a["BLOCK_SIZE"] ** 2, a["BLOCK_M"])
    key_points = segments.points.sum().item()
    accesses = [
        load("owner", grid[0] * maps * INT32, is_tile=False),
        load("lists", active * LIST_NUMBERS, is_tile=False),
        load("order", items * tiles * INT32, is_tile=False),
        load("key", key_points * a["DIM"] * element),
        load("value", key_points * a["VALUE_DIM"] * element),
        load("query", points * a["DIM"] * element),
        load("grad_out", points * a["VALUE_DIM"] * element),
    ]
    if a["grad_query_ptr"] is not None:
        accesses.append(store("grad_query", points * a["DIM"] * element))
    for name, dim, tile in (("key", a["DIM"], a["BLOCK_D"]), ("value", a["VALUE_DIM"], a["BLOCK_DV"])):
        if a[f"grad_{name}_ptr"] is not None:
            accesses += store_segments(name, segments, dim * element, a["BLOCK_N"] * tile)
    pairs = pairs_of(segments, a)
    return Work(
        active,
        tuple(accesses),
        loops=(items * tiles / active,),
        flops=2 * pairs * (3 * a["DIM"] + 2 * a["VALUE_DIM"]),
        exponentials=pairs,
    )


def store_segments(name: str, segments: Segments, point_bytes: int, slot_elements: int) -> list[Access]:
    """Gradients of key blocks: written where a list is whole, else a slot of the workspace per segment."""
    whole = segments.points[~segments.split].sum().item()
    slots = segments.split.sum().item()
    return [
        store(f"grad_{name}", whole * point_bytes),
        store(f"{name}_workspace", slots * slot_elements * FLOAT32),
    ]


def pairs_of(segments: Segments, a: dict) -> float:
    """Pairs of a query and a key point; exact where no query block is cut."""
    mean = a["height"] * a["width"] / a["num_blocks"]
    return (segments.points * segments.items).sum().item() * mean


def attention_backward_key(grid: tuple[int, ...], a: dict) -> Work:
    element, (programs, maps, chunks) = a["query_ptr"].element_size(), grid
    of_key = a["OF_KEY"]
    tiles = cover(a["BLOCK_SIZE"] ** 2, a["BLOCK_M"])
    segments = find_segments(a, with_last_list=False)
    items, active = segments.items.sum().item(), len(segments.items)
    points = a["height"] * a["width"] * maps
    # The key block once, then again for every further tile of queries.
    first = segments.points[segments.items > 0].sum().item() * chunks * element
    again = (segments.points * segments.items).sum().item() * tiles * chunks * element - first
    dim, grad = (a["DIM"], "key") if of_key else (a["VALUE_DIM"], "value")
    tile = a["BLOCK_D"] if of_key else a["BLOCK_DV"]
    accesses = [
        load("owner", programs * maps * chunks * INT32, is_tile=False),
        load("lists", active * chunks * LIST_NUMBERS, is_tile=False),
        load("order", items * tiles * chunks * INT32, is_tile=False),
        load("query", points * a["DIM"] * chunks * element, in_step=chunks),
        load("key", first * a["DIM"]),
        load("key", again * a["DIM"], again=True),
    ]
    if of_key:
        accesses += [
            load("value", first * a["VALUE_DIM"]),
            load("value", again * a["VALUE_DIM"], again=True),
            load("grad_out", points * a["VALUE_DIM"] * chunks * element, in_step=chunks),
        ]
    accesses.append(load("query" if of_key else "grad_out", points * dim * element, again=of_key))
    accesses += [
        access if access.tensor.startswith("grad") else store(access.tensor, access.bytes * chunks)
        for access in store_segments(grad, segments, dim * element, a["BLOCK_N"] * tile)
    ]
    pairs = pairs_of(segments, a)
    products = chunks * (a["DIM"] + (a["VALUE_DIM"] if of_key else 0))
    iterations = items * tiles / active
    inner = constant_loops(cover(a["DIM"], a["BLOCK_D"]), cover(a["VALUE_DIM"], a["BLOCK_DV"]) if of_key else 1)
    return Work(
        active * chunks,
        tuple(accesses),
        loops=(iterations, *(iterations * n for n in inner)),
        flops=2 * pairs * (products + dim),
        exponentials=pairs * chunks,
    )


def add_segments(grid: tuple[int, ...], a: dict) -> Work:
    blocks, maps, parts = grid
    slot_start = a["slot_start_ptr"].long()[:, : blocks + 1]
    slots = slot_start.diff(dim=1)
    split = slots > 0
    sizes = block_sizes(a["height"], a["width"], a["BLOCK_SIZE"])
    written = (split * sizes).sum().item() * a["DIM"] * a["grad_ptr"].element_size()
    active = max(1, split.sum().item())
    read = slots.sum().item() * parts * a["ROWS"] * a["BLOCK_D"] * FLOAT32
    steps = -(-slots // a["SLOTS"])
    return Work(
        split.sum().item() * parts,
        (
            load("slot_start", 2 * blocks * maps * parts * INT32, is_tile=False),
            load("workspace", read),
            store("grad", written),
        ),
        loops=(steps.sum().item() / active,),
    )


def match(grid: tuple[int, ...], a: dict) -> Work:
    (splits, programs, maps), element = grid, a["query_ptr"].element_size()
    row, tiles = maps * a["DIM"] * element, a["tiles_per_split"]
    depth = a["BLOCK_SIZE"] ** 2 * a["DIM"]
    query = row * points_with_repeats(a["height"], a["width"], a["BLOCK_SIZE"], programs * a["BLOCK_M"])
    key_rows = splits * tiles * a["BLOCK_N"]
    key = row * points_with_repeats(a["key_height"], a["key_width"], a["BLOCK_SIZE"], key_rows)
    results = splits * maps * a["num_blocks"]
    return Work(
        programs * splits * maps,
        (
            load("query", query * splits * tiles, window=a["BLOCK_M"] * depth * element / splits, once=query),
            load("key", key * programs, in_step=programs),
            store("score", results * FLOAT32, is_tile=False),
            store("index", results * INT32, is_tile=False),
        ),
        loops=(tiles, tiles * cover(depth, a["BLOCK_K"])),
        flops=2 * maps * a["num_blocks"] * a["num_key_blocks"] * depth,
    )


def points_with_repeats(height: int, width: int, block_size: int, count: int) -> int:
    """Points of `count` blocks, of which those beyond the last are the last."""
    sizes = block_sizes(height, width, block_size)
    return sizes.sum().item() + (count - len(sizes)) * sizes[-1].item()


def best_split(grid: tuple[int, ...], a: dict) -> Work:
    size = a["count"] * a["SPLITS"] * FLOAT32
    accesses = (
        load("score", size, is_tile=False),
        load("index", size, is_tile=False),
        store("out", a["count"] * INT32, is_tile=False),
    )
    return Work(grid[0], accesses, loops=constant_loops(a["SPLITS"] - 1))


def attend_forward(grid: tuple[int, ...], a: dict) -> Work:
    programs, element = grid[0] * grid[1], a["query_ptr"].element_size()
    points = a["height"] * a["width"] * a["NUM_HEADS"] * grid[1]
    rows = programs * cover(a["num_keys"], a["BLOCK_N"]) * a["BLOCK_N"] * element  # the last is repeated
    key, value = rows * a["DIM"], rows * a["VALUE_DIM"]
    pairs = points * a["num_keys"]
    return Work(
        programs,
        (
            load("query", points * a["DIM"] * element),
            load("key", key, in_step=grid[0] // a["NUM_HEADS"]),
            load("value", value, in_step=grid[0] // a["NUM_HEADS"]),
            store("out", points * a["VALUE_DIM"] * element),
            store("lse", points * FLOAT32, is_tile=False),
        ),
        loops=(a["num_keys"] // a["BLOCK_N"], cover(a["num_keys"] % a["BLOCK_N"], a["BLOCK_N"])),
        flops=2 * pairs * (a["DIM"] + a["VALUE_DIM"]),
        exponentials=pairs,
    )


def attend_backward_query(grid: tuple[int, ...], a: dict) -> Work:
    programs, element = grid[0] * grid[1], a["query_ptr"].element_size()
    points = a["height"] * a["width"] * a["NUM_HEADS"] * grid[1]
    rows = programs * cover(a["num_keys"], a["BLOCK_N"]) * a["BLOCK_N"] * element  # the last is repeated
    key, value = rows * a["DIM"], rows * a["VALUE_DIM"]
    pairs = points * a["num_keys"]
    return Work(
        programs,
        (
            load("query", points * a["DIM"] * element),
            load("out", points * a["VALUE_DIM"] * element),
            load("grad_out", points * a["VALUE_DIM"] * element),
            load("lse", points * FLOAT32, is_tile=False),
            load("key", key, in_step=grid[0] // a["NUM_HEADS"]),
            load("value", value, in_step=grid[0] // a["NUM_HEADS"]),
            store("grad_query", points * a["DIM"] * element),
        ),
        loops=(cover(a["num_keys"], a["BLOCK_N"]),),
        flops=2 * pairs * (2 * a["DIM"] + a["VALUE_DIM"]),
        exponentials=pairs,
    )


def attend_backward_key(grid: tuple[int, ...], a: dict) -> Work:
    (key_tiles, splits, maps), element = grid, a["query_ptr"].element_size()
    points = a["height"] * a["width"] * maps
    key, value = (a["num_keys"] * maps * a[d] for d in ("DIM", "VALUE_DIM"))
    rows = key_tiles * a["BLOCK_N"] * maps * splits * element  # the last is repeated
    pairs = points * a["num_keys"]
    read = points * key_tiles * element
    return Work(
        key_tiles * splits * maps,
        (
            load("key", rows * a["DIM"]),
            load("value", rows * a["VALUE_DIM"]),
            load("query", read * a["DIM"], in_step=key_tiles),
            load("out", read * a["VALUE_DIM"], in_step=key_tiles),
            load("grad_out", read * a["VALUE_DIM"], in_step=key_tiles),
            load("lse", points * key_tiles * FLOAT32, in_step=key_tiles, is_tile=False),
            store("grad_key", key * splits * FLOAT32),
            store("grad_value", value * splits * FLOAT32),
        ),
        loops=(a["tiles_per_split"],),
        flops=2 * pairs * (2 * a["DIM"] + 2 * a["VALUE_DIM"]),
        exponentials=pairs,
    )


KERNELS: dict[str, Callable[[tuple[int, ...], dict], Work]] = {
    "block_aggregate_fwd_kernel": aggregate_forward,
    "block_aggregate_bwd_kernel": aggregate_backward,
    "block_attention_fwd_kernel": attention_forward,
    "block_attention_bwd_kernel": attention_backward,
    "block_attention_bwd_query_kernel": attention_backward_query,
    "block_attention_bwd_key_kernel": attention_backward_key,
    "add_segments_kernel": add_segments,
    "block_match_kernel": match,
    "best_split_kernel": best_split,
    "distributed_fwd_kernel": attend_forward,
    "distributed_bwd_query_kernel": attend_backward_query,
    "distributed_bwd_key_kernel": attend_backward_key,
}
