import random

import pytest
import torch

from a2k.aggregates import projected_aggregates
from a2k_kernels import block_aggregate


@pytest.mark.parametrize("size", ((16, 24), (13, 9), (3, 40)), ids=str)
def test_equals_aggregates_of_projections(size):
    """Whole and cut blocks, with projections of their own for every picture."""
    seed = random.randrange(10**6)
    print("seed", seed)
    torch.manual_seed(seed)
    x = torch.randn(2, 6, *size).relu() + 1
    projections = [(torch.randn(2, 12, 6), torch.randn(2, 12)) for _ in range(2)]
    options = {"block_size": 8, "num_heads": 3, "alpha": torch.tensor([0.1]), "beta": torch.tensor([-0.5])}
    maps = [torch.einsum("boc,bchw->bohw", weight, x) + bias[..., None, None] for weight, bias in projections]
    actual, expected = projected_aggregates(x, *projections, **options), block_aggregate(*maps, **options)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_rounded_once():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 9, 9).bfloat16()
    projections = [(torch.randn(1, 4, 4), torch.randn(1, 4)) for _ in range(2)]
    options = {"block_size": 8, "num_heads": 2, "alpha": torch.ones(1), "beta": torch.zeros(1)}
    actual, expected = (projected_aggregates(y, *projections, **options) for y in (x, x.float()))
    for a, e in zip(actual, expected, strict=True):
        assert a.equal(e.bfloat16())
