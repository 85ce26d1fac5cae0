"""The 3x3 convolution of encoders and decoders, for training: it keeps little, and is fast on processors."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from a2k.winograd import Winograd, pays

LARGE = 64 * 64  # points of a batch, from which Winograd's filtering pays its preparation


def conv3x3(in_channels: int, out_channels: int) -> "ReflectedConv2d":
    """3x3 convolution with reflection padding: (B, C_in, H, W) -> (B, C_out, H, W), H, W >= 2."""
    return ReflectedConv2d(in_channels, out_channels, 3, padding=1, padding_mode="reflect")


class ReflectedConv2d(nn.Conv2d):
    """For the backward pass it keeps its input and not the padded copy. It has no second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return ReflectedConvolution.apply(x, self.weight, self.bias)


class ReflectedConvolution(torch.autograd.Function):
    """conv(pad(x)). Under autocast the maps change their dtype here, and the gradients back."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        device = x.device.type
        if torch.is_autocast_enabled(device):  # which would pad in float32
            x, weight, bias = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (x, weight, bias))
        with torch.autocast(device, enabled=False):
            return convolve(pad(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed, dtype = ctx.needs_input_grad, grad.dtype
        grads = (None, None, None)
        if any(needed[1:]):
            grads = gradients(grad, pad(x).to(dtype), weight.to(dtype), (False, *needed[1:]))
        grad_x = None
        if needed[0]:
            padded = grad_of_padded(grad, x, weight)
            grad_x = torch.ops.aten.reflection_pad2d_backward(padded, x.to(dtype), [1, 1, 1, 1]).to(x.dtype)
        return grad_x, *(x if x is None else x.to(weight.dtype) for x in grads[1:])


def pad(x: Tensor) -> Tensor:
    return F.pad(x, (1, 1, 1, 1), mode="reflect")


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Without padding."""
    if suits_winograd(x, weight):
        B, _, H, W = x.shape
        out = torch.empty(B, len(weight), H - 2, W - 2, memory_format=torch.channels_last)
        return Winograd(weight, bias, (H, W))(x, relu=False, out=out)
    return F.conv2d(x, weight, bias)


def suits_winograd(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling():  # its preparation is not for a graph
        return False
    return x[:, 0].numel() >= LARGE and x.dtype == weight.dtype == torch.float32 and pays(weight)


def grad_of_padded(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Gradient of a convolution's padded input (B, C_in, H + 2, W + 2), by that of its output (B, C_out, H, W)."""
    if suits_winograd(grad, weight):
        transposed, padded = weight.flip(2, 3).transpose(0, 1), F.pad(grad, (2, 2, 2, 2))
        return Winograd(transposed, weight.new_zeros(weight.shape[1]), padded.shape[2:])(padded, relu=False)
    B, C, H, W = x.shape
    padded = grad.new_empty(1).expand(B, C, H + 2, W + 2)  # its values do not count
    return gradients(grad, padded, weight.to(grad.dtype), (True, False, False))[0]


def gradients(grad: Tensor, padded: Tensor, weight: Tensor, which: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Of a convolution's padded input, weight and bias."""
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, its padding, groups
    return torch.ops.aten.convolution_backward(grad, padded, weight, [len(weight)], *geometry, list(which))
