import pytest
import torch
import torch.nn.functional as F

import a2k.convolution
from a2k.convolution import conv3x3
from a2k.winograd import pays

LARGE = (4, 128, 256, 33, 37)  # batch, channels in and out, height, width: by minimal filtering
SMALL = (2, 3, 5, 4, 2)
UPSAMPLED = ((2, 3, 5, 4, 2), (1, 4, 3, 1, 1), (3, 2, 7, 5, 6))


def gradients(convolve, conv: torch.nn.Conv2d, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of the input, of the weight and of the bias."""
    x = x.clone().requires_grad_()
    out = convolve(conv, x)
    return [out.detach(), *torch.autograd.grad(out, (x, conv.weight, conv.bias), grad)]


def plain(conv: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), conv.weight, conv.bias)


def example(shape, dtype=torch.float32) -> tuple[torch.nn.Conv2d, torch.Tensor, torch.Tensor]:
    """A convolution, a map of it and a gradient of its output."""
    torch.manual_seed(0)
    batch, inputs, outputs, height, width = shape
    conv = conv3x3(inputs, outputs).to(dtype)
    return (
        conv,
        torch.randn(batch, inputs, height, width, dtype=dtype),
        torch.randn(batch, outputs, height, width).to(dtype),
    )


def own(conv: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    return conv(x)


def of_upsampled(conv: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    return conv.of_upsampled(x)


def plain_of_upsampled(conv: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    return plain(conv, F.interpolate(x, scale_factor=2))


def example_of_upsampled(shape, dtype=torch.float32):
    conv, x, grad = example(shape, dtype)
    return conv, x, F.interpolate(grad, scale_factor=2) + torch.randn(*grad.shape[:2], 2 * x.shape[2], 2 * x.shape[3])


of_both = pytest.mark.parametrize(
    ("convolve", "plain", "example"),
    ((own, plain, example), (of_upsampled, plain_of_upsampled, example_of_upsampled)),
    ids=("own size", "upsampled"),
)


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("shape", (SMALL, LARGE))
def test_output_and_gradients(shape, layout, monkeypatch):
    used, winograd = [], a2k.convolution.Winograd
    monkeypatch.setattr(a2k.convolution, "Winograd", lambda *x: used.append(1) or winograd(*x))
    conv, x, grad = example(shape)
    actual = gradients(torch.nn.Module.__call__, conv, x.to(memory_format=layout), grad.to(memory_format=layout))
    assert len(used) == (2 if shape == LARGE else 0)
    expected = gradients(plain, conv.double(), x.double(), grad.double())
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() < 1e-5 * e.abs().max()


@of_both
def test_gradcheck(convolve, plain, example):
    conv, x, _ = example(SMALL, torch.float64)
    assert torch.autograd.gradcheck(lambda *leaves: convolve(conv, leaves[0]), (x.requires_grad_(), *conv.parameters()))
    (grad,) = torch.autograd.grad(convolve(conv, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", (SMALL, LARGE))
def test_autocast(shape):
    """Maps of bfloat16, gradients as the parameters."""
    conv, x, grad = example(shape)
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradients(torch.nn.Module.__call__, conv, x, grad.bfloat16())
        expected = gradients(plain, conv, x, grad.bfloat16())
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert (a - e).abs().max() <= 2**-7 * e.abs().max()


@pytest.mark.parametrize("mode", (torch.inference_mode, torch.enable_grad))
@of_both
def test_compiles_without_graph_break(convolve, plain, example, mode):
    torch._dynamo.reset()
    conv, x, _ = example(LARGE)
    with mode():
        compiled = torch.compile(lambda x: convolve(conv, x), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), plain(conv, x))


def test_bfloat16_parameters():
    """As a plain convolution: gradients of many steps would not bear minimal filtering's rounding."""
    conv, x, grad = example(LARGE, torch.bfloat16)
    actual, expected = (gradients(convolve, conv, x, grad) for convolve in (torch.nn.Module.__call__, plain))
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("learns", ((True, False, False), (False, True, False), (False, False, True)))
@of_both
def test_gradients_of_some(convolve, plain, example, learns):
    conv, x, grad = example(SMALL)
    expected = gradients(plain, conv, x, grad)[1:]
    leaves = (x, conv.weight, conv.bias)
    for leaf, needed in zip(leaves, learns, strict=True):
        leaf.requires_grad_(needed)
    convolve(conv, x).backward(grad)
    for leaf, needed, e in zip(leaves, learns, expected, strict=True):
        assert (leaf.grad is not None) == needed
        if needed:
            torch.testing.assert_close(leaf.grad, e)


@of_both
def test_only_the_map_itself_is_kept(convolve, plain, example):
    conv, x, _ = example(SMALL)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda t: t):
        convolve(conv, x)
    assert set(kept) == {x.data_ptr(), conv.weight.data_ptr()}


@pytest.fixture
def preparations(monkeypatch):
    """A list that grows with every kernel that is prepared, while none is kept yet."""
    made, winograd = [], a2k.convolution.Winograd
    monkeypatch.setattr(a2k.convolution, "Winograd", lambda *x: made.append(x) or winograd(*x))
    monkeypatch.setattr(a2k.convolution, "prepared", a2k.convolution.PreparedKernels())
    return made


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_prepared_kernels_of_frozen_parameters_are_kept(dtype, preparations):
    conv, x, grad = example(LARGE, dtype)
    if not pays(conv.weight):
        pytest.skip("oneDNN has no bfloat16 convolutions for this processor")
    conv.requires_grad_(False)
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        out = conv(leaf)
        (actual,) = torch.autograd.grad(out, leaf, grad.to(dtype))
    assert len(preparations) == 2
    conv, leaf = conv.double(), x.double().requires_grad_()
    expected = plain(conv, leaf)
    (expected_grad,) = torch.autograd.grad(expected, leaf, grad.to(dtype).double())
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2  # of bfloat16, noise is the worst case
    for a, e in ((out, expected), (actual, expected_grad)):
        assert (a - e).square().mean().sqrt() < tolerance * e.square().mean().sqrt()


def test_prepared_kernels_follow_their_parameter(preparations):
    """New values, another tensor, and none at all."""
    conv, x, _ = example(LARGE)
    conv.requires_grad_(False)
    conv(x)
    conv.weight.mul_(2)
    torch.testing.assert_close(conv(x), plain(conv, x), atol=1e-4, rtol=1e-4)
    conv.weight.data = conv.weight.data / 4
    torch.testing.assert_close(conv(x), plain(conv, x), atol=1e-4, rtol=1e-4)
    conv.bias.add_(3)
    torch.testing.assert_close(conv(x), plain(conv, x), atol=1e-4, rtol=1e-4)
    for parameter in (conv.weight, conv.bias):
        parameter.data.mul_(2)  # counts no version
        torch.testing.assert_close(conv(x), plain(conv, x), atol=1e-4, rtol=1e-4)
    assert len(preparations) == 6 and a2k.convolution.prepared.bytes() == 4 * conv.weight.nbytes
    del conv
    preparations.clear()
    assert a2k.convolution.prepared.bytes() == 0


@pytest.mark.parametrize("learns", (True, False))
def test_prepared_kernels_that_are_not_kept(learns, preparations, monkeypatch):
    """Of what learns, and where there is no room."""
    monkeypatch.setattr(a2k.convolution, "MOST_KEPT", 0 if not learns else 1 << 40)
    conv, x, _ = example(LARGE)
    conv.requires_grad_(learns)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(conv(x), plain(conv, x), atol=1e-4, rtol=1e-4)
    assert len(preparations) == 2 and a2k.convolution.prepared.bytes() == 0


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("shape", UPSAMPLED)
def test_of_upsampled(shape, layout):
    conv, x, grad = example_of_upsampled(shape)
    actual = gradients(of_upsampled, conv, x.to(memory_format=layout), grad.to(memory_format=layout))
    expected = gradients(plain_of_upsampled, conv.double(), x.double(), grad.double())
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32 and (a - e).abs().max() < 1e-5 * e.abs().max()


@pytest.mark.parametrize("shape", UPSAMPLED)
def test_of_upsampled_in_autocast(shape):
    conv, x, grad = example_of_upsampled(shape)
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradients(of_upsampled, conv, x, grad.bfloat16())
    assert actual[0].dtype == torch.bfloat16
    for a, e in zip(actual, gradients(plain_of_upsampled, conv, x, grad), strict=True):
        assert (a - e).abs().max() <= 2**-6 * e.abs().max()
