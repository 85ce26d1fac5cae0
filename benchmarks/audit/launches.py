"""What the launchers launch for a GPU that need not be there: every kernel compiled, none run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.library import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from a2k_kernels import ops
from benchmarks.audit.shapes import Layer

INDICES = ("permutation", "uniform", "one")
IMPLEMENTATIONS = {x._opoverload: x._init_fn for x in vars(ops).values() if isinstance(x, CustomOpDef)}


class Driver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return hash(self.target)  # Triton keeps one target per device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def gpu_target(name: str) -> GPUTarget:
    """sm_90, gfx942, ... as Triton names them."""
    return GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)


@dataclass
class Launch:
    """One launch of a Triton kernel. arguments: by parameter name, tensors as they were."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict
    compiled: CompiledKernel


@dataclass
class Recording:
    """The launches of one operation, and the PyTorch operators it calls around them, with the bytes they move."""

    launches: list[Launch] = field(default_factory=list)
    torch_calls: list[tuple[str, int]] = field(default_factory=list)

    @property
    def torch_bytes(self) -> int:
        return sum(moved for _, moved in self.torch_calls)


class TorchCalls(TorchDispatchMode):
    """Records every PyTorch operator that would launch a kernel: those that are neither views nor allocations."""

    def __init__(self, calls: list[tuple[str, int]]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in IMPLEMENTATIONS:
            with self:
                return IMPLEMENTATIONS[function](*args, **(kwargs or {}))
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and not name.startswith(("empty", "new_empty", "_unsafe_view", "detach")):
            tensors = [x for x in (*args, *(out if isinstance(out, tuple) else (out,))) if isinstance(x, torch.Tensor)]
            self.calls.append((name, sum(x.nbytes for x in tensors)))
        return out


@contextmanager
def record() -> Iterator[Recording]:
    """Launches inside are compiled for the driver's target and recorded instead of run."""
    recording = Recording()
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        names = [parameter.name for parameter in self.params]
        arguments = dict(zip(names, args, strict=False)) | options
        recording.launches.append(Launch(self.__name__, tuple(grid), arguments, compiled))

    JITFunction.run = compile_only
    try:
        with TorchCalls(recording.torch_calls):
            yield recording
    finally:
        JITFunction.run = run


def target_is(name: str) -> None:
    """From now on, kernels are compiled for that target."""
    driver.set_active(Driver(gpu_target(name)))


def empty_map(channels: int, side: int, dtype: torch.dtype, requires_grad: bool = False) -> torch.Tensor:
    """A channels_last map that nobody touches: it takes addresses, but no memory."""
    shape = (1, channels, side, side)
    x = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    return x.requires_grad_(requires_grad)


def make_index(kind: str, num_heads: int, blocks: int) -> torch.Tensor:
    """Which key block every query block chose: each another one, any one, or all the same."""
    generator = torch.Generator().manual_seed(0)
    if kind == "permutation":
        rows = [torch.randperm(blocks, generator=generator) for _ in range(num_heads)]
        return torch.stack(rows)[None].int()
    if kind == "uniform":
        return torch.randint(blocks, (1, num_heads, blocks), generator=generator, dtype=torch.int32)
    return torch.full((1, num_heads, blocks), blocks // 2, dtype=torch.int32)


def record_operations(layer: Layer, picture: int, dtype: torch.dtype) -> dict[str, Recording]:
    """All operations on one layer's maps, by name; the backward of block_attention for every kind of index."""
    side, heads = layer.side(picture), layer.num_heads
    query, key = (empty_map(heads * layer.dim, side, dtype, layer.backward) for _ in range(2))
    value = empty_map(heads * layer.value_dim, side, dtype, layer.backward)
    alpha, beta = (torch.ones((), requires_grad=layer.backward) for _ in range(2))
    blocks = {"block_size": layer.block_size, "num_heads": heads}
    found = {}

    with torch.no_grad(), record() as found["block_match"]:
        ops.block_match(query, key, **blocks)
    with record() as found["block_aggregate"]:
        keys, values = ops.block_aggregate(key, value, alpha, beta, **blocks)
    with record() as found["distributed_attention"]:
        out = ops.distributed_attention(query, key, value, alpha, beta, scale=1.0, **blocks)
    if layer.backward:
        with record() as found["block_aggregate backward"]:
            grads = (torch.empty_like(keys), torch.empty_like(values))
            torch.autograd.grad((keys, values), (key, value, alpha, beta), grads)
        with record() as found["distributed_attention backward"]:
            torch.autograd.grad(out, (query, key, value, alpha, beta), torch.empty_like(out))
    for kind in INDICES:
        index = make_index(kind, heads, layer.blocks(picture))
        with record() as found[f"block_attention, {kind}"]:
            out = ops.block_attention(query, key, value, index, scale=1.0, **blocks)
        if layer.backward:
            with record() as found[f"block_attention backward, {kind}"]:
                torch.autograd.grad(out, (query, key, value), torch.empty_like(out))
    return found
