"""attend_aggregates is the second half of distributed_attention, and refuses what does not fit."""

import pytest
import torch
from cases import DEVICE, LAYOUTS, assert_near, fresh_seeds, make_case

from a2k_kernels import attend_aggregates, block_aggregate, distributed_attention, products, torch_backend

GEOMETRIES = (
    {"d_k": 3, "d_v": 5, "query_size": (7, 10), "key_size": (9, 6)},
    {"d_k": 8, "d_v": 8, "query_size": (1, 3), "key_size": (17, 3), "heads": 3},
    {"d_k": 24, "d_v": 16, "query_size": (13, 5), "key_size": (2, 3), "batch": 1},
)
BACKENDS = ("reference", "torch", "triton")


def backend_or_skip(backend: str) -> str:
    if backend == "triton":
        pytest.importorskip("triton")
    return backend


@pytest.mark.parametrize("seed", fresh_seeds(3))
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda x: f"{x['d_k']}-{x['d_v']}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_half_of_distributed_attention(backend, geometry, seed):
    """Outputs and gradients, for any layout of the query."""
    backend_or_skip(backend)
    layout = LAYOUTS[seed % len(LAYOUTS)]
    layouts = (layout, "contiguous", "contiguous")
    case = make_case("distributed_attention", **geometry, layouts=layouts, seed=seed, device=DEVICE)
    query, key, value, alpha, beta = (case.tensors[name] for name in ("query", "key", "value", "alpha", "beta"))
    blocks = {"block_size": case.options["block_size"], "num_heads": case.options["num_heads"]}
    expected = distributed_attention(
        query, key, value, alpha=alpha, beta=beta, scale=0.3, backend="reference", **blocks
    )
    aggregates = block_aggregate(key, value, alpha=alpha, beta=beta, backend="reference", **blocks)
    actual = attend_aggregates(query, *aggregates, scale=0.3, backend=backend)
    assert_near(actual, expected, 1e-5, "out")
    assert actual.stride() == expected.stride()
    inputs = (query, key, value)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    gradients = (torch.autograd.grad(out, inputs, upstream, retain_graph=True) for out in (actual, expected))
    for name, ours, theirs in zip(("query", "key", "value"), *gradients, strict=True):
        assert_near(ours, theirs, 1e-5, name)


@pytest.mark.parametrize("seed", fresh_seeds(2))
@pytest.mark.parametrize("elements", (1, 100, 1 << 20))
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda x: f"{x['d_k']}-{x['d_v']}")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("fast_mkl", (False, True))
def test_without_gradients(fast_mkl, dtype, geometry, elements, seed, monkeypatch):
    """In groups of heads and bands of any size, or by PyTorch: at most twice the error of the formula, step by step in
    that dtype.
    """
    monkeypatch.setattr(torch_backend, "has_fast_mkl", lambda dtype: fast_mkl)
    monkeypatch.setattr(torch_backend, "CACHE_SCORES", elements)
    monkeypatch.setattr(products, "LEAST_FLOPS", 0)
    layouts = (LAYOUTS[seed % len(LAYOUTS)], "contiguous", "contiguous")
    case = make_case("distributed_attention", **geometry, layouts=layouts, seed=seed)
    query, key, value = (case.tensors[name].detach().to(dtype) for name in ("query", "key", "value"))
    aggregates = block_aggregate(key, value, block_size=case.options["block_size"], num_heads=case.options["num_heads"])
    exact = attend_aggregates(*(x.double() for x in (query, *aggregates)), scale=0.3, backend="reference")
    out = attend_aggregates(query, *aggregates, scale=0.3, backend="torch")
    q, (k, v) = query.flatten(2).unflatten(1, (aggregates[0].shape[1], -1)).mT, aggregates
    plain = ((0.3 * q @ k.mT).softmax(-1) @ v).mT.flatten(1, 2).unflatten(2, query.shape[2:])
    assert (out.dtype, out.stride()) == (dtype, attend_aggregates(query, *aggregates, backend="reference").stride())
    error, plain_error = ((x - exact).square().mean().sqrt().item() for x in (out, plain))
    print(f"seed {seed}, error {error:.1e}, of the formula {plain_error:.1e}")
    assert error <= 2 * plain_error


@pytest.mark.parametrize("backend", ("reference", "torch"))
def test_gradients_are_exact(backend):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 6, 3, 4), (2, 2, 5, 3), (2, 2, 5, 4))
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    assert torch.autograd.gradcheck(lambda *x: attend_aggregates(*x, scale=0.5, backend=backend), inputs)


@pytest.mark.parametrize("seed", fresh_seeds(20))
@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("fast_mkl", (False, True))
def test_what_is_not_finite_anywhere(fast_mkl, training, seed, monkeypatch):
    """Scores of both signs, so that rows may hold infinities of both."""
    monkeypatch.setattr(torch_backend, "has_fast_mkl", lambda dtype: fast_mkl)
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(shape, generator=generator) for shape in ((1, 8, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4))]
    for x in inputs:
        place = torch.randint(2 * x.numel(), (), generator=generator)  # within x, or nowhere
        if place < x.numel():
            x.view(-1)[place] = float(("nan", "inf", "-inf")[seed % 3])
    inputs = [x.requires_grad_(training) for x in inputs]
    expected, actual = (attend_aggregates(*inputs, backend=x) for x in ("reference", "torch"))
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("fast_mkl", (False, True))
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("name", ("query", "key", "value"))
def test_what_is_not_finite_is_seen(name, value, fast_mkl, monkeypatch):
    """NaN in a query point's row, in all rows by a key, in one channel by a value."""
    monkeypatch.setattr(torch_backend, "has_fast_mkl", lambda dtype: fast_mkl)
    query, key, values = torch.rand(1, 8, 3, 4), torch.rand(1, 2, 5, 4), torch.rand(1, 2, 5, 4)
    {"query": query[0, 2, 1], "key": key[0, 1, 0], "value": values[0, 1, 3]}[name][1] = value
    expected, actual = (attend_aggregates(query, key, values, backend=x) for x in ("reference", "torch"))
    assert not expected.isfinite().all()
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("number", (0, 3))
def test_a_score_of_minus_infinity_has_no_weight(number, training):
    query, key, values = torch.rand(1, 8, 3, 4) + 0.1, torch.rand(1, 2, 5, 4), torch.rand(1, 2, 5, 4)
    key[0, 1, number, 1] = float("-inf")
    values.requires_grad_(training)
    expected, actual = (attend_aggregates(query, key, values, backend=x) for x in ("reference", "torch"))
    assert expected.isfinite().all()
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("band_elements", (100, 1 << 22))
@pytest.mark.parametrize("name", ("key_agg", "value_agg"))
def test_aggregates_changed_in_place_before_the_backward_pass(name, band_elements, monkeypatch):
    """No gradient is computed from what they have become, also where scores are computed again."""
    monkeypatch.setattr(torch_backend, "BAND_ELEMENTS", band_elements)
    leaves = {"query": (1, 8, 6, 7), "key_agg": (1, 2, 5, 4), "value_agg": (1, 2, 5, 3)}
    inputs = {key: 1 * torch.rand(shape, requires_grad=True) for key, shape in leaves.items()}
    out = attend_aggregates(**inputs)
    inputs[name].zero_()
    with pytest.raises(RuntimeError, match="by an inplace operation"):
        out.sum().backward()


def test_one_set_of_keys_serves_a_batch():
    query, keys, values = torch.randn(3, 6, 4, 5), torch.randn(1, 2, 7, 3), torch.randn(1, 2, 7, 2)
    out = attend_aggregates(query, keys.expand(3, -1, -1, -1), values.expand(3, -1, -1, -1))
    for i in range(3):
        torch.testing.assert_close(out[i : i + 1], attend_aggregates(query[i : i + 1], keys, values))


@pytest.mark.parametrize(
    "changes, error, message",
    (
        ({"key_agg": torch.ones(2, 2, 3)}, ValueError, r"key_agg has shape \(2, 2, 3\); it must be"),
        ({"value_agg": torch.ones(2, 2, 0, 3)}, ValueError, r"value_agg has shape \(2, 2, 0, 3\)"),
        ({"value_agg": torch.ones(2, 2, 6, 3)}, ValueError, r"value_agg has \(2, 6\) heads and keys but key_agg"),
        ({"query": torch.ones(2, 8, 4, 5)}, ValueError, "query has 8 channels but key_agg has 2 heads of 3"),
        ({"query": torch.ones(1, 6, 4, 5)}, ValueError, "key_agg has batch size 2 but query has 1"),
        ({"query": torch.ones(2, 6, 4, 5).half()}, TypeError, "key_agg is torch.float32 but query is torch.float16"),
        ({"key_agg": None}, TypeError, "key_agg must be a tensor"),
        ({"value_agg": torch.ones(2, 2, 5, 3).to_sparse()}, TypeError, "value_agg has layout torch.sparse_coo"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'; choose one of"),
    ),
)
def test_what_does_not_fit(changes, error, message):
    inputs = {"query": torch.ones(2, 6, 4, 5), "key_agg": torch.ones(2, 2, 5, 3), "value_agg": torch.ones(2, 2, 5, 3)}
    with pytest.raises(error, match=message):
        attend_aggregates(**(inputs | changes))
