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
    if not has_onednn(a) or is_transformed(a, b) or not is_large(a, b):
        return a @ b.mT
    products = [product(x, y) for x, y in zip(a.flatten(0, -3), b.flatten(0, -3), strict=True)]
    out = torch.stack(products) if len(products) > 1 else products[0]
    return out.view(*a.shape[:-1], -1)


def is_large(a: Tensor, b: Tensor) -> bool:
    """Whether a (..., M, K) has matrices, and their products with b (..., N, K) are worth a call each."""
    return a.numel() > 0 and 2 * a.shape[-2] * a.shape[-1] * b.shape[-2] >= LEAST_FLOPS


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


def is_transformed(*tensors: Tensor) -> bool:
    """Whether torch.func.vmap or jvp is at work, or tensors have tangents (forward-mode derivatives): fused operations
    would refuse the former, and leave out the latter, silently.
    """
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    if any(transform.key() != torch._C._functorch.TransformType.Grad for transform in transforms):
        return True
    return any(unpack_dual(x).tangent is not None for x in tensors)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) @ b (N, K).T by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
