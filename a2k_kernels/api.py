"""The public operations: validate, choose a backend, call it, and give the result the query's layout.

Under autocast maps are computed on, and results returned, in its dtype, so that the maps' own dtypes may differ;
float64 stays float64, and must agree. Blocks are matched as they are given, without autocast's rounding.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from numbers import Real
from types import ModuleType

import torch
from torch import Tensor

from a2k_kernels import reference, torch_backend
from a2k_kernels.blocks import count_blocks
from a2k_kernels.layout import keep_grad_layout, output_format
from a2k_kernels.products import is_transformed

BACKENDS = ("triton", "torch", "reference")
MAX_BLOCK_SIZE, MAX_HEAD_DIM = 16, 256  # of the Triton kernels
MAX_MAPS = 65535  # batch size times heads, one dimension of a launch on NVIDIA's GPUs
TRITON_FOUND = find_spec("triton") is not None
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def block_aggregate(
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    num_heads: int,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Summarise every block of the key and value maps as one key and one value (Zhu et al. 2023, section 3.2).

    With k_mean, v_mean the means of a block of m points:
    g_y = sigmoid(beta + alpha <k_mean, k_y>), k_agg = (sum_y g_y k_y + k_mean) / (m + 1), v_agg likewise.

    Args:
        key: (B, C, H, W), float64, float32, float16 or bfloat16, any strides.
        value: (B, C_v, H, W), same dtype and device.
        block_size: side of a block in points; blocks at the right and bottom border may be cut. A size beyond the
            maps' sides makes one block of each map.
        num_heads: number of groups that C and C_v are split into.
        alpha, beta: float or tensor of shape () or (1,), shared by all heads.
        backend: "triton", "torch", "reference" or None (the A2K_BACKEND variable, else automatic).

    Returns:
        Keys (B, num_heads, n, C / num_heads) and values (B, num_heads, n, C_v / num_heads) for the
        n = ceil(H / block_size) * ceil(W / block_size) blocks in row-major order. Differentiable.

    Raises:
        ValueError: shapes do not fit. TypeError: dtypes do not fit. RuntimeError: the backend cannot run.
    """
    check_maps(block_size, num_heads, key=key, value=value)
    check_same_size(key, value)
    key, value = (to_autocast_dtype(keep_grad_layout(x)) for x in (key, value))
    alpha, beta = scalar("alpha", alpha, key), scalar("beta", beta, key)
    blocks = {"block_size": smallest_size(block_size, key), "num_heads": num_heads}
    with no_autocast(key):
        run = backend_for(backend, key, value, scalars=(alpha, beta), **blocks).block_aggregate
        return run(key, value, alpha, beta, **blocks)


def distributed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    num_heads: int,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 0.0,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Attend from every query point to one aggregated key per block (Zhu et al. 2023, section 3.2).

    out_x = sum_z softmax_z(scale <q_x, k_agg_z>) v_agg_z with k_agg, v_agg of `block_aggregate`.

    Args:
        query: (B, C, H, W), float64, float32, float16 or bfloat16, any strides.
        key: (B, C, H_k, W_k) and value: (B, C_v, H_k, W_k), same dtype and device.
        block_size, num_heads, alpha, beta, backend: as for `block_aggregate`.
        scale: factor of the scores. The published network uses 1, not 1 / sqrt(d).

    Returns:
        (B, C_v, H, W) in the query's dtype (autocast's under autocast) and memory format. Differentiable.

    Raises:
        ValueError: shapes do not fit. TypeError: dtypes do not fit. RuntimeError: the backend cannot run.
    """
    check_maps(block_size, num_heads, query=query, key=key, value=value)
    check_same_size(key, value)
    check_same_channels(query, key)
    memory_format = output_format(query)
    query, key, value = (to_autocast_dtype(keep_grad_layout(x)) for x in (query, key, value))
    alpha, beta = scalar("alpha", alpha, key), scalar("beta", beta, key)
    blocks = {"block_size": smallest_size(block_size, key), "num_heads": num_heads}
    with no_autocast(query):
        run = backend_for(backend, query, key, value, scalars=(alpha, beta), **blocks).distributed_attention
        out = run(query, key, value, alpha, beta, scale=real("scale", scale), **blocks)
    return out.contiguous(memory_format=memory_format)


def attend_aggregates(
    query: Tensor, key_agg: Tensor, value_agg: Tensor, *, scale: float = 1.0, backend: str | None = None
) -> Tensor:
    """The second half of `distributed_attention`, for keys that serve many queries.

    out_x = sum_z softmax_z(scale <q_x, k_agg_z>) v_agg_z.

    Args:
        query: (B, C, H, W), float64, float32, float16 or bfloat16, any strides.
        key_agg: (B, num_heads, n, C / num_heads) and value_agg: (B, num_heads, n, d_v) with n >= 1, as
            `block_aggregate` returns them, same dtype and device.
        scale, backend: as for `distributed_attention`.

    Returns:
        (B, num_heads * d_v, H, W) in the query's dtype (autocast's under autocast) and memory format. Differentiable.

    Raises:
        ValueError: shapes do not fit. TypeError: dtypes do not fit. RuntimeError: the backend cannot run.
    """
    check_aggregates(query, key_agg, value_agg)
    memory_format = output_format(query)
    query, key_agg, value_agg = (to_autocast_dtype(x) for x in (keep_grad_layout(query), key_agg, value_agg))
    widest = max(key_agg.shape[-1], value_agg.shape[-1])
    with no_autocast(query):
        heads = {"block_size": 1, "num_heads": key_agg.shape[1], "head_dim": widest}
        run = choose_backend(backend, query, key_agg, value_agg, **heads).attend_aggregates
        out = run(query, key_agg, value_agg, scale=real("scale", scale))
    return out.contiguous(memory_format=memory_format)


def block_match(query: Tensor, key: Tensor, *, block_size: int, num_heads: int, backend: str | None = None) -> Tensor:
    """Find the most similar key block of every query block (Zhu et al. 2023, section 3.3).

    index_x = argmax_z sum_y <q_{x,y}, k_{z,y}>: the inner product of whole blocks, position by position; a
    position missing in either block counts 0. Ties go to the lowest index, NaN counts as largest. Scores are
    computed in float32 (float64 for float64 inputs) whatever the input dtype or autocast. On a CPU the scores of equal
    blocks of the key may differ in the last bit, and are then no tie.

    Args:
        query: (B, C, H, W), float64, float32, float16 or bfloat16, any strides.
        key: (B, C, H_k, W_k), same dtype and device.
        block_size, num_heads, backend: as for `block_aggregate`.

    Returns:
        int32 (B, num_heads, n_query_blocks). Not differentiable.

    Raises:
        ValueError: shapes do not fit. TypeError: dtypes do not fit. RuntimeError: the backend cannot run.
    """
    check_maps(block_size, num_heads, query=query, key=key)
    check_same_channels(query, key)
    blocks = {"block_size": smallest_size(block_size, query, key), "num_heads": num_heads}
    common = torch.promote_types(query.dtype, key.dtype)  # they may differ under autocast
    query, key = query.to(common), key.to(common)
    with torch.no_grad(), no_autocast(query):
        return backend_for(backend, query, key, **blocks).block_match(query, key, **blocks)


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    *,
    block_size: int,
    num_heads: int,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Attend from every point of query block i to the points of key block index[i] (Zhu et al. 2023, section 3.3).

    out_x = sum_y softmax_y(scale <q_x, k_y>) v_y, y over the points that exist in the block.

    Args:
        query: (B, C, H, W), float64, float32, float16 or bfloat16, any strides.
        key: (B, C, H_k, W_k) and value: (B, C_v, H_k, W_k), same dtype and device.
        index: int32 or int64 (B, num_heads, n_query_blocks), as `block_match` returns it.
        block_size, num_heads, backend: as for `block_aggregate`.
        scale: factor of the scores.

    Returns:
        (B, C_v, H, W) in the query's dtype (autocast's under autocast) and memory format. Differentiable in query,
        key and value.

    Raises:
        ValueError: shapes do not fit, or (on the CPU) an index is out of range; on a GPU, where checking would
            stall, and under torch.compile such a block's output is zero. TypeError: dtypes do not fit.
            RuntimeError: the backend cannot run.
    """
    check_maps(block_size, num_heads, query=query, key=key, value=value)
    check_same_size(key, value)
    check_same_channels(query, key)
    check_index(index, query, key, block_size, num_heads)
    blocks = {"block_size": smallest_size(block_size, query, key), "num_heads": num_heads}
    return attend_checked(query, key, value, index, **blocks, scale=scale, backend=backend)


def attend_checked(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, *, scale: float, backend: str | None, **blocks: int
) -> Tensor:
    """block_attention without checks, which read the index back: what block_match found needs none."""
    memory_format = output_format(query)
    query, key, value = (to_autocast_dtype(keep_grad_layout(x)) for x in (query, key, value))
    with no_autocast(query):
        run = backend_for(backend, query, key, value, **blocks).block_attention
        out = run(query, key, value, index, scale=real("scale", scale), **blocks)
    return out.contiguous(memory_format=memory_format)


def progressive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    num_heads: int,
    scale: float = 1.0,
    return_index: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`block_match`, then `block_attention` to the matched blocks (Zhu et al. 2023, section 3.3).

    Arguments, result and errors as for those two. With return_index=True returns (output, index).
    Differentiable in query, key and value; the choice of block is not.
    """
    check_maps(block_size, num_heads, query=query, key=key, value=value)
    check_same_size(key, value)
    check_same_channels(query, key)
    blocks = {"block_size": smallest_size(block_size, query, key), "num_heads": num_heads}
    run = backend_for(backend, query, key, value, **blocks)
    if run is torch_backend and torch_backend.infers_on_cpu(query, key, value):
        out, index = torch_backend.match_and_attend(query, key, value, scale=real("scale", scale), **blocks)
        out = out.contiguous(memory_format=output_format(query))
    else:
        index = block_match(query, key, **blocks, backend=backend)
        out = attend_checked(query, key, value, index, **blocks, scale=scale, backend=backend)
    return (out, index) if return_index else out


def backend_for(
    backend: str | None, *maps: Tensor, scalars: tuple[Tensor, ...] = (), block_size: int, num_heads: int
) -> ModuleType:
    """choose_backend for feature maps, and alpha and beta."""
    widest = max(x.shape[1] // num_heads for x in maps)
    return choose_backend(backend, *maps, *scalars, block_size=block_size, num_heads=num_heads, head_dim=widest)


def choose_backend(backend: str | None, *tensors: Tensor, **blocks: int) -> ModuleType:
    """The backend's module: the argument, else the A2K_BACKEND variable, else automatic.

    Automatic is Triton on a GPU, where it can run, and otherwise PyTorch. An explicit choice never falls back: it
    raises RuntimeError, saying why it cannot run.
    """
    source = "backend"
    if backend is None:
        backend, source = os.environ.get("A2K_BACKEND") or None, "A2K_BACKEND"
    if backend is None:
        backend = "triton" if tensors[0].is_cuda and not triton_obstacle(*tensors, **blocks) else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"{source} is {backend!r}; choose one of {', '.join(map(repr, BACKENDS))}")
    if backend != "triton":
        return {"torch": torch_backend, "reference": reference}[backend]
    obstacle = triton_obstacle(*tensors, **blocks)
    if obstacle:
        raise RuntimeError(f"{source} is 'triton', but {obstacle}; choose 'torch'")
    from a2k_kernels import ops  # imports Triton, which may be absent

    return ops


def triton_obstacle(*tensors: Tensor, block_size: int, num_heads: int, head_dim: int) -> str | None:
    """Why the Triton kernels cannot take these tensors, of which the first is a map, and heads as wide, or None."""
    like = tensors[0]
    if not TRITON_FOUND:
        return "Triton is not installed"
    if like.dtype == torch.float64:
        return "its kernels do not compute in float64"
    if block_size > MAX_BLOCK_SIZE:
        return f"block_size is {block_size}, over its {MAX_BLOCK_SIZE}"
    if head_dim > MAX_HEAD_DIM:
        return f"a head has {head_dim} channels, over its {MAX_HEAD_DIM}"
    # A batch size that is a symbol must not be bounded by being compared.
    if not torch.compiler.is_compiling() and like.shape[0] * num_heads > MAX_MAPS:
        return f"the batch is {like.shape[0]} maps of {num_heads} heads, over its {MAX_MAPS} together"
    if not torch.compiler.is_compiling() and (torch._C._are_functorch_transforms_active() or is_transformed(*tensors)):
        return "its operators know neither torch.func's transforms nor forward-mode derivatives"
    if not like.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {like.device.type}, where it needs TRITON_INTERPRET=1, set before Python starts"
    return None


def check_maps(block_size: int, num_heads: int, **maps: Tensor) -> None:
    """Raise unless the named tensors are feature maps that agree in batch, dtype (as autocast sees it) and device."""
    for name, number in (("block_size", block_size), ("num_heads", num_heads)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name} must be an int, not {type(number).__name__}")
        if number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")
    first_name, first = next(iter(maps.items()))
    for name, x in maps.items():
        check_tensor(name, x)
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} is {x.dtype}; it must be float64, float32, float16 or bfloat16")
        if x.dtype != first.dtype and autocast_dtype(x) != autocast_dtype(first):
            raise TypeError(f"{name} is {x.dtype} but {first_name} is {first.dtype}; they must agree")
        if x.ndim != 4 or 0 in x.shape[1:]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be (B, C, H, W) with C, H, W >= 1")
        if x.shape[1] % num_heads:
            raise ValueError(
                f"{name} has {x.shape[1]} channels, which num_heads={num_heads} does not divide; "
                "choose a num_heads that divides the channels of query, key and value"
            )
        if x.shape[0] != first.shape[0]:
            raise ValueError(
                f"{name} has batch size {x.shape[0]} but {first_name} has {first.shape[0]}; they must agree"
            )
        if x.device != first.device:
            raise ValueError(f"{name} is on {x.device} but {first_name} is on {first.device}; move one of them")


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; it must be dense: give {name}.to_dense()")


def smallest_size(block_size: int, *maps: Tensor) -> int:
    """The smallest size of blocks with the same points in them: a larger one than the maps costs time and memory."""
    if torch.compiler.is_compiling():  # sides may be symbols there, and so would be the size
        return block_size
    return min(block_size, max(side for x in maps for side in x.shape[-2:]))


def check_same_size(key: Tensor, value: Tensor) -> None:
    if key.shape[-2:] != value.shape[-2:]:
        raise ValueError(
            f"value is {tuple(value.shape[-2:])} points but key is {tuple(key.shape[-2:])}; they must agree"
        )


def check_same_channels(query: Tensor, key: Tensor) -> None:
    if query.shape[1] != key.shape[1]:
        raise ValueError(f"key has {key.shape[1]} channels but query has {query.shape[1]}; they must agree")


def check_aggregates(query: Tensor, key_agg: Tensor, value_agg: Tensor) -> None:
    """Raise unless key_agg and value_agg are (B, num_heads, n, d) and fit the query."""
    for name, x in (("key_agg", key_agg), ("value_agg", value_agg)):
        check_tensor(name, x)
        if x.ndim != 4 or 0 in x.shape[1:]:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must be (B, num_heads, n, d), all but B at least 1"
            )
    heads, keys, dim = key_agg.shape[1:]
    maps = {
        "query": query,
        "key_agg": key_agg.mT.flatten(1, 2)[..., None],
        "value_agg": value_agg.mT.flatten(1, 2)[..., None],
    }
    check_maps(1, 1, **maps)
    if value_agg.shape[1:3] != (heads, keys):
        raise ValueError(f"value_agg has {tuple(value_agg.shape[1:3])} heads and keys but key_agg has {(heads, keys)}")
    if query.shape[1] != heads * dim:
        raise ValueError(f"query has {query.shape[1]} channels but key_agg has {heads} heads of {dim}; they must agree")


def check_index(index: Tensor, query: Tensor, key: Tensor, block_size: int, num_heads: int) -> None:
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        given = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index is {given}; it must be an int32 or int64 tensor")
    rows, cols = count_blocks(query.shape[-2:], block_size)
    expected = (query.shape[0], num_heads, rows * cols)
    if tuple(index.shape) != expected:
        raise ValueError(f"index has shape {tuple(index.shape)}; it must be (B, num_heads, query blocks) = {expected}")
    if index.device != query.device:
        raise ValueError(f"index is on {index.device} but query is on {query.device}; move one of them")
    # Reading the index back would stall a GPU and break a trace, where an index out of range is masked; a fake tensor
    # has no values.
    has_values = type(index) in (Tensor, torch.nn.Parameter)
    can_read = index.device.type == "cpu" and has_values and not torch.compiler.is_compiling()
    if not can_read or not index.numel():
        return
    key_rows, key_cols = count_blocks(key.shape[-2:], block_size)
    lowest, highest = (int(x) for x in index.aminmax())
    if lowest < 0 or highest >= key_rows * key_cols:
        raise ValueError(f"index has values from {lowest} to {highest}; key has blocks 0 to {key_rows * key_cols - 1}")


def real(name: str, number: float) -> float:
    if not isinstance(number, Real):
        raise TypeError(f"{name} must be a float, not {type(number).__name__}")
    return float(number)


def scalar(name: str, number: float | Tensor, like: Tensor) -> Tensor:
    """alpha or beta as a tensor of shape () on like's device; a tensor keeps its dtype and is not read back."""
    if not isinstance(number, Tensor):
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.full((), real(name, number), dtype=dtype, device=like.device)  # torch.tensor would wait for a GPU
    if tuple(number.shape) not in ((), (1,)):
        raise ValueError(f"{name} has shape {tuple(number.shape)}; it must be a float or of shape () or (1,)")
    if not number.is_floating_point():
        raise TypeError(f"{name} is {number.dtype}; it must be a float or a floating-point tensor")
    if number.device != like.device:
        raise ValueError(f"{name} is on {number.device} but key is on {like.device}; move one of them")
    return number.reshape(())


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast asks for, if it is on, else x's (float64 is left alone, as PyTorch does)."""
    device = x.device.type
    can_cast = torch.amp.is_autocast_available(device) and x.dtype != torch.float64  # meta tensors are never cast
    return torch.get_autocast_dtype(device) if can_cast and torch.is_autocast_enabled(device) else x.dtype


def to_autocast_dtype(x: Tensor) -> Tensor:
    return x.to(autocast_dtype(x))


def no_autocast(x: Tensor) -> AbstractContextManager:
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
