"""The 3x3 convolution of encoders and decoders, for training: it keeps little, and is fast on processors."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from a2k.winograd import Winograd, pays

# A kernel's three taps meet values that come in equal pairs: taps of the values before and here for the first place of
# a pair, here and after for the second.
BY_OUTPUTS = FIRST, SECOND = ((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1))
# The same by values: taps for the outputs at the last place before a pair, at its two places and after it.
TO_OUTPUTS = SECOND[1], FIRST[1], SECOND[0], FIRST[0]
# Points of a batch from which Winograd's filtering pays: with its preparation, and where that is kept.
LARGE, LARGE_IF_KEPT = 64 * 64, 32 * 32
MOST_KEPT = 200 << 20  # bytes of prepared kernels
PREPARED_SIZE = 4  # 36 points for 9 taps


def conv3x3(in_channels: int, out_channels: int) -> "ReflectedConv2d":
    """3x3 convolution with reflection padding: (B, C_in, H, W) -> (B, C_out, H, W), H, W >= 2."""
    return ReflectedConv2d(in_channels, out_channels, 3, padding=1, padding_mode="reflect")


class ReflectedConv2d(nn.Conv2d):
    """For the backward pass it keeps its input and not the padded copy. It has no second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return ReflectedConvolution.apply(x, self.weight, self.bias)

    def of_upsampled(self, x: Tensor) -> Tensor:
        """Of a map upsampled by two, nearest neighbour: (B, C_in, H, W) -> (B, C_out, 2 H, 2 W), H, W >= 1."""
        return UpsampledConvolution.apply(x, self.weight, self.bias)


class ReflectedConvolution(torch.autograd.Function):
    """conv(pad(x)). Under autocast the maps change their dtype here, and the gradients back."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        x, weight, bias = as_autocast(x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
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


class UpsampledConvolution(torch.autograd.Function):
    """conv(pad(upsample(x))), as a transposed convolution of x: 4/9 of the operations, and x is smaller to keep.

    Where the upsampled map is reflected at its border, x is repeated.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            kernel = transposed_kernel(weight)
        x, kernel, bias = as_autocast(x, kernel, bias)
        with torch.autocast(x.device.type, enabled=False):
            return F.conv_transpose2d(repeat_border(x), kernel, bias, stride=2, padding=3)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grads = [None, None, None]
        if ctx.needs_input_grad[0]:
            padded = F.conv2d(grad, transposed_kernel(weight).to(grad.dtype), stride=2, padding=3)
            grads[0] = torch.ops.aten.replication_pad2d_backward(padded, x.to(grad.dtype), [1, 1, 1, 1]).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grads[1] = grad_of_kernel(grad, repeat_border(x).to(grad.dtype), weight)
        if ctx.needs_input_grad[2]:
            grads[2] = grad.sum((0, 2, 3), dtype=weight.dtype)
        return tuple(grads)


def transposed_kernel(weight: Tensor) -> Tensor:
    """(C_out, C_in, 3, 3) to (C_in, C_out, 4, 4): what a value of the small map adds to the 4 x 4 outputs around it."""
    to_outputs = weight.new_tensor(TO_OUTPUTS)
    kernel = torch.einsum("oijk,yj,xk->ioyx", weight, to_outputs, to_outputs)
    return kernel.contiguous(memory_format=torch.channels_last)


def grad_of_kernel(grad: Tensor, padded: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the 3x3 kernel by that of the output (B, C_out, 2 H, 2 W); padded: (B, C_in, H + 2, W + 2).

    By 2x2 convolutions, one for each place in a pair of rows and of columns: that of a transposed convolution is slow.
    """
    by_outputs, (outputs, inputs) = weight.new_tensor(BY_OUTPUTS), weight.shape[:2]
    places = [(row, col) for row in (0, 1) for col in (0, 1)]
    parts = [F.pad(grad[:, :, row::2, col::2], (col, 1 - col, row, 1 - row)) for row, col in places]
    kernels = padded.new_empty(1).expand(4 * outputs, inputs, 2, 2)  # their values do not count
    grads = gradients(torch.cat(parts, 1), padded, kernels, (False, True, False))[1]
    grads = grads.to(weight.dtype).view(2, 2, outputs, inputs, 2, 2)
    return torch.einsum("rcoiyx,ryj,cxk->oijk", grads, by_outputs, by_outputs)


def as_autocast(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """In the dtype of autocast where it is enabled: it would pad in float32."""
    device, tensors = x.device.type, (x, *others)
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def pad(x: Tensor) -> Tensor:
    return F.pad(x, (1, 1, 1, 1), mode="reflect")


def repeat_border(x: Tensor) -> Tensor:
    return F.pad(x, (1, 1, 1, 1), mode="replicate")


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Without padding."""
    winograd = minimal_filtering(x, weight, bias)
    if not winograd:
        return F.conv2d(x, weight, bias)
    B, _, H, W = x.shape
    out = torch.empty(B, len(weight), H - 2, W - 2, dtype=x.dtype, memory_format=torch.channels_last)
    return winograd(x, relu=False, out=out)


def grad_of_padded(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Gradient of a convolution's padded input (B, C_in, H + 2, W + 2), by that of its output (B, C_out, H, W)."""
    winograd = minimal_filtering(grad, weight)
    if winograd:
        return winograd(F.pad(grad, (2, 2, 2, 2)), relu=False)
    B, C, H, W = x.shape
    padded = grad.new_empty(1).expand(B, C, H + 2, W + 2)  # its values do not count
    return gradients(grad, padded, weight.to(grad.dtype), (True, False, False))[0]


def minimal_filtering(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Winograd | None:
    """The convolution of maps like x, or without a bias the one that gives its gradient, if this way is faster."""
    if torch.compiler.is_compiling() or x.dtype != weight.dtype or not pays(weight):  # preparing is not for a graph
        return None
    points = x[:, 0].numel()
    found = prepared.get(weight, bias) if points >= LARGE_IF_KEPT else None
    if found or points < LARGE or x.dtype != torch.float32:
        return found
    return prepare(weight, bias)


def prepare(weight: Tensor, bias: Tensor | None) -> Winograd:
    if bias is None:
        return Winograd(weight.flip(2, 3).transpose(0, 1), weight.new_zeros(weight.shape[1]))
    return Winograd(weight, bias)


class PreparedKernels:
    """Those of frozen parameters, as long as these live; up to MOST_KEPT bytes."""

    def __init__(self) -> None:
        self.of_weights = WeakTensorKeyDictionary()

    def get(self, weight: Tensor, bias: Tensor | None) -> Winograd | None:
        """See `prepare`. None for what learns, and where there is no room."""
        parameters = [weight] if bias is None else [weight, bias]
        if any(not isinstance(x, nn.Parameter) or x.requires_grad or x.is_inference() for x in parameters):
            return None
        found, which = self.of_weights.setdefault(weight, {}), "gradient" if bias is None else "output"
        # Changes with the values; a version does not where they are written through .data, so look at some.
        state = [(x.data_ptr(), x._version, float(x.detach()[0].sum())) for x in parameters]
        if which in found and found[which][0] != state:
            del found[which]
        if which not in found and self.bytes() + PREPARED_SIZE * weight.nbytes <= MOST_KEPT:
            found[which] = state, prepare(weight, bias)
        return found[which][1] if which in found else None

    def bytes(self) -> int:
        return sum(PREPARED_SIZE * weight.nbytes * len(found) for weight, found in self.of_weights.items())


prepared = PreparedKernels()


def gradients(grad: Tensor, padded: Tensor, weight: Tensor, which: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Of a convolution's padded input, weight and bias."""
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, its padding, groups
    return torch.ops.aten.convolution_backward(grad, padded, weight, [len(weight)], *geometry, list(which))
