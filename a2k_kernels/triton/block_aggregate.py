"""block_aggregate: every block of the key and value maps as one key and one value, forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from a2k_kernels.blocks import count_blocks
from a2k_kernels.triton.configs import aggregate_tiles
from a2k_kernels.triton.tiles import block_points, is_large, load_tile, on_device, store_tile


@triton.jit
def block_size_inverse(block, height, width, BLOCK_SIZE: tl.constexpr):
    """1 / m and 1 / (m + 1) for a block of m points."""
    blocks_per_row = tl.cdiv(width, BLOCK_SIZE)
    rows = tl.minimum(BLOCK_SIZE, height - block // blocks_per_row * BLOCK_SIZE)
    points = rows * tl.minimum(BLOCK_SIZE, width - block % blocks_per_row * BLOCK_SIZE)
    return 1.0 / points.to(tl.float32), 1.0 / (points + 1).to(tl.float32)


@triton.jit
def mean_and_products(
    key_ptr, key_strides, batch, head, row, col, exists, inverse,
    DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """<k_mean, k_y> for every point y: [BLOCK_R]. inverse: 1 / m."""
    products = tl.zeros([BLOCK_R], tl.float32)
    for chunk in range(0, tl.cdiv(DIM, BLOCK_D)):
        k = load_tile(key_ptr, key_strides, batch, head, chunk, row, col, exists, DIM, BLOCK_D, LARGE).to(tl.float32)
        products += tl.sum(k * (tl.sum(k, axis=0) * inverse)[None, :], axis=1)
    return products


@triton.jit
def block_aggregate_fwd_kernel(
    key_ptr, value_ptr, alpha_ptr, beta_ptr, key_out_ptr, value_out_ptr, key_strides, value_strides, height, width,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, NUM_HEADS: tl.constexpr,
    LARGE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """g_y = sigmoid(beta + alpha <k_mean, k_y>), k_agg = (sum_y g_y k_y + k_mean) / (m + 1). One program: one block."""
    program, batch = tl.program_id(0), tl.program_id(1)
    head, block, num_blocks = program % NUM_HEADS, program // NUM_HEADS, tl.num_programs(0) // NUM_HEADS
    row, col, exists = block_points(block, 0, height, width, BLOCK_SIZE, BLOCK_R)
    # All loads under way at once: the first chunk of the value before the products, and a barrier behind which ptxas
    # does not move them to save registers.
    v = load_tile(value_ptr, value_strides, batch, head, 0, row, col, exists, VALUE_DIM, BLOCK_DV, LARGE)
    alpha, beta = tl.load(alpha_ptr).to(tl.float32), tl.load(beta_ptr).to(tl.float32)
    tl.debug_barrier()
    inverse, inverse_plus_one = block_size_inverse(block, height, width, BLOCK_SIZE)
    products = mean_and_products(
        key_ptr, key_strides, batch, head, row, col, exists, inverse, DIM, BLOCK_R, BLOCK_D, LARGE
    )
    logits = beta + alpha * products
    weights = (tl.sigmoid(logits) + inverse) * inverse_plus_one  # the mean's share included; missing points are 0

    aggregate = (batch * NUM_HEADS + head).to(tl.int64) * num_blocks + block
    for chunk in range(0, tl.cdiv(DIM, BLOCK_D)):
        k = load_tile(key_ptr, key_strides, batch, head, chunk, row, col, exists, DIM, BLOCK_D, LARGE).to(tl.float32)
        store_row(key_out_ptr, aggregate, chunk, tl.sum(weights[:, None] * k, axis=0), DIM, BLOCK_D)
    for chunk in range(0, tl.cdiv(VALUE_DIM, BLOCK_DV)):
        value_agg = tl.sum(weights[:, None] * v.to(tl.float32), axis=0)
        store_row(value_out_ptr, aggregate, chunk, value_agg, VALUE_DIM, BLOCK_DV)
        v = load_tile(
            value_ptr, value_strides, batch, head, chunk + 1, row, col, exists, VALUE_DIM, BLOCK_DV, LARGE
        )  # [BLOCK_R, BLOCK_DV]


@triton.jit
def store_row(ptr, row, chunk, x, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    tl.store(ptr + row * DIM + d, x.to(ptr.dtype.element_ty), mask=d < DIM)


@triton.jit
def load_row(ptr, row, chunk, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    return tl.load(ptr + row * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)  # [BLOCK_D]


@triton.jit
def block_aggregate_bwd_kernel(
    key_ptr, value_ptr, alpha_ptr, beta_ptr, grad_key_agg_ptr, grad_value_agg_ptr,
    grad_key_ptr, grad_value_ptr, grad_alpha_ptr, grad_beta_ptr,
    key_strides, value_strides, grad_key_strides, grad_value_strides, height, width,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, NUM_HEADS: tl.constexpr,
    LARGE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """With a = dk_agg / (m + 1), c = dv_agg / (m + 1) and l_y = (<a, k_y> + <c, v_y>) g_y (1 - g_y):

    dk_y = g_y a + alpha l_y k_mean + (a + alpha sum_z l_z k_z) / m,  dv_y = (g_y + 1 / m) c,
    dalpha = sum_y l_y <k_mean, k_y>,  dbeta = sum_y l_y. One program: one block.
    """
    program, batch = tl.program_id(0), tl.program_id(1)
    head, block, num_blocks = program % NUM_HEADS, program // NUM_HEADS, tl.num_programs(0) // NUM_HEADS
    row, col, exists = block_points(block, 0, height, width, BLOCK_SIZE, BLOCK_R)
    inverse, inverse_plus_one = block_size_inverse(block, height, width, BLOCK_SIZE)
    alpha = tl.load(alpha_ptr).to(tl.float32)
    products = mean_and_products(
        key_ptr, key_strides, batch, head, row, col, exists, inverse, DIM, BLOCK_R, BLOCK_D, LARGE
    )
    logits = tl.load(beta_ptr).to(tl.float32) + alpha * products
    gate, gate_left = tl.sigmoid(logits), tl.sigmoid(-logits)  # [BLOCK_R]; 1 - gate would cancel where gate is near 1

    aggregate = (batch * NUM_HEADS + head).to(tl.int64) * num_blocks + block
    grad_gate = tl.zeros([BLOCK_R], tl.float32)
    for chunk in range(0, tl.cdiv(DIM, BLOCK_D)):
        k = load_tile(key_ptr, key_strides, batch, head, chunk, row, col, exists, DIM, BLOCK_D, LARGE).to(tl.float32)
        a = load_row(grad_key_agg_ptr, aggregate, chunk, DIM, BLOCK_D) * inverse_plus_one
        grad_gate += tl.sum(k * a[None, :], axis=1)
    for chunk in range(0, tl.cdiv(VALUE_DIM, BLOCK_DV)):
        v = load_tile(
            value_ptr, value_strides, batch, head, chunk, row, col, exists, VALUE_DIM, BLOCK_DV, LARGE
        ).to(tl.float32)  # fmt: skip
        c = load_row(grad_value_agg_ptr, aggregate, chunk, VALUE_DIM, BLOCK_DV) * inverse_plus_one
        grad_gate += tl.sum(v * c[None, :], axis=1)
    grad_logits = tl.where(exists, grad_gate * gate * gate_left, 0.0)
    if grad_key_ptr is not None:
        for chunk in range(0, tl.cdiv(DIM, BLOCK_D)):
            k = load_tile(
                key_ptr, key_strides, batch, head, chunk, row, col, exists, DIM, BLOCK_D, LARGE
            ).to(tl.float32)  # fmt: skip
            a = load_row(grad_key_agg_ptr, aggregate, chunk, DIM, BLOCK_D) * inverse_plus_one
            k_mean = tl.sum(k, axis=0) * inverse
            grad_mean = a + alpha * tl.sum(grad_logits[:, None] * k, axis=0)
            grad_k = gate[:, None] * a[None, :] + (alpha * grad_logits)[:, None] * k_mean[None, :]
            grad_k += (grad_mean * inverse)[None, :]
            store_tile(
                grad_key_ptr, grad_key_strides, grad_k, batch, head, chunk, row, col, exists, DIM, BLOCK_D, LARGE
            )
    if grad_value_ptr is not None:
        for chunk in range(0, tl.cdiv(VALUE_DIM, BLOCK_DV)):
            c = load_row(grad_value_agg_ptr, aggregate, chunk, VALUE_DIM, BLOCK_DV) * inverse_plus_one
            grad_v = (gate + inverse)[:, None] * c[None, :]
            store_tile(
                grad_value_ptr, grad_value_strides, grad_v, batch, head, chunk, row, col, exists,
                VALUE_DIM, BLOCK_DV, LARGE,
            )  # fmt: skip
    tl.store(grad_alpha_ptr + aggregate, tl.sum(grad_logits * products, axis=0))
    tl.store(grad_beta_ptr + aggregate, tl.sum(grad_logits, axis=0))


def block_aggregate_fwd(
    key: Tensor, value: Tensor, alpha: Tensor, beta: Tensor, *, block_size: int, num_heads: int
) -> tuple[Tensor, Tensor]:
    """(B, heads, n, d) and (B, heads, n, d_v)."""
    (B, C, H, W), value_dim = key.shape, value.shape[1] // num_heads
    rows, cols = count_blocks((H, W), block_size)
    key_out = key.new_empty((B, num_heads, rows * cols, C // num_heads))
    value_out = key.new_empty((B, num_heads, rows * cols, value_dim))
    if B == 0:
        return key_out, value_out
    with on_device(key):
        block_aggregate_fwd_kernel[(rows * cols * num_heads, B)](
            key, value, alpha, beta, key_out, value_out, key.stride(), value.stride(), H, W,
            C // num_heads, value_dim, block_size, num_heads, is_large(key, value),
            **aggregate_tiles(block_size, C // num_heads, value_dim, key.element_size(), backward=False),
        )  # fmt: skip
    return key_out, value_out


def block_aggregate_bwd(
    key: Tensor, value: Tensor, alpha: Tensor, beta: Tensor, grad_key_agg: Tensor, grad_value_agg: Tensor,
    grad_key: Tensor | None, grad_value: Tensor | None, *, block_size: int, num_heads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill those of grad_key and grad_value that are not None; returns the float32 gradients of alpha and beta.

    grad_key_agg, grad_value_agg: contiguous.
    """
    (B, C, H, W), value_dim = key.shape, value.shape[1] // num_heads
    rows, cols = count_blocks((H, W), block_size)
    grad_alpha = torch.empty((2, B * num_heads * rows * cols), dtype=torch.float32, device=key.device)
    if B == 0:
        return tuple(grad_alpha.sum(1))
    grads = [grad for grad in (grad_key, grad_value) if grad is not None]
    with on_device(key):
        block_aggregate_bwd_kernel[(rows * cols * num_heads, B)](
            key, value, alpha, beta, grad_key_agg, grad_value_agg, grad_key, grad_value, grad_alpha[0], grad_alpha[1],
            key.stride(), value.stride(), *(None if g is None else g.stride() for g in (grad_key, grad_value)), H, W,
            C // num_heads, value_dim, block_size, num_heads, is_large(key, value, *grads),
            **aggregate_tiles(block_size, C // num_heads, value_dim, key.element_size(), backward=True),
        )  # fmt: skip
    return tuple(grad_alpha.sum(1))
