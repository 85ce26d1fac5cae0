"""The torch backend gives the reference's results: outputs, gradients, also in many small bands; and in
bounded memory."""

import random

import pytest
import torch
from cases import (
    DIFFERENTIABLE,
    LAYOUTS,
    OPERATIONS,
    WITH_MAP_OUTPUT,
    Case,
    arrange,
    assert_matches,
    assert_near,
    at_index,
    fresh_seeds,
    make_case,
    random_case,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import a2k_kernels
from a2k_kernels import torch_backend


def assert_same_results(case: Case, upstream_layout: str = "contiguous") -> None:
    """Outputs within 1e-4 and gradients within 1e-3 of the reference in float64, at the same index."""
    actual, exact = case.run("torch"), case.converted(torch.float64)
    if case.operation == "block_match":
        return assert_matches(case, *actual)
    if case.operation == "progressive_attention":
        *actual, index = actual
        assert_matches(case, index)
        exact = at_index(exact, index)
        assert_same_results_without_gradients(case)
    expected = exact.run("reference")
    for out, expected_out in zip(actual, expected, strict=True):
        assert out.dtype == torch.float32
        assert_near(out, expected_out, 1e-4, "output")
    upstream = [arrange(torch.randn(out.shape), upstream_layout) for out in actual]
    grads = torch.autograd.grad(actual, case.differentiable().values(), upstream)
    upstream = [x.double() for x in upstream]
    expected_grads = torch.autograd.grad(expected, exact.differentiable().values(), upstream)
    for (name, x), grad, expected_grad in zip(case.differentiable().items(), grads, expected_grads, strict=True):
        assert grad.dtype == x.dtype
        assert_near(grad, expected_grad, 1e-3, f"gradient of {name}")


def assert_same_results_without_gradients(case: Case) -> None:
    """Progressive attention has a way of its own for them."""
    with torch.no_grad():
        out, index = case.run("torch")
    assert_matches(case, index)
    (expected,) = at_index(case.converted(torch.float64), index).run("reference")
    assert out.dtype == torch.float32
    assert_near(out, expected, 1e-4, "output without gradients")


@pytest.mark.parametrize("seed", fresh_seeds(200), ids="seed{}".format)
def test_random_case_equals_reference(seed, monkeypatch):
    """A failure is repeated by A2K_TEST_SEED=<seed> pytest -k seed<seed>."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    monkeypatch.setattr(torch_backend, "BAND_ELEMENTS", rng.choice((1 << 22, 1 << 22, 1, 100, 5000)))
    assert_same_results(random_case(seed), rng.choice(LAYOUTS))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_largest_geometry_equals_reference(operation):
    torch.manual_seed(0)
    sizes = {"query_size": (35, 70), "key_size": (70, 17)}
    case = make_case(operation, batch=1, heads=8, block_size=16, d_k=184, d_v=64, scale=184**-0.5, **sizes)
    assert_same_results(case)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("band_elements", [1, 64, 2000])
def test_bands_equal_reference(operation, band_elements, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch_backend, "BAND_ELEMENTS", band_elements)
    for d_v in (3, 5):  # equal head dimensions take PyTorch's fused attention
        assert_same_results(make_case(operation, heads=3, d_k=3, d_v=d_v), "sliced_channels_last")


@pytest.mark.parametrize("band_elements", [1, 1 << 22])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("operation", DIFFERENTIABLE)
def test_second_derivatives_equal_reference(operation, layout, band_elements, monkeypatch):
    monkeypatch.setattr(torch_backend, "BAND_ELEMENTS", band_elements)
    case = make_case(operation, dtype=torch.float64, heads=2, d_k=2, d_v=2, layouts=(layout,) * 3)
    inputs = list(case.differentiable().values())

    def second_derivatives(backend):
        outs = [x for x in case.run(backend) if x.requires_grad]
        grads = torch.autograd.grad([x.square().sum() for x in outs], inputs, create_graph=True)
        return torch.autograd.grad([x.square().sum() for x in grads], inputs)

    for actual, expected in zip(second_derivatives("torch"), second_derivatives("reference"), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("differentiated", ["query", "key", "value"])
def test_second_derivative_of_fused_attention_raises(differentiated, layout):
    case = make_case("distributed_attention", d_k=4, d_v=4, layouts=(layout,) * 3)
    x = case.tensors[differentiated]
    (grad,) = torch.autograd.grad(case.run("torch")[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative .* in torch.float32; use backend='reference'"):
        grad.square().sum().backward()


class LargestTensor(TorchDispatchMode):
    """Records the sizes of the tensors that operations make, and the largest (a view counts as its own elements)."""

    elements = 0

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *made, 0)
        self.made += made
        return out


@pytest.mark.parametrize("query_size", [(128, 128), (1, 128 * 128)])
@pytest.mark.parametrize("d_v", [4, 6])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_distributed_attention_never_holds_all_scores(backend, d_v, query_size, monkeypatch):
    monkeypatch.setattr(torch_backend, "BAND_ELEMENTS", 1 << 16)
    sizes = {"query_size": query_size, "key_size": (24, 24)}
    case = make_case("distributed_attention", batch=1, heads=1, block_size=1, d_k=4, d_v=d_v, **sizes)
    scores, largest_map = 128 * 128 * 24 * 24, 128 * 128 * 6
    with LargestTensor() as largest:
        case.run(backend)[0].sum().backward()
    if backend == "reference":  # shows that the mode sees what it is meant to see
        assert largest.elements >= scores
    else:
        assert largest.elements <= max(largest_map, 128 * 24 * 24)


@pytest.mark.parametrize("seed", fresh_seeds(2), ids="seed{}".format)
@pytest.mark.parametrize("heads, d", [(1, 1), (1, 4), (2, 1), (2, 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_attention_holds_no_scores_in_any_layout(layout, heads, d, seed, monkeypatch):
    """PyTorch streams them, so nothing larger than a map is made even where a band takes the whole map."""
    torch.manual_seed(seed)
    monkeypatch.setattr(torch_backend, "BAND_ELEMENTS", 1 << 40)
    geometry = {"batch": 2, "heads": heads, "block_size": 1, "d_k": d, "d_v": d}
    sizes = {"query_size": (14, 15), "key_size": (9, 7)}
    case = make_case("distributed_attention", **geometry, **sizes, layouts=(layout,) * 3, seed=seed)
    query, key, value = (case.tensors[name] for name in ("query", "key", "value"))
    k, v = (x.flatten(2).unflatten(1, (heads, d)).mT for x in (key, value))  # strides as they come
    for run in (lambda: case.run("torch")[0], lambda: a2k_kernels.attend_aggregates(query, k, v, backend="torch")):
        with LargestTensor() as largest:
            run().square().sum().backward()
        assert largest.elements <= query.numel()
    assert_same_results(case)


@pytest.mark.parametrize("operation", ["distributed_attention", "block_attention"])
def test_training_saves_no_scores(operation, monkeypatch):
    """With several bands the graph keeps maps and blocks, and recomputes the scores of a band when it needs them."""
    monkeypatch.setattr(torch_backend, "BAND_ELEMENTS", 1 << 16)
    block_size = 1 if operation == "distributed_attention" else 8
    sizes = {"query_size": (96, 96), "key_size": (24, 24), "block_size": block_size}
    case = make_case(operation, batch=1, heads=1, d_k=2, d_v=3, **sizes)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        case.run("torch")
    assert sum(saved) < 96 * 96 * 24  # all scores are 96 * 96 * 576 and 96 * 96 * 64


def test_block_match_never_holds_all_scores(monkeypatch):
    monkeypatch.setattr(torch_backend, "BAND_ELEMENTS", 1 << 12)
    x = torch.randn(1, 2, 64, 64)
    with LargestTensor() as largest:
        a2k_kernels.block_match(x, x, block_size=1, num_heads=2, backend="torch")
    assert largest.elements <= x.numel()


@pytest.mark.parametrize("operation", ["block_attention", "progressive_attention"])
def test_block_attention_works_in_bands(operation, monkeypatch):
    monkeypatch.setattr(torch_backend, "BAND_ELEMENTS", 1 << 12)
    sizes = {"query_size": (64, 64), "key_size": (64, 64)}
    case = make_case(operation, batch=1, heads=2, block_size=8, d_k=2, d_v=2, **sizes)
    with LargestTensor() as largest:
        case.run("torch")[0].sum().backward()
    assert largest.elements <= 8 * 64 * 64  # scores of one of eight rows of blocks; all are 2 * 64 * 64 * 64


@pytest.mark.parametrize("seed", fresh_seeds(1), ids="seed{}".format)
@pytest.mark.parametrize("operation", WITH_MAP_OUTPUT)
def test_bands_make_no_map_each_in_the_backward_pass(operation, seed, monkeypatch):
    monkeypatch.setattr(torch_backend, "BAND_ELEMENTS", 1)  # sixteen bands or more
    sizes = {"query_size": (64, 64), "key_size": (8, 8)}
    case = make_case(operation, heads=1, d_k=4, d_v=6, **sizes, seed=seed)
    loss = case.run("torch")[0].square().sum()
    with LargestTensor() as largest:
        loss.backward()
    assert sum(size >= case.tensors["query"].numel() for size in largest.made) < 16


def test_progressive_attention_without_gradients_works_in_bands(monkeypatch):
    monkeypatch.setattr(torch_backend, "CACHE_ELEMENTS", 1 << 12)
    sizes = {"query_size": (64, 64), "key_size": (64, 64)}
    case = make_case("progressive_attention", batch=1, heads=2, block_size=8, d_k=2, d_v=2, **sizes)
    with LargestTensor() as largest, torch.no_grad():
        case.run("torch")
    assert largest.elements <= 8 * 64 * 64


@pytest.mark.parametrize("band_elements", [100, 1 << 22])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiles_without_graph_break(operation, band_elements, monkeypatch):
    monkeypatch.setattr(torch_backend, "BAND_ELEMENTS", band_elements)
    torch._dynamo.reset()
    case = make_case(operation)
    expected = case.run("torch")
    actual = torch.compile(lambda: case.run("torch"), backend="eager", fullgraph=True)()
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y)
        assert x.stride() == y.stride()
    if operation != "block_match":
        inputs = list(case.differentiable().values())
        grads, expected_grads = (
            torch.autograd.grad(out[0].square().sum(), inputs, allow_unused=True) for out in (actual, expected)
        )
        for x, y in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(x, y)


def test_weights_that_underflow_are_zero():
    """And no others: denormal numbers are slow to multiply."""
    torch.set_flush_denormal(False)
    scores = torch.tensor(
        [[0.0, -80.0, -95.0, -200.0], [0.0, 0.0, float("-inf"), -80.0], [0.0, float("nan"), 1.0, 2.0]]
    )
    expected = scores.softmax(-1)
    assert 0 < expected[0, 2] < torch.finfo(torch.float32).tiny
    expected[0, 2] = 0
    torch.testing.assert_close(torch_backend.softmax(scores), expected, rtol=0, atol=0, equal_nan=True)


def test_weights_with_a_gradient_are_those_of_softmax():
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(torch_backend.softmax, scores.detach().requires_grad_())
    assert torch.equal(torch_backend.softmax(scores), scores.softmax(-1))
