"""Every operation at StyA2K's shapes, backends and peers side by side: `pytest benchmarks/`.

Groups are operation x shape x direction; the bytes counted are the compulsory ones, each input and output once.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE

import a2k_kernels
from a2k_kernels.blocks import split_blocks

BACKENDS = ("reference", "torch", *(("triton",) if DEVICE == "cuda" else ()))
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@dataclass(frozen=True)
class Shape:
    """A feature map of a network at a picture size: channels, side, block size, heads."""

    name: str
    channels: int
    side: int
    block_size: int
    num_heads: int

    @property
    def points(self) -> int:
        return self.side**2

    @property
    def blocks(self) -> int:
        return (-(-self.side // self.block_size)) ** 2

    @property
    def options(self) -> dict[str, int]:
        return {"block_size": self.block_size, "num_heads": self.num_heads}

    def maps(self, count: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        shape = (1, self.channels, self.side, self.side)
        return [
            torch.randn(shape, device=DEVICE, dtype=DTYPE).to(memory_format=torch.channels_last) for _ in range(count)
        ]


SHAPES = (
    Shape("vgg_relu3_256px", 256, 64, 8, 8),
    Shape("vgg_relu4_512px", 512, 64, 8, 8),
    Shape("vgg_relu5_512px", 512, 32, 4, 8),
    Shape("lite_relu3_512px", 96, 128, 8, 4),
)


def costs(operation: str, shape: Shape) -> tuple[float, float]:
    """(flops, compulsory bytes) of the forward pass."""
    element = torch.finfo(DTYPE).bits // 8
    plane, r = shape.points * shape.channels, shape.block_size**2
    flops, maps = {
        "block_aggregate": (8 * plane, 2),
        "distributed_attention": (4 * plane * shape.blocks, 4),
        "block_match": (2 * plane * shape.blocks, 2),
        "block_attention": (4 * plane * r, 4),
        "progressive_attention": (2 * plane * (shape.blocks + 2 * r), 4),
    }[operation]
    return flops, maps * plane * element


def call(operation: str, shape: Shape, backend: str, maps: list[torch.Tensor], index: torch.Tensor):
    query, key, value = maps
    inputs = {
        "block_aggregate": (key, value),
        "block_match": (query, key),
        "block_attention": (query, key, value, index),
    }.get(operation, (query, key, value))
    return getattr(a2k_kernels, operation)(*inputs, **shape.options, backend=backend)


def random_index(shape: Shape) -> torch.Tensor:
    size = (1, shape.num_heads, shape.blocks)
    return torch.randint(shape.blocks, size, dtype=torch.int32, device=DEVICE)


OPERATIONS = ("block_aggregate", "distributed_attention", "block_match", "block_attention", "progressive_attention")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_forward(operation, shape, backend, benchmark, measure):
    benchmark.group = f"{operation} {shape.name} forward"
    maps, index = shape.maps(3), random_index(shape)
    with torch.inference_mode():
        measure(lambda: call(operation, shape, backend, maps, index), *costs(operation, shape))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "block_match"])
def test_forward_and_backward(operation, shape, backend, benchmark, measure):
    benchmark.group = f"{operation} {shape.name} forward+backward"
    maps, index = [x.requires_grad_() for x in shape.maps(3)], random_index(shape)

    def step():
        out = call(operation, shape, backend, maps, index)
        outputs = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
        for x in maps:
            x.grad = None

    flops, moved = costs(operation, shape)
    measure(step, 3.5 * flops, 3 * moved)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_peer_sdpa_on_gathered_blocks(shape, benchmark, measure):
    """What a user would write for block_attention: blocks laid out, gathered, PyTorch's fused attention."""
    benchmark.group = f"block_attention {shape.name} forward"
    maps, index = shape.maps(3), random_index(shape).long()[..., None, None]

    def attend():
        q, k, v = (split_blocks(x, shape.block_size, shape.num_heads) for x in maps)
        k, v = (torch.take_along_dim(x, index, dim=2) for x in (k, v))
        return F.scaled_dot_product_attention(q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2), scale=1.0)

    with torch.inference_mode():
        measure(attend, *costs("block_attention", shape))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_peer_all_to_all_sdpa(shape, benchmark, measure):
    """What distributed attention replaces: every point attends to every point."""
    benchmark.group = f"distributed_attention {shape.name} forward"
    q, k, v = (x.flatten(2).unflatten(1, (shape.num_heads, -1)).mT for x in shape.maps(3))
    _, moved = costs("distributed_attention", shape)
    with torch.inference_mode():
        measure(lambda: F.scaled_dot_product_attention(q, k, v, scale=1.0), 4 * shape.points**2 * shape.channels, moved)


@pytest.mark.skipif(DEVICE == "cpu", reason="FlexAttention's compiled kernel is for GPUs")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_peer_flex_attention(shape, benchmark, measure):
    """block_attention as FlexAttention with the same mask, points in block order so that the mask is sparse."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    benchmark.group = f"block_attention {shape.name} forward"
    index, r = random_index(shape), shape.block_size**2
    q, k, v = (split_blocks(x, shape.block_size, shape.num_heads).flatten(2, 3) for x in shape.maps(3))

    def same_block(batch, head, query, key):
        return index[batch, head, query // r] == key // r

    mask = create_block_mask(same_block, 1, shape.num_heads, q.shape[2], k.shape[2], device=DEVICE)
    compiled = torch.compile(flex_attention)
    with torch.inference_mode():
        measure(lambda: compiled(q, k, v, block_mask=mask, scale=1.0), *costs("block_attention", shape))
