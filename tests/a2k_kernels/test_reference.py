"""The reference is the specification: it agrees with loops written from DESIGN.md, and with finite differences."""

import naive
import pytest
import torch
from cases import DIFFERENTIABLE, OPERATIONS, Case, make_case

from a2k_kernels import reference

# query size, key size, block size, heads, d_k, d_v: with cut blocks of every kind, and none
GEOMETRIES = [
    ((5, 7), (7, 4), 3, 2, 3, 2),
    ((4, 4), (4, 8), 4, 1, 2, 5),
    ((1, 1), (1, 1), 1, 3, 1, 1),
    ((1, 1), (3, 5), 2, 1, 4, 1),
    ((3, 5), (1, 1), 2, 2, 1, 3),
    ((2, 3), (3, 2), 16, 2, 2, 2),
    ((9, 1), (1, 9), 2, 1, 3, 3),
    ((6, 5), (5, 6), 1, 2, 2, 1),
]


def geometry_case(operation: str, geometry: tuple, **options) -> Case:
    query_size, key_size, block_size, heads, d_k, d_v = geometry
    sizes = {"query_size": query_size, "key_size": key_size, "block_size": block_size}
    return make_case(operation, **sizes, heads=heads, d_k=d_k, d_v=d_v, **options)


def run_naive(case: Case) -> tuple:
    tensors = {name: x.detach() for name, x in case.tensors.items()}
    tensors |= {name: tensors[name].item() for name in ("alpha", "beta") if name in tensors}
    options = {name: x for name, x in case.options.items() if name != "return_index"}
    if case.operation == "progressive_attention":
        size = {name: options[name] for name in ("block_size", "num_heads")}
        index = naive.block_match(tensors["query"], tensors["key"], **size)
        return naive.block_attention(*tensors.values(), index, **options), index
    out = getattr(naive, case.operation)(*tensors.values(), **options)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_loops_over_the_formulas(backend, operation, geometry):
    case = geometry_case(operation, geometry, dtype=torch.float64, scale=0.7, scalar_shape=(1,))
    for actual, expected in zip(case.run(backend), run_naive(case), strict=True):
        torch.testing.assert_close(actual.detach(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_float32_is_close_to_loops_over_the_formulas(operation):
    case = geometry_case(operation, GEOMETRIES[0])
    for actual, expected in zip(case.run("reference"), run_naive(case), strict=True):
        assert actual.dtype == (torch.int32 if expected.dtype == torch.int32 else torch.float32)
        torch.testing.assert_close(actual.detach(), expected.to(actual.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_block_is_averaged_over_m_plus_1_and_not_over_its_gates(backend):
    """By hand: one block of two points 1 and 3 with gates 1/2 gives ((1 + 3) / 2 + 2) / 3."""
    key = torch.tensor([[[[1.0, 3.0]]]])
    case = Case(
        "block_aggregate",
        {"key": key, "value": 10 * key, "alpha": torch.tensor(0.0), "beta": torch.tensor(0.0)},
        {"block_size": 4, "num_heads": 1},
    )
    k_agg, v_agg = case.run(backend)
    torch.testing.assert_close(k_agg.flatten(), torch.tensor([4 / 3]))
    torch.testing.assert_close(v_agg.flatten(), torch.tensor([40 / 3]))


def match_case(query: torch.Tensor, key: torch.Tensor, block_size: int) -> Case:
    return Case("block_match", {"query": query, "key": key}, {"block_size": block_size, "num_heads": 1})


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_ties_go_to_the_lowest_index(backend):
    key = torch.ones(1, 4, 16, 16)
    key[..., :2] = 0  # the first block of every row is worse, the other 56 are equal
    (index,) = match_case(torch.ones(1, 4, 4, 8), key, 2).run(backend)
    assert index.tolist() == [[[1] * 8]]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_first_nan_score_wins(backend):
    key = torch.randn(1, 2, 2, 10)
    key[0, 1, 1, 4] = key[0, 0, 0, 9] = float("nan")  # in blocks 2 and 4
    (index,) = match_case(torch.randn(1, 2, 4, 4), key, 2).run(backend)
    assert index.tolist() == [[[2] * 4]]
    torch.testing.assert_close(index, naive.block_match(torch.ones(1, 2, 4, 4), key, block_size=2, num_heads=1))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_nan_of_a_query_point_matches_block_0_and_leaves_other_blocks_alone(backend):
    query, key = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 6, 6)
    (clean,) = match_case(query, key, 2).run(backend)
    query[0, 0, 2, 3] = float("nan")  # in block 3
    (index,) = match_case(query, key, 2).run(backend)
    assert index[0, 0].tolist() == [*clean[0, 0, :3].tolist(), 0]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_positions_missing_in_a_block_count_0(backend):
    """A cut block with a negative score at its only point loses against 0, and wins with a positive one."""
    key = torch.zeros(1, 1, 3, 2)
    for last_row, best in ((-5.0, 0), (5.0, 1)):
        key[..., 2, :] = last_row
        (index,) = match_case(torch.ones(1, 1, 2, 2), key, 2).run(backend)
        assert index.item() == best


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_points_are_matched_position_by_position(backend):
    """The key's two blocks hold the same points in another order."""
    block = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    key = torch.cat([block.mT, block], 1)[None, None]
    (index,) = match_case(block[None, None], key, 2).run(backend)
    assert index.item() == 1


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name, spoiled", [("query", 1), ("key", 16), ("value", 16)])
def test_nan_in_block_attention_reaches_only_the_points_that_use_it(backend, name, spoiled):
    """Of a query: its own point. Of a key or value point: the four points of every block that chose its block."""
    case = make_case(
        "block_attention", batch=1, heads=2, d_k=2, d_v=2, block_size=2, query_size=(4, 8), key_size=(4, 4)
    )
    case.tensors["index"] = torch.arange(8, dtype=torch.int32).remainder(4).expand(1, 2, 8)
    spoil = case.tensors[name].detach()
    if name == "query":
        spoil[0, 1, 2, 3] = float("nan")
        expected = torch.zeros(4, 8, dtype=torch.bool)
        expected[2, 3] = True
    else:
        spoil[0, 1, 0, 3] = float("nan")  # block 1, chosen by the second and the sixth query block
        expected = torch.zeros(4, 8, dtype=torch.bool)
        expected[0:2, 2:4] = expected[2:4, 2:4] = True
    (out,) = case.run(backend)
    channel = out[0, 1].isnan()
    assert channel.equal(expected)
    assert not out[0, 2:].isnan().any()
    assert out[0, 0].isnan().equal(expected if name != "value" else torch.zeros_like(expected))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("d_v", [3, 5])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_propagates_through_distributed_attention(layout, backend, d_v):
    layouts = {"layouts": (layout,) * 3, "d_v": d_v}
    for what in (float("nan"), float("inf")):
        case = make_case("distributed_attention", **layouts)
        case.tensors["query"].detach()[0, 4, 2, 3] = what  # second head
        (out,) = case.run(backend)
        expected = torch.zeros(out.shape, dtype=torch.bool)
        expected[0, d_v:, 2, 3] = True
        assert out.isnan().equal(expected)
    for points in (1, 9):  # of one block, and of all
        case = make_case("distributed_attention", **layouts)
        case.tensors["key"].detach()[1, 0, :points, :points] = float("nan")  # first head
        (out,) = case.run(backend)
        assert out[1, :d_v].isnan().all()
        assert not out[0].isnan().any()
        assert not out[1, d_v:].isnan().any()


def test_unknown_blocks_attend_to_nothing():
    """Where the index can't be checked (on a GPU) an index out of range gives zeros and no gradient."""
    case = make_case("block_attention", dtype=torch.float64)
    index = case.tensors["index"].clone()
    (expected,) = case.run("reference")
    index[0, 0, 0], index[1, 1, 5] = -1, 6
    maps = [case.tensors[name] for name in ("query", "key", "value")]
    out = reference.block_attention(*maps, index, **case.options)
    expected = expected.detach().clone()
    expected[0, :5, :4, :4] = 0
    expected[1, 5:, 4:, 8:] = 0
    torch.testing.assert_close(out, expected)
    (grad_query,) = torch.autograd.grad(out.sum(), maps[0])
    assert not grad_query[0, :3, :4, :4].any()
    assert grad_query[0, :3, :4, 4:].any()


@pytest.mark.parametrize("scalar_shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "sliced_channels_last"])
@pytest.mark.parametrize("operation", DIFFERENTIABLE)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend, operation, layout, scalar_shape):
    case = make_case(
        operation,
        batch=1,
        heads=2,
        block_size=2,
        d_k=2,
        d_v=1,
        query_size=(3, 2),
        key_size=(2, 3),
        layouts=(layout,) * 3,
        dtype=torch.float64,
        scale=0.8,
        scalar_shape=scalar_shape,
    )
    inputs = case.differentiable()

    def function(*tensors):
        outs = case.run(backend, **dict(zip(inputs, tensors, strict=True)))
        return tuple(x for x in outs if x.requires_grad)

    tensors = tuple(x.detach().contiguous().requires_grad_() for x in inputs.values())
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)
    laid_out = tuple(inputs.values())  # numeric differences need dense inputs, analytic ones must not
    for dense, grad in zip(
        torch.autograd.grad([x.sum() for x in function(*tensors)], tensors),
        torch.autograd.grad([x.sum() for x in function(*laid_out)], laid_out),
        strict=True,
    ):
        torch.testing.assert_close(grad, dense)
