"""The Triton backend: torch.library operators with fake implementations and autograd around the kernels.

Operators take what the public functions have validated. Each forward operator returns, after its results, what its
backward needs besides the inputs. Second derivatives are not registered: asking for one raises.
"""

import torch
from torch import Tensor

from a2k_kernels.blocks import count_blocks
from a2k_kernels.layout import output_format
from a2k_kernels.triton import block_aggregate as aggregate_kernels
from a2k_kernels.triton import block_attention as attention_kernels
from a2k_kernels.triton import block_match as match_kernels
from a2k_kernels.triton import distributed_attention as distributed_kernels


def empty_map(like: Tensor, channels: int) -> Tensor:
    """An uninitialised map of like's batch, size, dtype and memory format."""
    B, _, H, W = like.shape
    return torch.empty((B, channels, H, W), dtype=like.dtype, device=like.device, memory_format=output_format(like))


def empty_gradients(inputs: tuple[Tensor, ...], needed: list[bool]) -> list[Tensor | None]:
    return [empty_map(x, x.shape[1]) if need else None for x, need in zip(inputs, needed, strict=True)]


def present(tensors: list[Tensor | None]) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def spread(gradients: list[Tensor], needed: list[bool]) -> list[Tensor | None]:
    """Inverse of present: the gradients at the places that needed them."""
    remaining = iter(gradients)
    return [next(remaining) if need else None for need in needed]


@torch.compiler.assume_constant_result  # a compiled graph keeps the setting it was traced with
def float32_precision(exact: bool) -> str:
    """How float32 products are computed: PyTorch's own switch decides; exact asks for three-fold TF32."""
    if torch.backends.cuda.matmul.fp32_precision != "tf32" or torch.version.hip:
        return "ieee"
    return "tf32x3" if exact else "tf32"


# ---- block_aggregate


@torch.library.custom_op("a2k::block_aggregate", mutates_args=())
def aggregate_op(
    key: Tensor, value: Tensor, alpha: Tensor, beta: Tensor, block_size: int, num_heads: int
) -> tuple[Tensor, Tensor]:
    return aggregate_kernels.block_aggregate_fwd(key, value, alpha, beta, block_size=block_size, num_heads=num_heads)


@aggregate_op.register_fake
def _(key, value, alpha, beta, block_size, num_heads):
    rows, cols = count_blocks(key.shape[-2:], block_size)
    shape = (key.shape[0], num_heads, rows * cols)
    return tuple(x.new_empty((*shape, x.shape[1] // num_heads)) for x in (key, value))


@torch.library.custom_op("a2k::block_aggregate_backward", mutates_args=())
def aggregate_backward_op(
    key: Tensor, value: Tensor, alpha: Tensor, beta: Tensor, grad_key_agg: Tensor, grad_value_agg: Tensor,
    needed: list[bool], block_size: int, num_heads: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of key and value, where needed, and always of alpha and beta (float32)."""
    grads = empty_gradients((key, value), needed)
    scalars = aggregate_kernels.block_aggregate_bwd(
        key, value, alpha, beta, grad_key_agg.contiguous(), grad_value_agg.contiguous(), *grads,
        block_size=block_size, num_heads=num_heads,
    )  # fmt: skip
    return [*present(grads), *(x.clone() for x in scalars)]


@aggregate_backward_op.register_fake
def _(key, value, alpha, beta, grad_key_agg, grad_value_agg, needed, block_size, num_heads):
    scalars = [torch.empty((), dtype=torch.float32, device=key.device) for _ in range(2)]
    return [*present(empty_gradients((key, value), needed)), *scalars]


def _aggregate_context(ctx, inputs, output):
    key, value, alpha, beta, ctx.block_size, ctx.num_heads = inputs
    ctx.save_for_backward(key, value, alpha, beta)


def _aggregate_backward(ctx, grad_key_agg, grad_value_agg):
    key, value, alpha, beta = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:2])
    *maps, grad_alpha, grad_beta = aggregate_backward_op(
        key, value, alpha, beta, grad_key_agg, grad_value_agg, needed, ctx.block_size, ctx.num_heads
    )
    return *spread(maps, needed), grad_alpha.to(alpha.dtype), grad_beta.to(beta.dtype), None, None


aggregate_op.register_autograd(_aggregate_backward, setup_context=_aggregate_context)


def block_aggregate(key, value, alpha, beta, *, block_size, num_heads):
    """See reference.block_aggregate."""
    return aggregate_op(key, value, alpha, beta, block_size, num_heads)


# ---- distributed_attention


@torch.library.custom_op("a2k::attend", mutates_args=())
def attend_op(
    query: Tensor, keys: Tensor, values: Tensor, num_heads: int, scale: float, precision: str
) -> tuple[Tensor, Tensor]:
    """(out, lse): attention of a map's points to keys and values (B, heads, n, d)."""
    out = empty_map(query, num_heads * values.shape[-1])
    lse = distributed_kernels.attend_fwd(
        query, keys.contiguous(), values.contiguous(), out, num_heads=num_heads, scale=scale, precision=precision
    )
    return out, lse


@attend_op.register_fake
def _(query, keys, values, num_heads, scale, precision):
    B, _, H, W = query.shape
    lse = torch.empty((B, num_heads, H * W), dtype=torch.float32, device=query.device)
    return empty_map(query, num_heads * values.shape[-1]), lse


@torch.library.custom_op("a2k::attend_backward", mutates_args=())
def attend_backward_op(
    query: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
    needed: list[bool], num_heads: int, scale: float, precision: str,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the query and of both keys and values (float32), where needed: two flags."""
    (grad_query,) = empty_gradients((query,), needed[:1])
    grads = distributed_kernels.attend_bwd(
        query, keys.contiguous(), values.contiguous(), out, lse, grad_out, grad_query, needed[1],
        num_heads=num_heads, scale=scale, precision=precision,
    )  # fmt: skip
    return [*present([grad_query]), *(grads or ())]


@attend_backward_op.register_fake
def _(query, keys, values, out, lse, grad_out, needed, num_heads, scale, precision):
    grads = [torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (keys, values) if needed[1]]
    return [*present(empty_gradients((query,), needed[:1])), *grads]


def _attend_context(ctx, inputs, output):
    query, keys, values, ctx.num_heads, ctx.scale, ctx.precision = inputs
    ctx.set_materialize_grads(False)  # lse never has a gradient; zeros in its place would be as large as the queries
    ctx.save_for_backward(query, keys, values, *output)


def _attend_backward(ctx, grad_out, _grad_lse):
    query, keys, values, out, lse = ctx.saved_tensors
    needed = [ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])]
    grads = attend_backward_op(query, keys, values, out, lse, grad_out, needed, ctx.num_heads, ctx.scale, ctx.precision)
    grad_query, grad_keys, grad_values = spread(grads, [needed[0], needed[1], needed[1]])
    if needed[1]:
        grad_keys, grad_values = grad_keys.to(keys.dtype), grad_values.to(values.dtype)
    return grad_query, grad_keys, grad_values, None, None, None


attend_op.register_autograd(_attend_backward, setup_context=_attend_context)


def distributed_attention(query, key, value, alpha, beta, *, block_size, num_heads, scale):
    """See reference.distributed_attention."""
    return attend_aggregates(query, *aggregate_op(key, value, alpha, beta, block_size, num_heads), scale=scale)


def attend_aggregates(query, key_agg, value_agg, *, scale):
    """See reference.attend_aggregates."""
    return attend_op(query, key_agg, value_agg, key_agg.shape[1], scale, float32_precision(False))[0]


# ---- block_match


@torch.library.custom_op("a2k::block_match", mutates_args=())
def match_op(query: Tensor, key: Tensor, block_size: int, num_heads: int, precision: str) -> Tensor:
    return match_kernels.block_match(query, key, block_size=block_size, num_heads=num_heads, precision=precision)


@match_op.register_fake
def _(query, key, block_size, num_heads, precision):
    rows, cols = count_blocks(query.shape[-2:], block_size)
    return torch.empty((query.shape[0], num_heads, rows * cols), dtype=torch.int32, device=query.device)


def block_match(query, key, *, block_size, num_heads):
    """See reference.block_match."""
    return match_op(query, key, block_size, num_heads, float32_precision(True))


# ---- block_attention


@torch.library.custom_op("a2k::block_attention", mutates_args=())
def attention_op(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor,
    block_size: int, num_heads: int, scale: float, precision: str,
) -> Tensor:  # fmt: skip
    out = empty_map(query, value.shape[1])
    attention_kernels.block_attention_fwd(
        query, key, value, index.contiguous(), out,
        block_size=block_size, num_heads=num_heads, scale=scale, precision=precision,
    )  # fmt: skip
    return out


@attention_op.register_fake
def _(query, key, value, index, block_size, num_heads, scale, precision):
    return empty_map(query, value.shape[1])


@torch.library.custom_op("a2k::block_attention_backward", mutates_args=())
def attention_backward_op(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, grad_out: Tensor,
    needed: list[bool], block_size: int, num_heads: int, scale: float, precision: str,
) -> list[Tensor]:  # fmt: skip
    """Gradients of query, key and value, where needed."""
    grads = empty_gradients((query, key, value), needed)
    attention_kernels.block_attention_bwd(
        query, key, value, index.contiguous(), grad_out, *grads,
        block_size=block_size, num_heads=num_heads, scale=scale, precision=precision,
    )  # fmt: skip
    return present(grads)


@attention_backward_op.register_fake
def _(query, key, value, index, grad_out, needed, block_size, num_heads, scale, precision):
    return present(empty_gradients((query, key, value), needed))


def _attention_context(ctx, inputs, output):
    query, key, value, index, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, index)


def _attention_backward(ctx, grad_out):
    needed = list(ctx.needs_input_grad[:3])
    grads = attention_backward_op(*ctx.saved_tensors, grad_out, needed, *ctx.options)
    return *spread(grads, needed), None, None, None, None, None


attention_op.register_autograd(_attention_backward, setup_context=_attention_context)


def block_attention(query, key, value, index, *, block_size, num_heads, scale):
    """See reference.block_attention. An index out of range gives zero."""
    return attention_op(query, key, value, index, block_size, num_heads, scale, float32_precision(False))
