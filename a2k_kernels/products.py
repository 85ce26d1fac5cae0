"""Matrix products of float32 on processors."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

LEAST_FLOPS = 1 << 22  # of a product that is worth a call of its own


def times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.mT for a (..., M, K) and b (..., N, K), without gradient (forward-mode derivatives it has).

    On a processor oneDNN computes large products in float32: MKL, which is behind `@`, leaves half of what AVX-512 can
    do unused on processors that are not Intel's.
    """
    flops = 2 * a.shape[-2] * a.shape[-1] * b.shape[-2]
    if flops < LEAST_FLOPS or not has_onednn(a) or has_tangent(a, b) or not a.numel():
        return a @ b.mT
    products = [product(x, y) for x, y in zip(a.flatten(0, -3), b.flatten(0, -3), strict=True)]
    out = torch.stack(products) if len(products) > 1 else products[0]
    return out.view(*a.shape[:-1], -1)


@lru_cache
def has_fast_mkl() -> bool:
    """Whether MKL, which is behind `@` and PyTorch's attention, uses all that the processor can do: Intel's own."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities.get("cpu_name", "").startswith("Intel") and torch.backends.mkl.is_available()


def has_onednn(x: Tensor) -> bool:
    """Whether oneDNN multiplies matrices like x; a compiler chooses by itself."""
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def has_tangent(*tensors: Tensor) -> bool:
    """Whether forward-mode derivatives may be computed: oneDNN's product would leave them out, silently."""
    if torch._C._are_functorch_transforms_active():
        return True
    return any(unpack_dual(x).tangent is not None for x in tensors)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) @ b (N, K).T by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
