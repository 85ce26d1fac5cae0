"""Validation and its messages, the choice of backend, dtypes, autocast, memory formats, and what has a gradient."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import (
    DIFFERENTIABLE,
    INPUTS,
    LAYOUTS,
    OPERATIONS,
    WITH_MAP_OUTPUT,
    Case,
    arrange,
    assert_matches,
    assert_near,
    format_of,
    fresh_seeds,
    make_case,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import a2k_kernels
from a2k_kernels import api, products, reference, torch_backend

BACKENDS = ("torch", "reference")
HALF = (torch.float16, torch.bfloat16)
WITH_SCALARS = ("block_aggregate", "distributed_attention")


@pytest.fixture(autouse=True)
def no_backend_variable(monkeypatch):
    monkeypatch.delenv("A2K_BACKEND", raising=False)


def run_with(operation: str, **changes) -> tuple:
    """The operation with some inputs or options replaced."""
    case = make_case(operation)
    for name, x in changes.items():
        (case.tensors if name in case.tensors else case.options)[name] = x
    return case.run(None)


def operations_with(*names: str) -> list[str]:
    return [x for x in OPERATIONS if all(name in INPUTS[x] for name in names)]


# Validation ----------------------------------------------------------------------------------------------


def map_names() -> list[tuple[str, str]]:
    return [(operation, name) for operation in OPERATIONS for name in INPUTS[operation] if name != "index"]


@pytest.mark.parametrize("operation, name", map_names())
def test_map_must_be_a_tensor(operation, name):
    for given in (None, [[1.0]], np.ones((2, 6, 7, 10), dtype=np.float32), 1.0):
        with pytest.raises(TypeError, match=rf"^{name} must be a tensor, not {type(given).__name__}$"):
            run_with(operation, **{name: given})


@pytest.mark.parametrize("operation, name", map_names())
def test_map_must_be_dense(operation, name):
    with pytest.raises(TypeError, match=rf"^{name} has layout torch.sparse_coo; .* give {name}.to_dense\(\)$"):
        run_with(operation, **{name: torch.ones(2, 6, 7, 10).to_sparse()})


@pytest.mark.parametrize("operation, name", map_names())
@pytest.mark.parametrize("shape", [(), (4,), (4, 5, 6), (2, 6, 7, 10, 1), (2, 0, 7, 10), (2, 6, 0, 10), (2, 6, 7, 0)])
def test_map_must_have_four_dimensions_none_empty(operation, name, shape):
    given = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"^{name} has shape {given}; it must be \(B, C, H, W\) with C, H, W >= 1"):
        run_with(operation, **{name: torch.ones(shape)})


@pytest.mark.parametrize("operation, name", map_names())
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_map_must_have_a_supported_dtype(operation, name, dtype):
    with pytest.raises(TypeError, match=rf"^{name} is {dtype}; it must be float64, float32, float16 or bfloat16"):
        run_with(operation, **{name: torch.ones(2, 6, 7, 10).to(dtype)})


@pytest.mark.parametrize("operation, name", [x for x in map_names() if INPUTS[x[0]][0] != x[1]])
def test_maps_must_agree(operation, name):
    first, x = INPUTS[operation][0], make_case(operation).tensors[name].detach()
    with pytest.raises(TypeError, match=rf"^{name} is torch.float64 but {first} is torch.float32; they must agree"):
        run_with(operation, **{name: x.double()})
    with pytest.raises(ValueError, match=rf"^{name} has batch size 1 but {first} has 2; they must agree"):
        run_with(operation, **{name: x[:1]})
    with pytest.raises(ValueError, match=rf"^{name} is on meta but {first} is on cpu; move one of them"):
        run_with(operation, **{name: x.to("meta")})


@pytest.mark.parametrize("operation", operations_with("key", "value"))
def test_key_and_value_must_have_one_size(operation):
    with pytest.raises(ValueError, match=r"^value is \(6, 9\) points but key is \(9, 6\); they must agree"):
        run_with(operation, value=torch.ones(2, 10, 6, 9))


@pytest.mark.parametrize("operation", operations_with("query", "key"))
def test_query_and_key_must_have_the_same_channels(operation):
    with pytest.raises(ValueError, match=r"^key has 8 channels but query has 6; they must agree"):
        run_with(operation, key=torch.ones(2, 8, 9, 6))


@pytest.mark.parametrize("operation, name", map_names())
def test_heads_must_divide_the_channels(operation, name):
    message = rf"^{name} has 7 channels, which num_heads=2 does not divide; choose a num_heads that divides"
    with pytest.raises(ValueError, match=message):
        run_with(operation, **{name: torch.ones(2, 7, 9, 6)})


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", ["block_size", "num_heads"])
def test_block_size_and_num_heads_are_positive_integers(operation, name):
    for given in (0, -1):
        with pytest.raises(ValueError, match=f"^{name} is {given}; it must be at least 1"):
            run_with(operation, **{name: given})
    for given in (1.5, 2.0, True, "4", None, torch.tensor(4)):
        with pytest.raises(TypeError, match=f"^{name} must be an int, not {type(given).__name__}"):
            run_with(operation, **{name: given})


@pytest.mark.parametrize("given", [torch.zeros(2, 2, 6), torch.zeros(2, 2, 6, dtype=torch.int16)], ids=str)
def test_index_dtype(given):
    with pytest.raises(TypeError, match=f"^index is {given.dtype}; it must be an int32 or int64 tensor"):
        run_with("block_attention", index=given)


def test_index_must_be_a_tensor():
    with pytest.raises(TypeError, match=r"^index is list; it must be an int32 or int64 tensor"):
        run_with("block_attention", index=[0])


@pytest.mark.parametrize("shape", [(), (6,), (2, 2, 5), (2, 2, 7), (2, 1, 6), (1, 2, 6), (2, 2, 6, 1), (2, 2, 2, 3)])
def test_index_shape(shape):
    with pytest.raises(ValueError, match=r"^index has shape \(.*\); it must be .* = \(2, 2, 6\)"):
        run_with("block_attention", index=torch.zeros(shape, dtype=torch.int32))


def test_index_device():
    with pytest.raises(ValueError, match=r"^index is on meta but query is on cpu; move one of them"):
        run_with("block_attention", index=torch.zeros(2, 2, 6, dtype=torch.int32, device="meta"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lowest, highest", [(-1, 5), (0, 6), (-(2**31), 2**31 - 1)])
def test_index_out_of_range(lowest, highest, dtype):
    index = torch.zeros(2, 2, 6, dtype=dtype)
    index[1, 0, 3], index[0, 1, 5] = lowest, highest
    with pytest.raises(ValueError, match=rf"^index has values from {lowest} to {highest}; key has blocks 0 to 5"):
        run_with("block_attention", index=index)


@pytest.mark.parametrize("band_elements", [100, 1 << 22])
def test_index_out_of_range_gives_zeros_where_it_cannot_be_checked(band_elements, monkeypatch):
    """A graph can't raise on values: the blocks are masked, as on a GPU, and never read from another head."""
    monkeypatch.setattr(torch_backend, "BAND_ELEMENTS", band_elements)
    torch._dynamo.reset()
    case = make_case("block_attention", batch=2, heads=2)
    (expected,) = case.run("torch")
    expected = expected.detach().clone()
    expected[0, :5, :4, :4] = expected[1, 5:, 4:, 8:] = expected[1, :5, 4:, :4] = 0
    index = case.tensors["index"].clone()
    index[0, 0, 0], index[1, 1, 5], index[1, 0, 3] = -1, 6, 2**31 - 1
    run = torch.compile(lambda: case.run("torch", index=index), backend="eager", fullgraph=True)
    torch.testing.assert_close(run()[0], expected)


@pytest.mark.parametrize("operation", WITH_SCALARS)
@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_alpha_and_beta(operation, name):
    for shape in ((2,), (1, 1), (0,)):
        given = str(shape).replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(ValueError, match=rf"^{name} has shape {given}; it must be a float or of shape \(\) or"):
            run_with(operation, **{name: torch.ones(shape)})
    with pytest.raises(TypeError, match=f"^{name} is torch.int64; it must be a float or a floating-point tensor"):
        run_with(operation, **{name: torch.tensor(1)})
    with pytest.raises(ValueError, match=f"^{name} is on meta but key is on cpu; move one of them"):
        run_with(operation, **{name: torch.ones((), device="meta")})
    for given in (None, "1", [1.0]):
        with pytest.raises(TypeError, match=f"^{name} must be a float, not {type(given).__name__}"):
            run_with(operation, **{name: given})


@pytest.mark.parametrize("operation", WITH_MAP_OUTPUT)
@pytest.mark.parametrize("given", [None, "1", torch.ones(2), 1j], ids=str)
def test_scale_must_be_a_float(operation, given):
    with pytest.raises(TypeError, match=f"^scale must be a float, not {type(given).__name__}"):
        run_with(operation, scale=given)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_options_are_keyword_only(operation):
    maps = list(make_case(operation).tensors.values())
    with pytest.raises(TypeError, match="positional"):
        getattr(a2k_kernels, operation)(*maps, 4, 2)


# Backends ------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Names of the backends that block_match was called in."""
    called = []
    for name, module in (("torch", torch_backend), ("reference", reference)):
        original = module.block_match
        monkeypatch.setattr(
            module, "block_match", lambda *args, name=name, f=original, **kw: called.append(name) or f(*args, **kw)
        )
    return called


@pytest.mark.parametrize(
    "argument, variable, expected",
    [
        (None, None, "torch"),
        (None, "", "torch"),
        (None, "torch", "torch"),
        (None, "reference", "reference"),
        ("torch", None, "torch"),
        ("reference", None, "reference"),
        ("reference", "torch", "reference"),
        ("torch", "reference", "torch"),
        ("torch", "nonsense", "torch"),
        ("reference", "triton", "reference"),
    ],
)
def test_argument_before_variable_before_automatic(argument, variable, expected, calls, monkeypatch):
    if variable is not None:
        monkeypatch.setenv("A2K_BACKEND", variable)
    make_case("block_match").run(argument)
    assert calls == [expected]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_unknown_backend(operation, monkeypatch):
    for given in ("Triton", "cuda", "", 3):
        message = f"^backend is {given!r}; choose one of 'triton', 'torch', 'reference'"
        with pytest.raises(ValueError, match=message):
            make_case(operation).run(given)
    monkeypatch.setenv("A2K_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"^A2K_BACKEND is 'cuda'; choose one of 'triton', 'torch', 'reference'"):
        make_case(operation).run(None)


OBSTACLES = [
    ({"dtype": torch.float64}, r"its kernels do not compute in float64"),
    ({"block_size": 17, "query_size": (3, 17), "key_size": (17, 5)}, r"block_size is 17, over its 16"),
    ({"d_k": 257, "d_v": 257}, r"a head has 257 channels, over its 256"),
    (
        {"batch": 21846, "heads": 3, "d_k": 1, "d_v": 1, "query_size": (1, 1), "key_size": (1, 1)},
        r"the batch is 21846 maps of 3 heads, over its 65535 together",
    ),
]


@pytest.mark.parametrize("geometry, obstacle", OBSTACLES, ids=["float64", "block_size", "channels", "batch"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_triton_never_falls_back(operation, geometry, obstacle, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = make_case(operation, **geometry)
    with pytest.raises(RuntimeError, match=rf"^backend is 'triton', but {obstacle}; choose 'torch'$"):
        case.run("triton")
    monkeypatch.setenv("A2K_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=rf"^A2K_BACKEND is 'triton', but {obstacle}; choose 'torch'$"):
        case.run(None)


@pytest.mark.parametrize("interpret", [None, "0"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_triton_takes_cpu_tensors_only_in_its_interpreter(operation, interpret, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if interpret is not None:
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
    message = r"but the tensors are on cpu, where it needs TRITON_INTERPRET=1, set before Python starts; choose 'torch'"
    with pytest.raises(RuntimeError, match=message):
        make_case(operation).run("triton")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_triton_may_be_absent(operation, monkeypatch):
    monkeypatch.setattr(api, "TRITON_FOUND", False)
    with pytest.raises(RuntimeError, match=r"^backend is 'triton', but Triton is not installed; choose 'torch'$"):
        make_case(operation).run("triton")
    assert api.backend_for(None, gpu_map(), block_size=4, num_heads=2) is torch_backend


def gpu_map(channels: int = 8, dtype: torch.dtype = torch.bfloat16, batch: int = 1) -> SimpleNamespace:
    """As much of a map on a GPU as choosing a backend looks at."""
    return SimpleNamespace(is_cuda=True, dtype=dtype, shape=(batch, channels, 9, 9))


def test_automatic_choice():
    """Triton on a GPU where it can run, else torch; on the CPU torch, even with the interpreter."""
    pytest.importorskip("triton")
    from a2k_kernels import ops

    def choice(*maps, block_size=4, num_heads=2):
        return api.backend_for(None, *maps, block_size=block_size, num_heads=num_heads)

    assert choice(gpu_map()) is ops
    assert choice(gpu_map(512), gpu_map(512), block_size=16) is ops
    assert choice(gpu_map(dtype=torch.float64)) is torch_backend
    assert choice(gpu_map(), block_size=17) is torch_backend
    assert choice(gpu_map(512), gpu_map(514)) is torch_backend
    assert choice(gpu_map(batch=32767)) is ops
    assert choice(gpu_map(batch=32768)) is torch_backend
    assert choice(torch.ones(1, 8, 9, 9)) is torch_backend

    def choice_within(x):
        chosen.append(choice(gpu_map(), x))
        return x * 1

    chosen, x = [], torch.ones(1, 8, 9, 9)
    torch.func.vmap(choice_within)(x[None])
    torch.func.grad(lambda x: choice_within(x).sum())(x)
    torch.func.jvp(choice_within, (x,), (x,))
    assert chosen == [torch_backend] * 3


def test_import_is_light():
    """The kernels package needs neither the model package nor Triton nor Pillow."""
    code = (
        "import sys, a2k_kernels; print([x for x in ('a2k', 'triton', 'PIL', 'torchvision') if x in sys.modules],"
        "a2k_kernels.__file__)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.startswith("[] ")
    assert out.strip().endswith("__init__.py")


def test_public_names():
    assert sorted(a2k_kernels.__all__) == sorted((*OPERATIONS, "attend_aggregates"))


# Smallest inputs -----------------------------------------------------------------------------------------


def output_shapes(case: Case) -> list[tuple[int, ...]]:
    """Shapes of the outputs of a make_case with d_k = 3, d_v = 5, block_size = 4."""

    def blocks(name: str) -> int:
        H, W = case.tensors[name].shape[-2:]
        return -(-H // 4) * -(-W // 4)

    heads, B = case.options["num_heads"], case.tensors["key"].shape[0]
    if case.operation == "block_aggregate":
        return [(B, heads, blocks("key"), 3), (B, heads, blocks("key"), 5)]
    index_shape = (B, heads, blocks("query"))
    if case.operation == "block_match":
        return [index_shape]
    out = (B, heads * 5, *case.tensors["query"].shape[-2:])
    return [out, index_shape] if case.operation == "progressive_attention" else [out]


@pytest.mark.parametrize("band_elements", [1, 1 << 22])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, operation, band_elements, monkeypatch):
    monkeypatch.setattr(torch_backend, "BAND_ELEMENTS", band_elements)
    case = make_case(operation, batch=0, layouts=("channels_last",) * 3)
    outs = case.run(backend)
    assert [tuple(x.shape) for x in outs] == output_shapes(case)
    if operation != "block_match":
        inputs = case.differentiable().values()
        grads = torch.autograd.grad([x.sum() for x in outs if x.requires_grad], inputs)
        assert [x.shape for x in grads] == [x.shape for x in inputs]
        assert all(not x.any() for x in grads)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "query_size, key_size", [((1, 1), (1, 1)), ((1, 1), (5, 9)), ((5, 9), (1, 1)), ((1, 6), (6, 1))]
)
def test_shapes_of_results(backend, operation, query_size, key_size):
    case = make_case(operation, query_size=query_size, key_size=key_size)
    outs = case.run(backend)
    assert [tuple(x.shape) for x in outs] == output_shapes(case)
    assert all(x.isfinite().all() for x in outs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_progressive_attention_is_match_then_attention(backend):
    case = make_case("progressive_attention", scale=0.5)
    out, index = case.run(backend)
    query, key, value = (case.tensors[name] for name in ("query", "key", "value"))
    sizes = {"block_size": 4, "num_heads": 2, "backend": backend}
    assert index.equal(a2k_kernels.block_match(query, key, **sizes))
    for given in (index, index.long()):
        assert out.equal(a2k_kernels.block_attention(query, key, value, given, scale=0.5, **sizes))
    alone = a2k_kernels.progressive_attention(query, key, value, scale=0.5, **sizes)
    assert alone.equal(out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", WITH_SCALARS)
def test_float_scalars_and_defaults(operation, backend):
    case = make_case(operation, dtype=torch.float64)
    tensors = {name: torch.tensor(x, dtype=torch.float64) for name, x in (("alpha", 1 / 3), ("beta", -0.1))}
    for x, y in zip(case.run(backend, alpha=1 / 3, beta=-0.1), case.run(backend, **tensors), strict=True):
        assert x.equal(y)  # floats are not rounded to float32 on the way to float64 maps
    maps = [case.tensors[name] for name in INPUTS[operation]]
    out = getattr(a2k_kernels, operation)(*maps, block_size=4, num_heads=2, backend=backend)
    out = out if isinstance(out, tuple) else (out,)
    for x, y in zip(out, case.run(backend, alpha=1, beta=np.float32(0)), strict=True):
        assert x.equal(y)


# Dtypes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtype_of_results(backend, operation, dtype):
    case = make_case(operation, dtype=dtype)
    outs = case.run(backend)
    expected = {"block_match": [torch.int32], "progressive_attention": [dtype, torch.int32]}
    assert [x.dtype for x in outs] == expected.get(operation, [dtype] * len(outs))
    if operation != "block_match":
        inputs = case.differentiable().values()
        grads = torch.autograd.grad([x.sum() for x in outs if x.requires_grad], inputs)
        assert [x.dtype for x in grads] == [x.dtype for x in inputs]


@pytest.mark.parametrize("scalar_dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("operation", WITH_SCALARS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scalars_keep_shape_and_dtype_in_their_gradient(backend, operation, shape, scalar_dtype):
    """For every dtype of the maps; and they are used in float32, whatever dtype the maps have."""
    for dtype in (torch.float64, torch.float32, *HALF):
        case = make_case(operation, dtype=dtype)
        scalars = {name: torch.full(shape, 0.7, dtype=scalar_dtype).requires_grad_() for name in ("alpha", "beta")}
        case.tensors |= scalars
        outs = case.run(backend)
        assert all(x.dtype == dtype for x in outs)
        grads = torch.autograd.grad([x.sum() for x in outs], scalars.values())
        assert all(x.shape == shape and x.dtype == scalar_dtype and x.any() for x in grads)


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return (actual.detach().double() - exact.detach()).norm().item()


@pytest.mark.parametrize("block_size", [1, 4, 8])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("operation", ["block_aggregate", "distributed_attention", "block_attention"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_as_accurate_as_the_formulas_in_that_dtype(
    backend, operation, dtype, block_size, monkeypatch
):
    """At most twice the error of the reference run operation by operation in the dtype; gradients too."""
    sizes = {"query_size": (21, 18), "key_size": (17, 22), "block_size": block_size}
    case = make_case(operation, heads=2, d_k=24, d_v=16, dtype=dtype, scale=24**-0.5, **sizes)
    exact = case.converted(torch.float64)
    expected, actual = exact.run("reference"), case.run(backend)
    upstream = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype) for x in actual]
    maps = [name for name in case.differentiable() if name not in ("alpha", "beta")]

    def gradients(case: Case, outs: tuple) -> list:
        inputs = [case.tensors[name] for name in maps]
        return list(torch.autograd.grad(outs, inputs, [x.to(outs[0].dtype) for x in upstream]))

    actual_grads = gradients(case, actual)
    monkeypatch.setattr(reference, "at_least_float32", lambda x: x)
    plain = case.run("reference")
    assert all(x.dtype == dtype for x in plain)
    results = zip(
        ["output"] * len(actual) + maps,
        [*actual, *actual_grads],
        [*plain, *gradients(case, plain)],
        [*expected, *gradients(exact, expected)],
        strict=True,
    )
    for name, ours, theirs, truth in results:
        assert error(ours, truth) <= 2 * error(theirs, truth) + 1e-6, name


@pytest.mark.parametrize("d_v", [4, 6])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("operation", WITH_MAP_OUTPUT)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_scores_may_exceed_its_range(backend, operation, layout, d_v):
    """Inner products of about 4 * 300**2, far above 65504; the small scale brings them back."""
    for scale in (1.0, 1e-5):
        case = make_case(operation, d_k=4, d_v=d_v, scale=scale, dtype=torch.float16, layouts=(layout,) * 3)
        for name in ("query", "key"):
            case.tensors[name].detach().mul_(20).add_(300)
        if "alpha" in case.tensors:  # all gates open, so that aggregated keys are as large
            case.tensors["alpha"].detach().fill_(1)
        out, expected = case.run(backend)[0], case.converted(torch.float64).run("reference")[0]
        assert out.isfinite().all()
        if operation != "distributed_attention" or scale < 1:  # else rounding the aggregated keys changes the winner
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=0.1 if scale == 1 else 0.02)


def score_case(query: list[float], keys: list[list[float]], dtype: torch.dtype) -> Case:
    """block_match of one query block of one point against key blocks of one point; the channels are given."""
    q = torch.tensor(query, dtype=torch.float64).view(1, -1, 1, 1)
    k = torch.tensor(keys, dtype=torch.float64).mT.reshape(1, len(query), 1, len(keys))
    return Case("block_match", {"query": q.to(dtype), "key": k.to(dtype)}, {"block_size": 1, "num_heads": 1})


@pytest.mark.parametrize(
    "dtype, query, keys",
    [
        (torch.bfloat16, [16, 1], [[16, 0], [16, 1]]),  # 256 and 257, which bfloat16 rounds to 256
        (torch.float16, [32, 1], [[64, 0], [64, 1]]),  # 2048 and 2049, which float16 rounds to 2048
        (torch.float16, [300, 1], [[300, 0], [300, 1]]),  # both infinite in float16
        (torch.float32, [1, 0], [[1, 0], [1 + 2**-20, 0]]),  # differ in float32 (not in tf32)
        (torch.float64, [4096, 1], [[4096, 0], [4096, 1]]),  # 2**24 and 2**24 + 1: float64 stays float64
    ],
    ids=str,
)
@pytest.mark.parametrize("autocast", [None, *HALF], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_match_scores_are_not_rounded(backend, autocast, dtype, query, keys):
    case = score_case(query, keys, dtype)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        (index,) = case.run(backend)
    assert index.item() == 1


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_matches_are_exact(backend, dtype):
    case = make_case("block_match", heads=4, d_k=16, query_size=(64, 64), key_size=(64, 64), block_size=2, dtype=dtype)
    assert_matches(case, *case.run(backend))


@pytest.mark.parametrize("autocast", HALF, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF, torch.float64], ids=str)
@pytest.mark.parametrize("operation", DIFFERENTIABLE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend, operation, dtype, autocast):
    """Results are those of maps in the autocast dtype; float64 is left alone; gradients have the input's dtype."""
    case = make_case(operation, dtype=dtype, layouts=("channels_last",) * 3)
    target = dtype if dtype == torch.float64 else autocast
    with torch.autocast("cpu", autocast):
        outs = case.run(backend)
        assert torch.is_autocast_enabled("cpu")
    cast = {name: case.tensors[name].to(target) for name in ("query", "key", "value") if name in case.tensors}
    if operation == "progressive_attention":
        *outs, index = outs
        assert index.equal(case.run(backend)[1])  # matched in float32, without autocast's rounding
        case.operation = "block_attention"
        del case.options["return_index"]
        cast["index"] = index
    for x, y in zip(outs, case.run(backend, **cast), strict=True):
        assert x.dtype == target
        assert x.equal(y)
    inputs = [x for name, x in case.differentiable().items()]
    grads = torch.autograd.grad([x.sum() for x in outs], inputs)
    assert [x.dtype for x in grads] == [x.dtype for x in inputs]


@pytest.mark.parametrize("seed", fresh_seeds(3), ids="seed{}".format)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_takes_maps_of_different_dtypes(backend, operation, seed):
    """Results are those of maps in the autocast dtype, and matches those of the maps as they are."""
    case = make_case(operation, seed=seed)
    maps = [name for name in INPUTS[operation] if name != "index"]
    dtypes = dict(zip(maps, ((*HALF, torch.float32) * 2)[seed % 3 :], strict=False))
    given = {name: case.tensors[name].to(dtype) for name, dtype in dtypes.items()}
    with torch.autocast("cpu", torch.bfloat16):
        actual = case.run(backend, **given)
        with pytest.raises(TypeError, match="they must agree"):
            case.run(backend, **(given | {maps[0]: given[maps[0]].double()}))
    if operation in ("block_match", "progressive_attention"):
        exact = {name: given[name].float() for name in ("query", "key")}
        options = {name: case.options[name] for name in ("block_size", "num_heads")}
        assert actual[-1].equal(*Case("block_match", exact, options).run(backend))
    if operation != "block_match":
        cast = {name: x.bfloat16() for name, x in given.items()}
        if operation == "progressive_attention":
            case.operation, cast["index"] = "block_attention", actual[-1]
            del case.options["return_index"]
        for x, y in zip(actual, case.run(backend, **cast), strict=False):
            assert x.dtype == torch.bfloat16
            assert x.equal(y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_takes_aggregates_in_its_dtype(backend):
    query, key, value = (make_case("distributed_attention").tensors[name] for name in ("query", "key", "value"))
    options = {"block_size": 4, "num_heads": 2, "backend": backend}
    with torch.autocast("cpu", torch.bfloat16):
        aggregates = a2k_kernels.block_aggregate(key, value, **options)
        out = a2k_kernels.attend_aggregates(query, *aggregates, backend=backend)
    assert out.equal(a2k_kernels.attend_aggregates(query.bfloat16(), *aggregates, backend=backend))


# Memory formats ------------------------------------------------------------------------------------------


def strides_of(shape: torch.Size, memory_format: torch.memory_format) -> tuple[int, ...]:
    return torch.empty(shape, memory_format=memory_format).stride()


def test_layouts_are_what_their_names_say():
    """Guards the tests below: which layouts have channel stride 1."""
    for layout in LAYOUTS:
        x = arrange(torch.randn(2, 6, 7, 10), layout)
        assert (x.stride(1) == 1) == (format_of(layout, x.shape) == torch.channels_last), layout


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", DIFFERENTIABLE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_format_of_outputs_and_gradients(backend, operation, layout, autocast):
    """Outputs as the query, each gradient as its own input, whatever the other maps and upstream gradients are."""
    for other in ("contiguous", "channels_last"):
        for upstream in ("contiguous", "channels_last", "expanded_points"):
            case = make_case(operation)
            layouts = {"query": layout, "key": other, "value": layout}
            maps = {name: arrange(case.tensors[name], layouts[name]) for name in layouts if name in case.tensors}
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                outs = case.run(backend, **maps)
            if operation in WITH_MAP_OUTPUT:
                outs = outs[:1]
                expected = format_of(layout, case.tensors["query"].shape)
                assert outs[0].stride() == strides_of(outs[0].shape, expected)
            else:
                assert all(x.is_contiguous() for x in outs)
            grads = torch.autograd.grad(outs, maps.values(), [arrange(torch.randn_like(x), upstream) for x in outs])
            for (name, x), grad in zip(maps.items(), grads, strict=True):
                expected = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
                assert grad.stride() == strides_of(x.shape, expected), name


@pytest.mark.parametrize("operation", WITH_MAP_OUTPUT)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("band_elements", [100, 1 << 22])
def test_maps_with_one_channel_or_one_point_are_contiguous(backend, operation, band_elements, monkeypatch):
    monkeypatch.setattr(torch_backend, "BAND_ELEMENTS", band_elements)
    for heads, d_k, size in ((1, 1, (7, 10)), (2, 3, (1, 1))):
        case = make_case(operation, heads=heads, d_k=d_k, query_size=size, layouts=("channels_last",) * 3)
        query = case.tensors["query"]
        assert query.stride(1) == 1
        out = case.run(backend)[0]
        (grad,) = torch.autograd.grad(out.sum(), query)
        assert out.is_contiguous()
        assert grad.is_contiguous()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_as_they_are(backend, operation):
    case = make_case(operation, block_size=1)
    before = {name: x.detach().clone() for name, x in case.tensors.items()}
    outs = case.run(backend)
    for name, x in case.tensors.items():
        assert x.equal(before[name])
        assert all(x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr() for out in outs)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_meta_tensors_have_shapes(backend, operation):
    case = make_case(operation)
    outs = case.run(backend, **{name: x.to("meta") for name, x in case.tensors.items()})
    for x, expected in zip(outs, case.run(backend), strict=True):
        assert (x.shape, x.dtype, x.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize("d_v", [3, 5])
@pytest.mark.parametrize("operation", WITH_MAP_OUTPUT)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_of_nan_is_seen(backend, operation, d_v):
    case = make_case(operation, d_v=d_v, scale=float("nan"))
    assert case.run(backend)[0].isnan().all()
    with torch.no_grad():
        assert case.run(backend)[0].isnan().all()


# Gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("band_elements", [100, 1 << 22])
@pytest.mark.parametrize("operation", DIFFERENTIABLE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_inputs_that_require_grad_get_one(backend, operation, band_elements, monkeypatch):
    monkeypatch.setattr(torch_backend, "BAND_ELEMENTS", band_elements)
    everything = make_case(operation)
    outs = [x for x in everything.run(backend) if x.is_floating_point()]
    grads = torch.autograd.grad([x.sum() for x in outs], everything.differentiable().values())
    expected = dict(zip(everything.differentiable(), grads, strict=True))
    for wanted in expected:
        case = make_case(operation)
        for name, x in case.differentiable().items():
            x.requires_grad_(name == wanted)
        sum(x.sum() for x in case.run(backend) if x.requires_grad).backward()
        for name, x in case.differentiable().items():
            if name == wanted:
                torch.testing.assert_close(x.grad, expected[name])
            else:
                assert x.grad is None


@pytest.mark.parametrize("seed", fresh_seeds(1), ids="seed{}".format)
@pytest.mark.parametrize("band_elements", [100, 1 << 22])
@pytest.mark.parametrize("operation", DIFFERENTIABLE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_gradients(backend, operation, band_elements, seed, monkeypatch):
    """torch.func.grad, which takes other paths through autograd."""
    monkeypatch.setattr(torch_backend, "BAND_ELEMENTS", band_elements)
    case = make_case(operation, seed=seed)
    inputs = case.differentiable()

    def loss(tensors):
        return sum(x.square().sum() for x in case.run(backend, **tensors) if x.is_floating_point())

    actual = torch.func.grad(loss)({name: x.detach() for name, x in inputs.items()})
    for name, expected in zip(inputs, torch.autograd.grad(loss(inputs), inputs.values()), strict=True):
        torch.testing.assert_close(actual[name], expected)


@pytest.mark.parametrize("seed", fresh_seeds(1), ids="seed{}".format)
@pytest.mark.parametrize("operation", [x for x in DIFFERENTIABLE if x != "block_attention"])  # which reads its index
@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap(backend, operation, seed):
    """Of outputs and of gradients, one sample at a time."""
    cases = [make_case(operation, seed=seed + i) for i in range(3)]
    maps = {name: torch.stack([case.tensors[name].detach() for case in cases]) for name in cases[0].tensors}

    def out(tensors):
        return cases[0].run(backend, **tensors)[0]

    def grad(tensors):
        return torch.func.grad(lambda x: out(x).square().sum())(tensors)

    for function in (out, grad):
        expected = [function({name: x[i] for name, x in maps.items()}) for i in range(3)]
        expected = torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *expected)
        torch.testing.assert_close(torch.vmap(function)(maps), expected)


@pytest.mark.parametrize("seed", fresh_seeds(1), ids="seed{}".format)
@pytest.mark.parametrize("operation", DIFFERENTIABLE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_fake_tensors(backend, operation, seed):
    """Shapes alone, as of a model that is planned before it is trained: nothing may be read back."""
    case = make_case(operation, seed=seed)
    expected = case.run(backend)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) for name, x in case.tensors.items()}
        outs = case.run(backend, **fake)
        sum(x.sum() for x in outs if x.is_floating_point()).backward()
    assert [(x.shape, x.dtype) for x in outs] == [(x.shape, x.dtype) for x in expected]
    assert all(fake[name].grad.shape == x.shape for name, x in case.differentiable().items())


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients(backend, operation):
    case = make_case(operation)
    expected = case.run(backend)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            outs = case.run(backend)
        for x, y in zip(outs, expected, strict=True):
            assert not x.requires_grad
            torch.testing.assert_close(x, y.detach())
    for x in case.differentiable().values():
        x.requires_grad_(False)
    assert not any(x.requires_grad for x in case.run(backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_index_is_not_differentiable(backend):
    assert not make_case("block_match").run(backend)[0].requires_grad
    out, index = make_case("progressive_attention").run(backend)
    assert out.requires_grad
    assert not index.requires_grad


@pytest.mark.parametrize("seed", fresh_seeds(2), ids="seed{}".format)
@pytest.mark.parametrize("operation", WITH_MAP_OUTPUT)
def test_forward_mode_derivatives_equal_reference(operation, seed, monkeypatch):
    """With respect to every map, by torch.func.jvp and by dual tensors, where products are left to oneDNN."""
    monkeypatch.setattr(products, "LEAST_FLOPS", 0)
    case = make_case(operation, d_k=4, d_v=4, seed=seed)
    maps = {name: x.detach() for name, x in case.tensors.items() if name in ("query", "key", "value")}
    others = {name: x.detach() for name, x in case.tensors.items() if name not in maps}
    torch.manual_seed(seed)
    tangents = {name: torch.randn_like(x) for name, x in maps.items()}

    def derivative(backend):
        return torch.func.jvp(lambda x: case.run(backend, **others, **x)[0], (maps,), (tangents,))[1]

    expected = derivative("reference")
    assert expected.abs().max() > 0.1
    assert_near(derivative("torch"), expected, 1e-4, "jvp")
    with torch.no_grad(), forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(x, tangents[name]) for name, x in maps.items()}
        out = forward_ad.unpack_dual(case.run("torch", **others, **dual)[0])
        assert_near(out.tangent, expected, 1e-4, "dual")


@pytest.mark.parametrize("seed", fresh_seeds(1), ids="seed{}".format)
@pytest.mark.parametrize("operation", WITH_MAP_OUTPUT)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_derivatives_of_what_is_trained(backend, operation, seed):
    """All tensors require a gradient: the one with a tangent, and those that a function captures."""
    case = make_case(operation, d_k=4, d_v=4, seed=seed)
    query = case.tensors["query"].detach()
    tangent = torch.randn(query.shape, generator=torch.Generator().manual_seed(seed))

    def derivative(backend, **others):
        out = torch.func.jvp(lambda x: case.run(backend, query=x, **others)[0], (query,), (tangent,))[1]
        return out.detach()

    expected = derivative("reference", **{name: x.detach() for name, x in case.tensors.items() if name != "query"})
    captured = derivative(backend)
    with forward_ad.dual_level():
        out = case.run(backend, query=forward_ad.make_dual(query.clone().requires_grad_(), tangent))[0]
        dual = forward_ad.unpack_dual(out).tangent
    assert expected.abs().max() > 0.1
    assert_near(captured, expected, 1e-4, "jvp")
    assert_near(dual, expected, 1e-4, "dual")


@pytest.mark.parametrize("band_elements", [100, 1 << 22])
@pytest.mark.parametrize("operation", WITH_MAP_OUTPUT)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_may_be_changed_after_the_call(backend, operation, band_elements, monkeypatch):
    """Query and index, whose buffers are used again: the gradients are those of what was given, or it raises."""
    monkeypatch.setattr(torch_backend, "BAND_ELEMENTS", band_elements)

    def gradients(changed=None):
        case = make_case(operation)
        given = {"query": case.tensors["query"] * 1}
        if operation == "block_attention":
            given["index"] = case.tensors["index"].long()
        out = case.run(backend, **given)[0]
        if changed in given:
            with torch.no_grad():
                given[changed].zero_()
        return torch.autograd.grad(out.square().sum(), case.differentiable().values())

    expected = gradients()
    for name in ("query", "index"):
        try:
            actual = gradients(changed=name)
        except RuntimeError as error:
            assert "inplace" in str(error)
        else:
            for x, y in zip(actual, expected, strict=True):
                torch.testing.assert_close(x, y)


@pytest.mark.parametrize("seed", fresh_seeds(1), ids="seed{}".format)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_default_device_does_not_matter(backend, operation, seed):
    case = make_case(operation, seed=seed)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            expected = case.run(backend)
            with torch.device("meta"):
                actual = case.run(backend)
        for x, y in zip(actual, expected, strict=True):
            assert x.device.type == "cpu"
            assert x.equal(y)


@pytest.mark.parametrize("seed", fresh_seeds(2), ids="seed{}".format)
@pytest.mark.parametrize("sizes", [((7, 10), (9, 6)), ((3, 2), (5, 11)), ((1, 1), (1, 1)), ((1, 12), (4, 4))], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_larger_than_the_maps_cost_nothing(backend, operation, sizes, seed):
    """The result is that of blocks just as large as the maps; those asked for would not fit the memory."""
    case = make_case(operation, query_size=sizes[0], key_size=sizes[1], block_size=12, seed=seed)
    expected = case.run(backend)
    case.options["block_size"] = 1 << 40
    for x, y in zip(case.run(backend), expected, strict=True):
        torch.testing.assert_close(x, y)
    with torch.no_grad():
        for x, y in zip(case.run(backend), expected, strict=True):
            torch.testing.assert_close(x, y.detach())


class ProgressiveAttention(torch.nn.Module):
    def forward(self, query, key):
        return a2k_kernels.progressive_attention(query, key, key, block_size=8, num_heads=2, backend="torch")


@pytest.mark.parametrize("seed", fresh_seeds(1), ids="seed{}".format)
def test_exports_for_maps_of_any_size(seed):
    """The size of blocks, limited by that of the maps, once became a symbol."""
    torch.manual_seed(seed)
    query, key = torch.randn(1, 16, 24, 32), torch.randn(1, 16, 16, 40)
    sides = dict.fromkeys((2, 3), torch.export.Dim.AUTO)
    program = torch.export.export(ProgressiveAttention(), (query, key), dynamic_shapes=(sides, sides)).module()
    query = torch.randn(1, 16, 40, 48)
    torch.testing.assert_close(program(query, key), ProgressiveAttention()(query, key))


class DistributedAttention(torch.nn.Module):
    def forward(self, query, key):
        return a2k_kernels.distributed_attention(query, key, key, block_size=8, num_heads=2, backend="torch")


@pytest.mark.parametrize("seed", fresh_seeds(1), ids="seed{}".format)
@pytest.mark.parametrize("module", [ProgressiveAttention(), DistributedAttention()], ids=lambda x: type(x).__name__)
def test_exports_for_batches_of_any_size(module, seed, monkeypatch):
    """Though bands depend on it: a batch once was limited to those with as many."""
    monkeypatch.setattr(torch_backend, "BAND_ELEMENTS", 1 << 14)
    torch.manual_seed(seed)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    inputs = torch.randn(3, 16, 24, 32), torch.randn(3, 16, 16, 40)
    program = torch.export.export(module, inputs, dynamic_shapes=(batch, batch)).module()
    for size in (2, 3, 64):
        inputs = torch.randn(size, 16, 24, 32), torch.randn(size, 16, 16, 40)
        torch.testing.assert_close(program(*inputs), module(*inputs))
