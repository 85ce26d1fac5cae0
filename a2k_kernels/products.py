"""Matrix products of float32 on processors."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

LEAST_FLOPS = 1 << 22  # of a product that is worth a call of its own


def times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.mT for a (..., M, K) and b (..., N, K), without gradient (forward-mode derivatives it has).

    On a processor oneDNN computes large products in float32: MKL, which is behind `@`, keeps to AVX2 on those that are
    not Intel's.
    """
    if not has_onednn(a) or is_transformed(a, b) or not is_large(a, b):
        return a @ b.mT
    products = [product(x, y) for x, y in zip(a.flatten(0, -3), b.flatten(0, -3), strict=True)]
    out = torch.stack(products) if len(products) > 1 else products[0]
    return out.view(*a.shape[:-1], -1)


def is_large(a: Tensor, b: Tensor) -> bool:
    """Whether a (..., M, K) has matrices, and their products with b (..., N, K) are worth a call each."""
    return a.numel() > 0 and 2 * a.shape[-2] * a.shape[-1] * b.shape[-2] >= LEAST_FLOPS


def capabilities() -> dict[str, bool | int | str]:
    """Of the processor, by name; empty where PyTorch cannot tell."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it, and oneDNN, which uses them, is there."""
    has = capabilities()
    return torch.backends.mkldnn.is_available() and any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


@lru_cache
def processor() -> str:
    """Where it was measured what is faster: "Intel", "Zen 4", "other" (Zen 5). Without MKL all are others."""
    has = capabilities()
    name = has.get("cpu_name", "") if torch.backends.mkl.is_available() else ""
    if "Intel" in name:
        return "Intel"
    is_zen4 = name.startswith("AMD") and has.get("avx512_f") and not has.get("avx_vnni")  # Zen 5 has both
    return "Zen 4" if is_zen4 else "other"


def has_fast_mkl(dtype: torch.dtype) -> bool:
    """Whether MKL, which is behind `@` and PyTorch's attention, uses all that the processor can do.

    It does on Intel's; and in float32 on Zen 4, which does AVX-512 in halves, so that AVX2 loses nothing.
    """
    return processor() == "Intel" or (processor() == "Zen 4" and dtype == torch.float32)


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
