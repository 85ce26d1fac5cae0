"""The Triton backend gives the reference's results: outputs and gradients, over everything its kernels take.

On a GPU, or ttsem's stand-in for one (`make sanitize`), they run on CUDA tensors; else in Triton's interpreter.
Uninitialised memory is NaN in all of these tests.
"""

import random
from pathlib import Path

import pytest
import torch
from cases import (
    DEVICE,
    DIFFERENTIABLE,
    HEAD_DIMS,
    LAYOUTS,
    OPERATIONS,
    Case,
    arrange,
    assert_matches,
    assert_near,
    at_index,
    fresh_seeds,
    gradients,
    random_blocks_case,
    random_upstream,
    small_case,
)
from torch import Tensor

from a2k_kernels import reference

pytest.importorskip("triton")

from a2k_kernels import ops
from a2k_kernels.blocks import count_blocks, split_blocks
from a2k_kernels.triton import block_aggregate, block_attention, block_match, configs, distributed_attention
from a2k_kernels.triton.tiles import is_large

pytestmark = pytest.mark.usefixtures("poisoned_memory", "corrected_interpreter")
ONE_TILE = {"d_k": 3, "d_v": 5}  # block_attention's backward in one kernel
MANY_TILES = {"d_k": 70, "d_v": 20}  # and in three


def test_memory_is_poisoned():
    assert torch.empty(3, device=DEVICE).isnan().all()
    assert torch.ones(3, device=DEVICE).new_empty(3).isnan().all()
    assert torch.empty(3, dtype=torch.int32, device=DEVICE).gt(2**31 - 100).all()


def run_operation_by_operation(case: Case, upstream: list[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Results of the reference when each of its operations rounds to the dtype of the inputs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "at_least_float32", lambda x: x)
        outs = case.run("reference")
        return outs, gradients(case, outs, upstream)


def distance(actual: Tensor, exact: Tensor) -> float:
    return (actual.detach().double() - exact.detach()).norm().item()


def size_of_terms(case: Case, upstream: list[Tensor]) -> dict[str, float]:
    """The largest term scale <dO_x, v_y> k_y of the query's gradient, and scale <dO_x, v_y> q_x of the key's.

    They cancel where a row's keys or values agree, and wholly where it has only one key.
    """
    if "query" not in case.tensors:
        return {}
    grad_out, value = (
        x.detach().double().flatten(2).unflatten(1, (case.options["num_heads"], -1))
        for x in (upstream[0], case.tensors["value"])
    )
    product = abs(case.options["scale"]) * (grad_out.mT @ value).abs().max().item()
    query, key = (case.tensors[name].detach().abs().max().item() for name in ("query", "key"))
    return {"query": max(1.0, product * key), "key": max(1.0, product * query)}


def assert_as_accurate(actual: Tensor, plain: Tensor, exact: Tensor, name: str, terms: float) -> None:
    """At most twice the error of the formulas run in that dtype, or of the exact result rounded to it.

    Both are 0 where terms cancel exactly: float32's rounding of them is allowed besides.
    """
    half_precision = max(distance(plain, exact), distance(exact.to(actual.dtype), exact))
    if exact[:, 0].numel() < 64:  # too few points to compare: those of plain may be exact by luck
        half_precision += torch.finfo(actual.dtype).eps * exact.norm().item()
    allowed = 2 * half_precision + 1e-6 * terms * exact.numel() ** 0.5
    assert distance(actual, exact) <= allowed, f"{name}: {distance(actual, exact):.3g}, allowed {allowed:.3g}"


def assert_equals_reference(case: Case, upstream_layout: str = "contiguous") -> None:
    """Outputs and gradients against the reference in float64 at the same index; and their strides and dtypes."""
    outs, exact = case.run("triton"), case.converted(torch.float64)
    if case.operation == "block_match":
        return assert_matches(case, *outs)
    if case.operation == "progressive_attention":
        *outs, index = outs
        assert_matches(case, index)
        case, exact = at_index(case, index), at_index(exact, index)
    upstream = random_upstream(outs, upstream_layout)
    grads, expected = gradients(case, outs, upstream), exact.run("reference")
    expected_grads = gradients(exact, expected, upstream)
    assert_layouts(case, outs, grads)
    dtype, terms = case.tensors["key"].dtype, size_of_terms(case, upstream)
    if dtype == torch.float32:
        for out, expected_out in zip(outs, expected, strict=True):
            assert_near(out, expected_out, 1e-5, "output", 0.1)
        plain_grads = gradients(case, case.run("reference"), upstream)
        for name, grad in grads.items():
            plain_error = (plain_grads[name].double() - expected_grads[name]).abs().max().item()
            least_scale = 1.0 if name in ("alpha", "beta") else 0.1 * terms.get(name, 1.0)
            least_scale = max(least_scale, 2 * plain_error / 1e-5)  # a gate near 1 leaves alpha's gradient few digits
            assert_near(grad, expected_grads[name], 1e-5, f"gradient of {name}", least_scale)
        return
    plain, plain_grads = run_operation_by_operation(case, upstream)
    for out, plain_out, expected_out in zip(outs, plain, expected, strict=True):
        assert_as_accurate(out, plain_out, expected_out, "output", 1.0)
    for name in grads:
        if name in ("alpha", "beta"):
            values = (x[name] for x in (grads, plain_grads, expected_grads))
            assert_scalar_as_accurate(*values, name, exact, upstream, dtype)
        else:
            size = terms.get(name, 1.0)
            assert_as_accurate(grads[name], plain_grads[name], expected_grads[name], f"gradient of {name}", size)


def assert_scalar_as_accurate(
    actual: Tensor, plain: Tensor, expected: Tensor, name: str, exact: Case, upstream: list[Tensor], dtype: torch.dtype
) -> None:
    """At most twice the error of the formulas run in that dtype, and of a sum whose terms are rounded to it.

    One number may be exact by luck, so the terms upstream * d out / d scalar are counted too, by central differences.
    """
    step, terms = 1e-4, 0.0
    below, above = (exact.run("reference", **{name: exact.tensors[name].detach() + s}) for s in (-step, step))
    for x, y, grad_out in zip(below, above, upstream, strict=True):
        terms += ((y - x).detach() / (2 * step) * grad_out).square().sum().item()
    allowed = 2 * (distance(plain, expected) + torch.finfo(dtype).eps * terms**0.5) + 1e-9
    error = distance(actual, expected)
    assert error <= allowed, f"gradient of {name}: {error:.3g}, allowed {allowed:.3g}"


def assert_layouts(case: Case, outs: tuple[Tensor, ...], grads: dict[str, Tensor]) -> None:
    """DESIGN.md: an output has the query's memory format and dtype, a gradient that of its input."""
    for out in outs:
        assert out.dtype == case.tensors["key"].dtype
        if "query" in case.tensors:
            assert_format(out, case.tensors["query"])
        else:
            assert out.is_contiguous()
    for name, grad in grads.items():
        x = case.tensors[name]
        assert grad.dtype == x.dtype
        if x.ndim == 4:
            assert_format(grad, x)


def assert_format(x: Tensor, like: Tensor) -> None:
    _, C, H, W = like.shape
    points_are_vectors = C > 1 and H * W > 1 and like.stride(1) == 1
    expected = torch.channels_last if points_are_vectors else torch.contiguous_format
    assert x.stride() == torch.empty(x.shape, memory_format=expected).stride()


# Random cases --------------------------------------------------------------------------------------------


def assert_random_case(seed: int, seconds: float) -> None:
    torch.manual_seed(seed)
    assert_equals_reference(random_blocks_case(seed, seconds), random.Random(seed).choice(LAYOUTS))


@pytest.mark.parametrize("seed", fresh_seeds(160), ids="seed{}".format)
def test_random_case_equals_reference(seed):
    """A failure is repeated by A2K_TEST_SEED=<seed> pytest -k seed<seed>."""
    assert_random_case(seed, 2.5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", fresh_seeds(120), ids="seed{}".format)
def test_larger_random_case_equals_reference(seed):
    assert_random_case(seed, 12.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", DIFFERENTIABLE)
def test_every_layout_of_inputs_and_upstream_gradients(operation, layout):
    torch.manual_seed(0)
    assert_equals_reference(small_case(operation, layouts=(layout,) * 3), layout)


@pytest.mark.parametrize("dims", [ONE_TILE, MANY_TILES], ids=["one_tile", "many_tiles"])
@pytest.mark.parametrize("operation", DIFFERENTIABLE)
@pytest.mark.parametrize("upstream", ["contiguous", "channels_last", "sliced", "transposed", "expanded_channels"])
@pytest.mark.slow
def test_upstream_layouts(operation, upstream, dims):
    torch.manual_seed(0)
    assert_equals_reference(small_case(operation, layouts=("channels_last",) * 3, **dims), upstream)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "query_size, key_size", [((1, 1), (1, 1)), ((1, 1), (5, 9)), ((5, 9), (1, 1)), ((1, 6), (6, 1))]
)
def test_smallest_maps(operation, query_size, key_size):
    torch.manual_seed(0)
    assert_equals_reference(small_case(operation, heads=1, query_size=query_size, key_size=key_size))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_empty_batch(operation):
    case = small_case(operation, batch=0, dtype=torch.bfloat16, layouts=("channels_last",) * 3)
    outs, expected = case.run("triton"), case.run("reference")
    assert [(x.shape, x.dtype) for x in outs] == [(x.shape, x.dtype) for x in expected]
    if operation != "block_match":
        inputs = case.differentiable().values()
        grads = torch.autograd.grad([x.sum() for x in outs if x.requires_grad], inputs)
        assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in inputs]
        assert not any(x.any() for x in grads)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d_k, d_v", HEAD_DIMS)
@pytest.mark.parametrize("operation", ["block_aggregate", "distributed_attention", "block_attention"])
def test_head_dimensions_of_the_networks(operation, d_k, d_v, dtype):
    torch.manual_seed(0)
    sizes = {"query_size": (9, 7), "key_size": (5, 11), "scale": d_k**-0.5, "layouts": ("channels_last",) * 3}
    assert_equals_reference(small_case(operation, heads=1, d_k=d_k, d_v=d_v, dtype=dtype, **sizes))


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_largest_block_and_head(operation):
    torch.manual_seed(0)
    sizes = {"block_size": 16, "query_size": (14, 5), "key_size": (16, 19), "scale": 1 / 16}
    assert_equals_reference(small_case(operation, heads=1, d_k=256, d_v=256, **sizes))


# block_match ---------------------------------------------------------------------------------------------


def whole_number_case(seed: int, *, special: float | None = None, **geometry) -> Case:
    """block_match of whole numbers, whose scores are exact in any order: many ties; some keys may be special."""
    case = small_case("block_match", seed=seed, **geometry)
    generator = torch.Generator().manual_seed(seed)
    for x in case.tensors.values():
        x.detach().copy_(torch.randint(-1, 2, x.shape, generator=generator))
    if special is not None:
        key = case.tensors["key"].detach()
        key[(torch.rand(key.shape, generator=generator) < 0.02).to(DEVICE)] = special
    return case


def small_tiles(monkeypatch, **tiles: int) -> None:
    monkeypatch.setattr(block_match, "match_tiles", lambda *args: configs.match_tiles(*args) | tiles)


@pytest.mark.parametrize("splits", [1, 2, 3, 4])
@pytest.mark.parametrize("special", [None, float("nan"), float("inf"), float("-inf")], ids=str)
def test_matches_are_those_of_argmax(special, splits, monkeypatch):
    """Exactly: ties go to the lowest index, NaN is the largest; however the keys are tiled and split."""
    small_tiles(monkeypatch, BLOCK_N=16)
    monkeypatch.setattr(block_match, "match_splits", lambda programs, tiles: splits)
    for seed, block_size in enumerate((1, 2, 3)):
        sizes = {"query_size": (5 * block_size - 1, 4 * block_size), "key_size": (7 * block_size - 1, 9 * block_size)}
        case = whole_number_case(seed, special=special, block_size=block_size, d_k=2, **sizes)
        assert case.run("triton")[0].equal(case.run("reference")[0])


def test_equal_keys_match_the_first(monkeypatch):
    small_tiles(monkeypatch, BLOCK_N=16)
    case = small_case(
        "block_match", block_size=1, key_size=(10, 7), layouts=("contiguous", "expanded_points", "strided")
    )
    for splits in (1, 5):
        monkeypatch.setattr(block_match, "match_splits", lambda programs, tiles, splits=splits: splits)
        assert not case.run("triton")[0].any()


@pytest.mark.parametrize("fill", [float("-inf"), float("nan"), float("inf")], ids=str)
def test_scores_that_are_all_infinite_or_nan(fill):
    case = small_case("block_match", block_size=1, heads=1, d_k=1, query_size=(2, 2), key_size=(9, 9))
    case.tensors["query"].detach().fill_(1)
    case.tensors["key"].detach().fill_(fill)
    assert not case.run("triton")[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_key_tiles(dtype):
    """Tiles as they are, more keys than one holds, ranges split as for a GPU."""
    case = small_case("block_match", block_size=2, d_k=40, query_size=(20, 18), key_size=(33, 31), dtype=dtype)
    assert_matches(case, *case.run("triton"))


# block_attention -----------------------------------------------------------------------------------------

PATTERNS = {
    "permutation": lambda n: torch.stack([torch.randperm(n), torch.randperm(n)]),
    "uniform": lambda n: torch.randint(n, (2, n)),
    "all_to_first": lambda n: torch.zeros(2, n),
    "all_to_last": lambda n: torch.full((2, n), n - 1),
    "two_long_lists": lambda n: torch.stack([torch.arange(n) % 2 * 5, torch.arange(n) // (n // 2) * (n // 3)]),
    "just_split": lambda n: torch.stack([(torch.arange(n) >= 17) * 3, (torch.arange(n) >= 16) * 3]),
    "out_of_range": lambda n: torch.stack([torch.randint(-n, 2 * n, (n,)), torch.arange(n) % 2 * 2 * n - n]),
    "all_out_of_range": lambda n: torch.stack([torch.full((n,), -(2**31)), torch.full((n,), n)]),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_index_patterns(pattern):
    assert_index_pattern(pattern, ONE_TILE)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_index_patterns_in_many_tiles(pattern):
    assert_index_pattern(pattern, MANY_TILES)


def test_split_lists_in_many_tiles(monkeypatch):
    """As above with shorter segments, for speed: both lists are split, and two blocks are out of range."""
    monkeypatch.setattr(block_attention, "SEGMENT", 2)
    index = torch.tensor([[[3, 3, 0, 3, 0, 0], [5, 5, 5, -1, 5, 6]]], dtype=torch.int32, device=DEVICE)
    assert_attends_by(
        index, small_case("block_attention", **MANY_TILES, layouts=("sliced", "channels_last", "strided"))
    )


def test_split_lists_in_one_pass_over_tiles_of_queries(monkeypatch):
    """float32 blocks of 36 points, of which a program takes 16 at a time; some of them cut."""
    monkeypatch.setattr(block_attention, "SEGMENT", 2)
    sizes = {"block_size": 6, "query_size": (13, 11), "key_size": (11, 14)}
    index = torch.tensor([[[3, 3, 0, 3, 0, 0], [5, 5, 5, -1, 5, 6]]], dtype=torch.int32, device=DEVICE)
    assert_attends_by(
        index, small_case("block_attention", **sizes, **ONE_TILE, layouts=("sliced", "channels_last", "strided"))
    )


def assert_index_pattern(pattern: str, dims: dict[str, int]) -> None:
    """35 query blocks and as many key blocks: lists that are empty, short, or split into segments."""
    torch.manual_seed(0)
    sizes = {"query_size": (9, 14), "key_size": (14, 9), "block_size": 2}
    assert 2 * block_attention.SEGMENT < 35
    case = small_case("block_attention", **sizes, **dims, scale=0.3, layouts=("strided", "channels_last", "transposed"))
    assert_attends_by(PATTERNS[pattern](35)[None].to(DEVICE, torch.int32), case)


def assert_attends_by(index: Tensor, case: Case) -> None:
    """The operator and its gradients equal the reference at that index.

    The operator itself is called, as the public function refuses an index out of range on the CPU.
    """
    options = case.options
    maps = [case.tensors[name] for name in ("query", "key", "value")]
    exact = [x.detach().double().requires_grad_() for x in maps]
    out, expected = ops.block_attention(*maps, index, **options), reference.block_attention(*exact, index, **options)
    upstream = arrange(torch.randn_like(out), "sliced_channels_last")
    assert_near(out, expected, 1e-5, "output")
    grads = torch.autograd.grad(out, maps, upstream)
    for name, grad, truth in zip(maps, grads, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        assert_near(grad, truth, 1e-5, f"gradient of {name}")
    block_size, num_heads = options["block_size"], options["num_heads"]
    rows, cols = count_blocks(maps[1].shape[-2:], block_size)
    outside = (index < 0) | (index >= rows * cols)
    for x in (out, grads[0]):
        assert not split_blocks(x, block_size, num_heads)[outside].any()


@pytest.mark.parametrize("dims", [ONE_TILE, MANY_TILES], ids=["one_tile", "many_tiles"])
def test_index_of_any_strides_and_either_dtype(dims):
    case = small_case("block_attention", **dims)
    index = case.tensors["index"]
    (out,) = case.run("triton")
    grads = torch.autograd.grad(out.square().sum(), list(case.differentiable().values()))
    for given in (index.long().mT.contiguous().mT, index.repeat_interleave(2, -1)[..., ::2]):
        (again,) = case.run("triton", index=given)
        assert again.equal(out)
        for x, y in zip(
            torch.autograd.grad(again.square().sum(), list(case.differentiable().values())), grads, strict=True
        ):
            assert x.equal(y)


@pytest.mark.parametrize("dims", [ONE_TILE, MANY_TILES], ids=["one_tile", "many_tiles"])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nan_propagates_as_in_the_reference(name, dims):
    case = small_case("block_attention", **dims)
    case.tensors["index"][..., :3] = 0
    case.tensors[name].detach()[0, 0, 2, 1] = float("nan")
    outs, expected = case.run("triton"), case.run("reference")
    upstream = random_upstream(outs, "contiguous")
    grads, expected_grads = gradients(case, outs, upstream), gradients(case, expected, upstream)
    assert outs[0].isnan().any()
    assert outs[0].isnan().equal(expected[0].isnan())
    for x in grads:
        assert grads[x].isnan().equal(expected_grads[x].isnan()), x


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("operation", ["distributed_attention", "block_attention"])
def test_scores_far_from_zero(operation, sign):
    """All scores near +-600: the missing points and keys, whose scores are 0, must not win."""
    case = small_case(operation, heads=1)
    case.tensors["query"].detach().mul_(0.1).add_(14)
    case.tensors["key"].detach().mul_(0.1).add_(14 * sign)
    upstream = None
    results = []
    for backend in ("triton", "reference"):
        outs = case.run(backend)
        upstream = upstream or random_upstream(outs, "contiguous")
        results.append({"output": outs[0], **gradients(case, outs, upstream)})
    for name, expected in results[1].items():
        assert_near(results[0][name], expected, 1e-3, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", ["distributed_attention", "block_attention"])
def test_negative_scale(operation, dtype):
    torch.manual_seed(0)
    assert_equals_reference(small_case(operation, heads=1, scale=-0.5, dtype=dtype))


# distributed_attention and block_aggregate ----------------------------------------------------------------


@pytest.mark.parametrize("splits", [1, 2, 3, 5])
def test_query_splits_and_many_tiles_of_keys(splits, monkeypatch):
    """Gradients of the keys from several ranges of queries, the last of which may be empty."""
    torch.manual_seed(0)
    tiles = {"BLOCK_M": 16, "BLOCK_N": 16}
    patched = lambda *args: configs.distributed_query_tiles(*args[:4]) | tiles  # noqa: E731
    for name in ("distributed_tiles", "distributed_query_tiles", "distributed_key_tiles"):
        monkeypatch.setattr(distributed_attention, name, patched)
    monkeypatch.setattr(distributed_attention, "distributed_splits", lambda programs, tiles: splits)
    sizes = {"block_size": 2, "query_size": (7, 9), "key_size": (9, 11), "heads": 1}
    assert_equals_reference(small_case("distributed_attention", **sizes), "transposed")


@pytest.mark.parametrize("layout", ["channels_last", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_keys_than_a_tile_holds(dtype, layout):
    """143 keys, where tiles have up to 128; rows of queries without and with gaps."""
    torch.manual_seed(0)
    sizes = {"block_size": 1, "query_size": (9, 9), "key_size": (11, 13), "heads": 1}
    assert_equals_reference(small_case("distributed_attention", dtype=dtype, layouts=(layout,) * 3, **sizes))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", ["block_aggregate", "distributed_attention"])
def test_scalars_of_any_dtype(operation, dtype):
    """alpha and beta are used in float32 and get gradients of their own dtype and shape."""
    case = small_case(operation, heads=1)
    scalars = {name: torch.full((1,), 0.7, dtype=dtype, device=DEVICE).requires_grad_() for name in ("alpha", "beta")}
    results = []
    for backend in ("triton", "reference"):
        outs = case.run(backend, **scalars)
        results.append([*outs, *torch.autograd.grad([x.square().sum() for x in outs], scalars.values())])
    for x, y in zip(*results, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        tolerance = 1e-5 if x.dtype in (torch.float32, torch.float64) else 1e-2
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# Gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [ONE_TILE, MANY_TILES], ids=["one_tile", "many_tiles"])
@pytest.mark.parametrize("operation", ["block_aggregate", "distributed_attention", "block_attention"])
def test_only_inputs_that_require_grad_get_one(operation, dims):
    case = small_case(operation, heads=1, **dims)
    outs = case.run("triton")
    upstream = random_upstream(outs, "contiguous")
    expected = gradients(case, outs, upstream)
    for wanted in expected:
        alone = {name: x.detach().requires_grad_(name == wanted) for name, x in case.differentiable().items()}
        outs = [(x, g) for x, g in zip(case.run("triton", **alone), upstream, strict=True) if x.requires_grad]
        torch.autograd.backward(*zip(*outs, strict=True))
        assert [name for name, x in alone.items() if x.grad is not None] == [wanted]
        assert alone[wanted].grad.equal(expected[wanted]), wanted


@pytest.mark.parametrize("operation", ["block_aggregate", "distributed_attention", "block_attention"])
def test_backward_is_bitwise_repeatable(operation, monkeypatch):
    monkeypatch.setattr(distributed_attention, "distributed_splits", lambda programs, tiles: 2)
    monkeypatch.setattr(block_attention, "SEGMENT", 2)
    case = small_case(operation, block_size=1, heads=1, query_size=(6, 6), key_size=(2, 3))
    outs = case.run("triton")
    upstream = random_upstream(outs, "contiguous")
    first, again = (gradients(case, case.run("triton"), upstream) for _ in range(2))
    assert all(first[name].equal(again[name]) for name in first)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU chooses the order of programs itself")
@pytest.mark.parametrize("dims", [ONE_TILE, MANY_TILES], ids=["one_tile", "many_tiles"])
@pytest.mark.parametrize("operation", DIFFERENTIABLE)
def test_order_of_programs_changes_nothing(operation, dims, monkeypatch):
    """Bitwise, outputs and gradients: segments of a list, tiles and blocks may be computed in any order."""
    monkeypatch.setattr(distributed_attention, "distributed_splits", lambda programs, tiles: 2)
    monkeypatch.setattr(block_attention, "SEGMENT", 2)
    case = small_case(operation, heads=1, block_size=2, query_size=(7, 5), key_size=(3, 3), **dims)
    upstream, results = None, []
    for shuffle in (False, True):
        if shuffle:
            shuffle_programs(monkeypatch)
        outs = [x for x in case.run("triton") if x.requires_grad]
        upstream = upstream or random_upstream(outs, "contiguous")
        results.append([*outs, *gradients(case, outs, upstream).values()])
    assert all(x.equal(y) for x, y in zip(*results, strict=True))


def shuffle_programs(monkeypatch) -> None:
    """Let Triton's interpreter run the programs of every launch in a random order."""
    from triton.runtime.interpreter import interpreter_builder as builder

    set_grid_dim, set_grid_idx, orders = builder.set_grid_dim, builder.set_grid_idx, []

    def start(*grid: int) -> None:
        orders[:] = [torch.randperm(n).tolist() for n in grid]
        set_grid_dim(*grid)

    def select(*program: int) -> None:
        set_grid_idx(*(order[i] for order, i in zip(orders, program, strict=True)))

    monkeypatch.setattr(builder, "set_grid_dim", start)
    monkeypatch.setattr(builder, "set_grid_idx", select)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_offsets_of_64_bits_change_nothing(operation, monkeypatch):
    case = small_case(operation, heads=1, layouts=("strided", "sliced_channels_last", "expanded_points"))
    results = []
    for large in (False, True):
        for module in (block_aggregate, block_attention, block_match, distributed_attention):
            monkeypatch.setattr(module, "is_large", lambda *maps, large=large: large)
        outs = case.run("triton")
        loss = [x.square().sum() for x in outs if x.requires_grad]
        grads = torch.autograd.grad(loss, list(case.differentiable().values())) if loss else ()
        results.append([*outs, *grads])
    assert all(x.equal(y) for x, y in zip(*results, strict=True))


def test_maps_that_need_offsets_of_64_bits():
    """Without memory: expanded maps are small however far their offsets go; strides alone decide."""
    x = torch.empty(1, device="meta")
    assert not is_large(x.as_strided((9, 4, 100, 100), (2**40, 1, 400, 4)))
    assert not is_large(x.expand(1, 256, 2**20, 2**20))
    assert is_large(x.as_strided((1, 2, 100, 100), (0, 2**31, 100, 1)))
    assert is_large(x.as_strided((1, 64, 2**13, 2**13), (2**32, 1, 2**19, 64)))


# The A2K module -------------------------------------------------------------------------------------------


def test_module_equals_reference():
    import a2k

    channels, side, batch = 64, 8, 1
    torch.manual_seed(0)
    module = a2k.A2K(channels, block_size=4).to(DEVICE)
    for x in module.parameters():
        torch.nn.init.normal_(x, std=channels**-0.5)
    features = torch.randn(2, batch, channels, side, side, device=DEVICE).clamp(min=0)
    upstream = torch.randn(batch, channels, side, side, device=DEVICE)
    results = []
    for backend in ("reference", "triton"):
        module.backend = backend
        content, style = (x.clone().requires_grad_() for x in features)
        out = module(content, style)
        inputs = {"content": content, "style": style, **dict(module.named_parameters())}
        grads = torch.autograd.grad(out, inputs.values(), upstream)
        results.append({"output": out, **dict(zip(inputs, grads, strict=True))})
    for name, expected in results[0].items():
        assert_near(results[1][name], expected, 1e-4 if name == "output" else 1e-3, name)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="the golden cases are on the CPU")
@pytest.mark.parametrize("number", range(4))
def test_golden_modules(number, monkeypatch):
    """Results of the published code, at the tolerances of tests/a2k/test_golden.py."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "a2k")
    import test_golden

    test_golden.test_a2k_module(test_golden.A2K_CASES[number], "triton")
