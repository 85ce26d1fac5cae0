"""Small pieces that every kernel is made of, and what their launchers share."""

import os
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, accumulated in float32."""
    if INTERPRETED:  # Triton 3.9's interpreter would multiply the raw bits of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def block_points(block, first, height, width, BLOCK_SIZE: tl.constexpr, BLOCK_R: tl.constexpr):
    """Row, column and existence of a block's points first .. first + BLOCK_R - 1: three [BLOCK_R] vectors."""
    point = first + tl.arange(0, BLOCK_R)
    blocks_per_row = tl.cdiv(width, BLOCK_SIZE)
    row = block // blocks_per_row * BLOCK_SIZE + point // BLOCK_SIZE
    col = block % blocks_per_row * BLOCK_SIZE + point % BLOCK_SIZE
    return row, col, (point < BLOCK_SIZE * BLOCK_SIZE) & (row < height) & (col < width)


@triton.jit
def tile_pointers(ptr, strides, batch, channel, row, col, LARGE: tl.constexpr):
    """Pointers to the given channels at the given points, [points, channels]; strides: batch, channel, row, column."""
    if LARGE:  # offsets within one image need 64 bits
        row, col, channel = row.to(tl.int64), col.to(tl.int64), channel.to(tl.int64)
    image = ptr + batch.to(tl.int64) * strides[0]
    return image + (row * strides[2] + col * strides[3])[:, None] + (channel * strides[1])[None, :]


@triton.jit
def load_tile(
    ptr, strides, batch, head, chunk, row, col, exists, DIM: tl.constexpr, BLOCK_D: tl.constexpr, LARGE: tl.constexpr
):
    """Chunk number `chunk` of BLOCK_D of a head's DIM channels at the given points, 0 where there is none."""
    d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    pointers = tile_pointers(ptr, strides, batch, head * DIM + d, row, col, LARGE)
    return tl.load(pointers, mask=exists[:, None] & (d < DIM)[None, :], other=0.0)  # [points, BLOCK_D]


@triton.jit
def store_tile(
    ptr, strides, x, batch, head, chunk, row, col, exists, DIM: tl.constexpr, BLOCK_D: tl.constexpr, LARGE: tl.constexpr
):
    """Inverse of load_tile."""
    d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    pointers = tile_pointers(ptr, strides, batch, head * DIM + d, row, col, LARGE)
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=exists[:, None] & (d < DIM)[None, :])


def is_large(*maps: Tensor) -> bool:
    """Whether offsets within one image of any of the (B, C, H, W) maps could leave 32 bits."""
    return any(sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)) >= 1 << 30 for x in maps)


def tile_side(extent: int) -> int:
    """Smallest tile side that tl.dot accepts and that covers extent."""
    return max(16, triton.next_power_of_2(extent))


def on_device(x: Tensor):
    """Context in which kernels launch on x's GPU."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def architecture(x: Tensor) -> str:
    """Of the GPU that x is on: sm_90, gfx942, ...; kernels that are interpreted take the first."""
    if INTERPRETED.value:
        return "sm_90"
    with on_device(x):
        target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch


def without_spills(tiles: dict[str, int], x: Tensor) -> dict[str, int]:
    """Lets float32 kernels on NVIDIA's GPUs have all registers: ptxas spills some to fit one more program."""
    if x.element_size() == 2 or not architecture(x).startswith("sm_"):
        return tiles
    return tiles | {"maxnreg": min(255, 65536 // (32 * tiles["num_warps"]))}
