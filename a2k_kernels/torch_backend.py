"""Tuned PyTorch for any device. Same results as `reference`, in working sets of bounded size.

Block operations run over groups of heads, so that only that group's blocks are ever laid out block by block;
attention runs over bands of query rows. In training a band is recomputed in the backward pass when there are
several, so that no more than one band of scores is alive at a time.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from a2k_kernels.blocks import count_blocks, existing_points, merge_blocks, split_blocks
from a2k_kernels.dtypes import at_least_float32
from a2k_kernels.products import has_fast_mkl, is_transformed, times_transposed

BAND_ELEMENTS = 1 << 22  # elements of one band of scores or one group of blocks: 16 MiB in float32
CACHE_SCORES = 1 << 20  # of a band of distributed attention, on a processor
CACHE_ELEMENTS = 1 << 21  # of all that a band of progressive attention works on, on a processor


def how_many(available: int, elements: int, most: int) -> int:
    """How many of the available parts have at most `most` elements together: at least one. Sizes that are symbols, as
    in torch.export, must not be compared, and there it is all.
    """
    if isinstance(available, torch.SymInt) or isinstance(elements, torch.SymInt):
        return available
    return max(1, min(available, most // max(1, elements)))


def head_groups(num_heads: int, elements_per_head: int, most: int) -> Iterator[tuple[int, int]]:
    """(first head, number of heads) of groups of at most that many elements, but at least one head."""
    step = how_many(num_heads, elements_per_head, most)
    for first in range(0, num_heads, step):
        yield first, min(step, num_heads - first)


def join(parts: list[Tensor] | tuple[Tensor, ...], dim: int) -> Tensor:
    """torch.cat, which would copy a single part."""
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def group_blocks(x: Tensor, block_size: int, num_heads: int, first: int, count: int) -> Tensor:
    """Blocks of heads first .. first + count - 1 of a map: (B, count, n, r, d)."""
    d = x.shape[1] // num_heads
    return split_blocks(x[:, first * d : (first + count) * d], block_size, count)


def existing_if_cut(x: Tensor, block_size: int) -> Tensor | None:
    """existing_points, or None if no block is cut."""
    is_cut = x.shape[2] % block_size or x.shape[3] % block_size
    return existing_points(x.shape[-2:], block_size, x.device) if is_cut else None


def in_bands(function: Callable, query: Tensor, band_rows: int, *others: Tensor) -> Tensor:
    """function(query[:, :, top:bottom], top) over bands of band_rows rows, or whatever dimension 2 is, joined along
    them. others: all other tensors that function reads.
    """
    height = query.shape[2]
    if band_rows >= height:
        return function(query, 0)
    # The gradient of split is one copy; each slice's would be a map of the query's size, zero but for its band.
    bands = query.split(band_rows, 2)
    tops = range(0, height, band_rows)
    # torch.func's transforms refuse the hooks that checkpoint needs; there every band's scores are kept.
    if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        function = function if torch.compiler.is_compiling() else if_unchanged(function, others)
        # Copies: the query may be changed in place after the call, as on small maps.
        function = partial(checkpoint, function, use_reentrant=False)
        bands = [band.clone() for band in bands]
    return torch.cat([function(*band) for band in zip(bands, tops, strict=True)], 2)


def if_unchanged(function: Callable, tensors: tuple[Tensor, ...]) -> Callable:
    """function, which fails if the tensors, that it reads, have been changed in place since. What is computed again in
    the backward pass would else be of other values, silently.
    """

    def versions() -> list[int]:
        return [0 if x.is_inference() else x._version for x in tensors]

    def checked(*arguments):
        if versions() != before:
            raise RuntimeError(
                "what attention was computed from has been changed by an inplace operation before its gradient is "
                "computed; change a copy (clone())"
            )
        return function(*arguments)

    before = versions()
    return checked


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, exists: Tensor | None = None) -> Tensor:
    """softmax(scale * q @ k^T) @ v over the last two dimensions; the softmax in at least float32.

    float16 scores are summed in float32: its range is too small for inner products. The softmax of bfloat16 scores is
    computed in float32 and rounded once, as here, without copies; for a gradient it would keep the rounded one.
    """
    if q.dtype == torch.float16:
        q, k = q.float(), k.float()
    if scale != 1:
        q = q * scale
    scores = q @ k.mT
    if scores.requires_grad:
        scores = at_least_float32(scores)
    if exists is not None:
        scores = scores.masked_fill(~exists, float("-inf"))
    return softmax(scores).to(v.dtype) @ v


def softmax(scores: Tensor) -> Tensor:
    """Over the last dimension. On a processor float32 weights below 1e-38 become 0: with these denormal numbers
    products are several times slower, and scores that are far apart make many of them.
    """
    weights = scores.softmax(-1)
    if weights.device.type != "cpu" or weights.dtype != torch.float32 or weights.requires_grad:
        return weights
    return F.threshold_(weights, torch.finfo(torch.float32).tiny, 0.0)


def unit_stride(x: Tensor) -> Tensor:
    """x, copied unless its last dimension has stride 1: else PyTorch's attention is not fused and holds all scores."""
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def infers_on_cpu(*maps: Tensor) -> bool:
    """Whether maps are on a processor, no graph for gradients or a compiler is recorded, and nothing is cast or
    transformed.
    """
    is_recorded = torch.is_grad_enabled() and any(x.requires_grad for x in maps)
    is_special = is_recorded or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    return maps[0].device.type == "cpu" and not is_special and not is_transformed(*maps)


def is_finite(x: Tensor) -> bool:
    """Whether x is known to have neither infinities nor NaN: fake tensors have no values to look at."""
    return type(x) is Tensor and math.isfinite(x.detach().sum(dtype=torch.float32))


class OnceDifferentiable(torch.autograd.Function):
    """Identity before an operation without a second derivative: asking for one says what to do instead."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return NotDifferentiable.apply(grad)


class NotDifferentiable(OnceDifferentiable):
    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        raise RuntimeError(
            f"backend 'torch' has no second derivative of attention to aggregated keys in {grad.dtype}; "
            "use backend='reference', or float64 maps"
        )


def block_aggregate(key, value, alpha, beta, *, block_size, num_heads):
    """See reference.block_aggregate. Points that a cut block lacks are zero, so sums need no mask."""
    points = existing_points(key.shape[-2:], block_size, key.device).sum(1, keepdim=True)  # (n, 1)
    groups = []
    for group in head_groups(num_heads, (key.numel() + value.numel()) // num_heads, BAND_ELEMENTS):
        k, v = (at_least_float32(group_blocks(x, block_size, num_heads, *group)) for x in (key, value))
        k_mean, v_mean = k.sum(-2) / points, v.sum(-2) / points
        gate = torch.sigmoid(beta.to(k.dtype) + alpha.to(k.dtype) * (k @ k_mean[..., None])).mT  # (..., 1, r)
        k_agg = ((gate @ k)[..., 0, :] + k_mean) / (points + 1)
        v_agg = ((gate @ v)[..., 0, :] + v_mean) / (points + 1)
        groups.append((k_agg.to(key.dtype), v_agg.to(value.dtype)))
    k_agg, v_agg = zip(*groups, strict=True)
    return join(k_agg, 1), join(v_agg, 1)


def distributed_attention(query, key, value, alpha, beta, *, block_size, num_heads, scale):
    """See reference.distributed_attention."""
    k_agg, v_agg = block_aggregate(key, value, alpha, beta, block_size=block_size, num_heads=num_heads)
    return attend_aggregates(query, k_agg, v_agg, scale=scale)


def attend_aggregates(query, key_agg, value_agg, *, scale):
    """See reference.attend_aggregates. A band is of points, wherever in the map they are."""
    k_agg, v_agg, num_heads = key_agg, value_agg, key_agg.shape[1]
    is_special = not torch.compiler.is_compiling() and is_transformed(query, k_agg, v_agg)
    # PyTorch's fused attention is fast for equal head dimensions only, and has no second derivative.
    fused = k_agg.shape[-1] == v_agg.shape[-1] and query.dtype != torch.float64 and not is_special
    # On a processor it makes zeros of rows whose scores are NaN, and of some with infinite ones.
    can_look = query.device.type == "cpu" and not torch.compiler.is_compiling()
    if fused and can_look:
        fused = math.isfinite(scale) and is_finite(query) and is_finite(k_agg)
    streamed = fused and query.dtype != torch.float16  # it never holds all scores, so it needs no bands
    infers = query.dtype in (torch.float32, torch.bfloat16) and infers_on_cpu(query, k_agg, v_agg)
    if infers and not (fused and has_fast_mkl(query.dtype)):
        return attend_in_cache(query, k_agg, v_agg, scale)

    def attend(q: Tensor, _first: int) -> Tensor:
        if fused:
            inputs = (unit_stride(x) if streamed else x for x in (q, k_agg, v_agg))
            out = F.scaled_dot_product_attention(*(OnceDifferentiable.apply(x) for x in inputs), scale=scale)
            if not can_look:  # then a first score of NaN tells
                first_score = (scale * q.detach()) @ k_agg[:, :, :1].detach().mT
                out = out.masked_fill(first_score.isnan(), math.nan)
        else:
            out = softmax_attention(q, k_agg, v_agg, scale)
        return out

    q = query.flatten(2).unflatten(1, (num_heads, -1)).mT  # (B, heads, points, d)
    scores_per_point = query.shape[0] * num_heads * k_agg.shape[2]
    band = q.shape[2] if streamed else how_many(q.shape[2], scores_per_point, BAND_ELEMENTS)
    out = in_bands(attend, q, band, k_agg, v_agg)  # (B, heads, points, d_v)
    return out.transpose(1, 2).flatten(2).unflatten(1, query.shape[2:]).permute(0, 3, 1, 2)


def attend_in_cache(query: Tensor, key_agg: Tensor, value_agg: Tensor, scale: float) -> Tensor:
    """attend_aggregates on a processor where MKL is slow: faster than PyTorch's fused attention, which multiplies by it
    in float32, and so too what is in bfloat16.
    """
    (B, _, H, W), (num_heads, n, d_v) = query.shape, value_agg.shape[1:]
    q = query.flatten(2).unflatten(1, (num_heads, -1)).mT  # (B, heads, H * W, d)
    out = query.new_empty(B, H * W, num_heads, d_v)
    for first, count in head_groups(num_heads, B * H * W * n, CACHE_SCORES):
        heads = slice(first, first + count)
        rows = max(1, CACHE_SCORES // max(1, B * count * n))
        for band, target in zip(q[:, heads].split(rows, 2), out[:, :, heads].split(rows, 1), strict=True):
            scores = times_transposed(scale * band, key_agg[:, heads])
            attended = times_transposed(softmax(scores), value_agg[:, heads].mT)
            target.copy_(attended.transpose(1, 2))
    return out.flatten(2).unflatten(1, (H, W)).permute(0, 3, 1, 2)


@torch.no_grad()
def block_match(query, key, *, block_size, num_heads):
    """See reference.block_match. Scores of one band of query blocks and one group of heads exist at a time."""
    groups = []
    for group in head_groups(num_heads, key.numel() // num_heads, BAND_ELEMENTS):
        q, k = (at_least_float32(group_blocks(x, block_size, num_heads, *group).flatten(-2)) for x in (query, key))
        band = how_many(q.shape[2], k.shape[0] * k.shape[1] * k.shape[2], BAND_ELEMENTS)
        groups.append(join([times_transposed(rows, k).argmax(-1).int() for rows in q.split(band, 2)], 2))
    return join(groups, 1)


def select_blocks(blocks: Tensor, index: Tensor) -> Tensor:
    """blocks[b, h, index[b, h, i]]: (B, heads, n, ...) by (B, heads, m) -> (B, heads, m, ...)."""
    B, heads, n = blocks.shape[:3]
    offset = torch.arange(B * heads, device=index.device).view(B, heads, 1) * n
    return blocks.flatten(0, 2).index_select(0, (index + offset).flatten()).unflatten(0, index.shape)


def attend_selected(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float, exists: Tensor | None) -> Tensor:
    """Attention of query blocks (B, heads, m, r, d) to those among n blocks that index (B, heads, m) names.

    exists: which points key blocks have, (n, r); None if all.
    """
    exists = None if exists is None else exists[index][..., None, :]
    return softmax_attention(q, select_blocks(k, index), select_blocks(v, index), scale, exists)


def match_and_attend(query, key, value, *, block_size, num_heads, scale):
    """block_match, then block_attention: (output, index). For processors, where no gradients are needed.

    Both are done for some heads and rows at a time, so that what the next step reads is in the cache, blocks are laid
    out once for both, and the output is written in place.
    """
    (B, _, H, W), (rows, cols) = query.shape, count_blocks(query.shape[-2:], block_size)
    exists = existing_if_cut(key, block_size)
    d, d_v, points = query.shape[1] // num_heads, value.shape[1] // num_heads, block_size**2
    key_blocks = count_blocks(key.shape[-2:], block_size)
    row_elements = B * cols * (points * (points + 2 * d + d_v) + key_blocks[0] * key_blocks[1])  # of one head
    most = min(BAND_ELEMENTS, CACHE_ELEMENTS)
    out = query.new_empty(B, H, W, num_heads * d_v).permute(0, 3, 1, 2)
    index = query.new_empty(B, num_heads, rows, cols, dtype=torch.int32)
    for first, count in head_groups(num_heads, rows * row_elements, most):
        heads = slice(first, first + count)
        k, v = (group_blocks(x, block_size, num_heads, first, count) for x in (key, value))
        flat_k = at_least_float32(k.flatten(-2))
        band_rows = max(1, most // max(1, count * row_elements))
        for top in range(0, rows, band_rows):
            part = slice(top * block_size, (top + band_rows) * block_size)
            q = group_blocks(query[:, :, part], block_size, num_heads, first, count)
            selected = times_transposed(at_least_float32(q.flatten(-2)), flat_k).argmax(-1)
            attended = attend_selected(q, k, v, selected, scale, exists)
            index[:, heads, top : top + band_rows] = selected.unflatten(2, (-1, cols))
            target = out[:, first * d_v : (first + count) * d_v, part]
            merge_blocks(attended, target.shape[-2:], block_size, target)
    return out, index.flatten(2)


def block_attention(query, key, value, index, *, block_size, num_heads, scale):
    """See reference.block_attention. Where api.check_index can't look, an index out of range gives zeros."""
    B, _, H, W = query.shape
    key_rows, key_cols = count_blocks(key.shape[-2:], block_size)
    unchecked = index.device.type != "cpu" or torch.compiler.is_compiling()
    missing = (index < 0) | (index >= key_rows * key_cols) if unchecked else None
    index = index.to(torch.int64, copy=True)  # which may be changed in place after the call
    if unchecked:
        index = index.clamp(0, key_rows * key_cols - 1)
    exists = existing_if_cut(key, block_size)
    cols = count_blocks((H, W), block_size)[1]

    groups = []
    for first, count in head_groups(num_heads, (key.numel() + value.numel()) // num_heads, BAND_ELEMENTS):
        k, v = (group_blocks(x, block_size, num_heads, first, count) for x in (key, value))
        heads = slice(first, first + count)

        def attend(band: Tensor, top: int, k=k, v=v, heads=heads, count=count) -> Tensor:
            rows = count_blocks(band.shape[-2:], block_size)[0]
            blocks = slice(top // block_size * cols, (top // block_size + rows) * cols)
            selected = index[:, heads, blocks]
            out = attend_selected(split_blocks(band, block_size, count), k, v, selected, scale, exists)
            if missing is not None:
                out = out.masked_fill(missing[:, heads, blocks, None, None], 0)
            return merge_blocks(out, band.shape[-2:], block_size)

        d = query.shape[1] // num_heads
        block_row = B * count * cols * block_size**2 * (block_size**2 + 2 * d + v.shape[-1])
        block_rows = count_blocks((H, W), block_size)[0]
        band_rows = block_size * how_many(block_rows, block_row, BAND_ELEMENTS)
        groups.append(in_bands(attend, query[:, first * d : (first + count) * d], band_rows, k, v))
    return join(groups, 1)
