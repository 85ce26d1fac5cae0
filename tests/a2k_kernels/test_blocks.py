import pytest
import torch
from cases import LAYOUTS, arrange
from naive import blocks_of

from a2k_kernels.blocks import count_blocks, existing_points, merge_blocks, split_blocks

SIZES = [(1, 1), (1, 7), (7, 1), (4, 4), (4, 8), (5, 9), (3, 2), (8, 7)]


@pytest.mark.parametrize(
    "size, block_size, expected",
    [((1, 1), 1, (1, 1)), ((1, 1), 16, (1, 1)), ((8, 16), 8, (1, 2)), ((9, 17), 8, (2, 3)), ((7, 1), 2, (4, 1))],
)
def test_count_blocks(size, block_size, expected):
    assert count_blocks(size, block_size) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("size", SIZES)
def test_split_blocks_puts_every_point_at_its_position(size, block_size, layout):
    heads, d = 2, 3
    x = arrange(torch.randn(2, heads * d, *size), layout)
    blocks = split_blocks(x, block_size, heads)
    plan = blocks_of(size, block_size)
    assert blocks.shape == (2, heads, len(plan), block_size**2, d)
    expected = torch.zeros_like(blocks)
    for n, block in enumerate(plan):
        for position, (row, col) in block.items():
            for head in range(heads):
                expected[:, head, n, position] = x[:, head * d : (head + 1) * d, row, col]
    torch.testing.assert_close(blocks, expected, rtol=0, atol=0)
    torch.testing.assert_close(merge_blocks(blocks, size, block_size), x, rtol=0, atol=0)


@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
@pytest.mark.parametrize("size", SIZES)
def test_existing_points(size, block_size):
    exists = existing_points(size, block_size)
    expected = [[y in block for y in range(block_size**2)] for block in blocks_of(size, block_size)]
    assert exists.dtype == torch.bool
    assert exists.tolist() == expected


def test_split_blocks_of_an_empty_batch():
    blocks = split_blocks(torch.zeros(0, 6, 5, 7), 4, 3)
    assert blocks.shape == (0, 3, 4, 16, 2)
    assert merge_blocks(blocks, (5, 7), 4).shape == (0, 6, 5, 7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.bool])
def test_split_blocks_keeps_the_dtype(dtype):
    assert split_blocks(torch.ones(1, 2, 3, 3, dtype=dtype), 2, 1).dtype == dtype
