"""The Triton operators within PyTorch: opcheck, compile, export, autocast, checkpointing, what a graph saves."""

import sys
from collections.abc import Callable

import pytest
import torch
from cases import (
    DEVICE,
    DIFFERENTIABLE,
    INPUTS,
    OPERATIONS,
    Case,
    at_index,
    gradients,
    random_upstream,
    small_case,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import a2k_kernels

pytest.importorskip("triton")

from a2k_kernels import ops

pytestmark = pytest.mark.usefixtures("poisoned_memory", "corrected_interpreter")
traced = pytest.mark.skipif(
    "ttsem" in sys.modules, reason="tracing asks the CUDA driver itself, which ttsem does not stand in for"
)


def operator_calls() -> dict[str, tuple]:
    """Every operator, with arguments."""
    case = small_case(
        "distributed_attention", heads=1, query_size=(3, 5), key_size=(4, 3), layouts=("channels_last",) * 3
    )
    query, key, value, alpha, beta = case.tensors.values()
    keys, values = (x.detach() for x in ops.aggregate_op(key, value, alpha, beta, 4, 1))
    out, lse = (x.detach() for x in ops.attend_op(query, keys, values, 1, 0.5, "ieee"))
    index = torch.zeros(1, 1, 2, dtype=torch.int32, device=DEVICE)
    plain = [x.detach() for x in (query, key, value, alpha, beta)]
    some = [False, True, True]
    return {
        "aggregate_op": (key, value, alpha, beta, 4, 1),
        "aggregate_backward_op": (*plain[1:], keys, values, [True, False], 4, 1),
        "attend_op": (query, keys.clone().requires_grad_(), values.clone().requires_grad_(), 1, 0.5, "ieee"),
        "attend_backward_op": (plain[0], keys, values, out, lse, out.clone(), [True, True], 1, 0.5, "ieee"),
        "match_op": (*plain[:2], 4, 1, "ieee"),
        "attention_op": (query, key, value, index, 4, 1, 0.5, "ieee"),
        "attention_backward_op": (*plain[:3], index, out, some, 4, 1, 0.5, "ieee"),
    }


@traced
@pytest.mark.parametrize("name", [x for x in dir(ops) if x.endswith("_op")])
def test_opcheck(name):
    torch.library.opcheck(getattr(ops, name), operator_calls()[name])


@traced
@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiles_without_graph_break(operation):
    torch._dynamo.reset()
    case = small_case(operation, heads=1, layouts=("channels_last", "contiguous", "sliced"))
    expected = case.run("triton")
    actual = torch.compile(lambda: case.run("triton"), backend="aot_eager", fullgraph=True)()
    for x, y in zip(actual, expected, strict=True):
        assert x.equal(y)
        assert x.stride() == y.stride()
    if operation == "block_match":
        return
    # of the outputs' own layout, which a compiled graph brings it to: kernels for another one add up in another order
    upstream = [torch.randn_like(x) for x in expected if x.requires_grad]
    results = [gradients(case, [x for x in outs if x.requires_grad], upstream) for outs in (actual, expected)]
    for name in results[0]:
        assert results[0][name].equal(results[1][name])
        assert results[0][name].stride() == results[1][name].stride()


def with_float_scalars(case: Case) -> Case:
    """alpha and beta as floats, which a graph holds as constants."""
    scalars = {name: 0.5 for name in ("alpha", "beta") if name in case.tensors}
    tensors = {name: x.detach() for name, x in case.tensors.items() if name not in scalars}
    return Case(case.operation, tensors, case.options | scalars)


class Operation(torch.nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        backend = "triton" if maps[0].device.type == "cpu" else None
        return self.case.run(backend, **dict(zip(INPUTS[self.case.operation], maps, strict=True)))


@traced
@pytest.mark.parametrize("operation", OPERATIONS)
def test_exports(operation):
    case = with_float_scalars(small_case(operation, heads=1))
    maps = [case.tensors[name].requires_grad_(name != "index") for name in INPUTS[operation]]
    program = torch.export.export(Operation(case), tuple(maps))
    results = []
    for outs in (program.module()(*maps), case.run("triton")):
        loss = [x.square().sum() for x in outs if x.requires_grad]
        inputs = [x for x in maps if x.requires_grad]
        results.append([*outs, *(torch.autograd.grad(loss, inputs, allow_unused=True) if loss else ())])
    for x, y in zip(*results, strict=True):
        assert x.equal(y)


def on_fake_gpu(case: Case) -> Case:
    """The case on CUDA tensors without memory, which need no GPU."""
    with FakeTensorMode():
        tensors = {
            name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
            for name, x in case.tensors.items()
        }
    return Case(case.operation, tensors, case.options)


def described(tensors: tuple[Tensor, ...]) -> list[tuple]:
    return [(x.shape, x.stride(), x.dtype) for x in tensors]


def called_operators(graphs: list[torch.fx.GraphModule]) -> set[str]:
    modules = [module for graph in graphs for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
    targets = {str(node.target).removesuffix(".default") for module in modules for node in module.graph.nodes}
    return {name for name in targets if name.startswith("a2k.")}


CALLS = {
    "block_aggregate": {"a2k.block_aggregate"},
    "distributed_attention": {"a2k.block_aggregate", "a2k.attend"},
    "block_match": {"a2k.block_match"},
    "block_attention": {"a2k.block_attention"},
    "progressive_attention": {"a2k.block_match", "a2k.block_attention"},
}


@traced
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiles_and_exports_for_a_gpu(operation, layout):
    """Graphs traced from CUDA tensors call the operators of the Triton backend, chosen automatically."""
    torch._dynamo.reset()
    case = with_float_scalars(small_case(operation, layouts=(layout,) * 3))
    fake = on_fake_gpu(case)
    maps, graphs = tuple(fake.tensors.values()), []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    with maps[0].fake_mode:
        outs = torch.compile(Operation(fake), backend=keep, fullgraph=True)(*maps)
    assert described(outs) == described(case.run("triton"))
    assert {x.device.type for x in outs} == {"cuda"}
    assert called_operators(graphs) == CALLS[operation]
    assert called_operators([torch.export.export(Operation(fake), maps).graph_module]) == CALLS[operation]


@pytest.mark.parametrize("operation", DIFFERENTIABLE)
def test_autocast(operation):
    """Results are those of maps in the autocast dtype, matches those of float32; gradients have the input's dtype."""
    case = small_case(operation, heads=1, layouts=("channels_last",) * 3)
    with torch.autocast(DEVICE, torch.bfloat16):
        outs = case.run("triton")
    cast = {name: case.tensors[name].bfloat16() for name in ("query", "key", "value") if name in case.tensors}
    if operation == "progressive_attention":
        *outs, index = outs
        assert index.equal(case.run("triton")[1])
        case = at_index(case, index)
    for x, y in zip(outs, case.run("triton", **cast), strict=True):
        assert x.dtype == torch.bfloat16
        assert x.equal(y)
    inputs = case.differentiable().values()
    grads = torch.autograd.grad([x.sum() for x in outs], inputs)
    assert [(x.dtype, x.stride()) for x in grads] == [(x.dtype, x.stride()) for x in inputs]


@pytest.mark.parametrize("operation", DIFFERENTIABLE)
def test_checkpointing_and_deterministic_algorithms(operation):
    torch.use_deterministic_algorithms(True)  # an operation without a deterministic implementation raises
    case = small_case(operation, heads=1)
    outs = [x for x in case.run("triton") if x.requires_grad]
    upstream = random_upstream(outs, "contiguous")
    expected = gradients(case, outs, upstream)
    outs = torch.utils.checkpoint.checkpoint(lambda: case.run("triton"), use_reentrant=False)
    actual = gradients(case, [x for x in outs if x.requires_grad], upstream)
    assert all(actual[name].equal(expected[name]) for name in expected)


def test_progressive_attention_is_match_then_attention():
    case = small_case("progressive_attention", scale=0.5)
    out, index = case.run("triton")
    query, key, value = (case.tensors[name] for name in ("query", "key", "value"))
    sizes = {"block_size": 4, "num_heads": 2, "backend": "triton"}
    assert index.equal(a2k_kernels.block_match(query, key, **sizes))
    assert out.equal(a2k_kernels.block_attention(query, key, value, index, scale=0.5, **sizes))


def test_saves_nothing_for_backward_but_inputs_and_index():
    case = small_case("progressive_attention")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        _, index = case.run("triton")
    known = {x.untyped_storage().data_ptr() for x in (*case.tensors.values(), index)}
    assert {x.untyped_storage().data_ptr() for x in saved} == known


def test_float32_precision_follows_the_switch_of_pytorch():
    before = torch.backends.cuda.matmul.fp32_precision
    assert ops.float32_precision(False) == ops.float32_precision(True) == "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        expected = ("ieee", "ieee") if torch.version.hip else ("tf32", "tf32x3")
        assert (ops.float32_precision(False), ops.float32_precision(True)) == expected
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("operation", DIFFERENTIABLE)
def test_second_derivative_raises(operation):
    case = small_case(operation, heads=1, query_size=(3, 3), key_size=(3, 3))
    inputs = list(case.differentiable().values())
    out = case.run("triton")[0].square().sum()
    grads = torch.autograd.grad(out, inputs, create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="a2k"):
        sum(x.square().sum() for x in grads if x is not None).backward()


@pytest.mark.parametrize("operation", DIFFERENTIABLE)
def test_transforms_and_tangents_raise(operation):
    """Operators would leave a tangent out, silently."""
    case = small_case(operation)
    x, one = case.tensors["key"].detach(), torch.ones((), device=DEVICE)

    def run(x):
        return case.run("triton", key=x)[0]

    def run_dual():
        with forward_ad.dual_level():
            return run(forward_ad.make_dual(x, x))

    calls = [
        lambda: torch.func.vmap(run)(x[None]),
        lambda: torch.func.grad(lambda x: run(x).sum())(x),
        lambda: torch.func.jvp(run, (x,), (x,)),
        run_dual,
    ]
    if "alpha" in case.tensors:
        calls.append(lambda: torch.func.jvp(lambda alpha: case.run("triton", alpha=alpha)[0], (one,), (one,)))
    message = "its operators know neither torch.func's transforms nor forward-mode derivatives; choose 'torch'"
    for call in calls:
        with pytest.raises(RuntimeError, match=message):
            call()
