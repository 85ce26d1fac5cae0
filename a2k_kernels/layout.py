"""Memory formats of results and of gradients."""

import torch
from torch import Tensor

from a2k_kernels.products import is_transformed


def output_format(query: Tensor) -> torch.memory_format:
    """channels_last for a query whose points are contiguous channel vectors, else contiguous."""
    _, C, H, W = query.shape
    channels_last = C > 1 and H * W > 1 and query.stride(1) == 1
    return torch.channels_last if channels_last else torch.contiguous_format


class KeepGradLayout(torch.autograd.Function):
    """Identity whose gradient has the input's memory format, whatever the operations behind it prefer."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.memory_format = output_format(inputs[0])

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.contiguous(memory_format=ctx.memory_format)


def keep_grad_layout(x: Tensor) -> Tensor:
    needs_grad = x.requires_grad and torch.is_grad_enabled()
    if not needs_grad or (not torch.compiler.is_compiling() and is_transformed(x)):
        return x
    return KeepGradLayout.apply(x)
