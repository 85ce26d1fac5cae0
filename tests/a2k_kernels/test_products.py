"""times_transposed is a @ b.mT, by either library, whatever the strides."""

import random

import pytest
import torch
from cases import assert_near, fresh_seeds
from torch import Tensor

from a2k_kernels import products
from a2k_kernels.products import times_transposed

STRIDES = ("dense", "transposed", "sliced", "strided", "expanded rows", "expanded columns", "expanded batch")


def matrices(shape: tuple[int, ...], strides: str) -> Tensor:
    """Random matrices with such strides; what lies between is NaN."""
    x = torch.randn(shape)
    if strides == "transposed":
        return x.mT.contiguous().mT
    if strides == "sliced":
        return torch.nn.functional.pad(x, (3, 2), value=float("nan"))[..., 3:-2]
    if strides == "strided":
        wider = torch.full((*shape[:-1], 2 * shape[-1]), float("nan"))
        wider[..., ::2] = x
        return wider[..., ::2]
    if strides == "expanded rows":
        return x[..., :1, :].expand(shape)
    if strides == "expanded columns":
        return x[..., :1].expand(shape)
    return x[:1].expand(shape) if strides == "expanded batch" else x


@pytest.mark.parametrize("least_flops", (0, 10**9), ids=("oneDNN", "@"))
@pytest.mark.parametrize("of_b", STRIDES)
@pytest.mark.parametrize("of_a", STRIDES)
@pytest.mark.parametrize("seed", fresh_seeds(2))
def test_product(seed, of_a, of_b, least_flops, monkeypatch):
    monkeypatch.setattr(products, "LEAST_FLOPS", least_flops)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch = rng.choice(((1,), (3,), (2, 1), (1, 1), (2, 3)))
    m, n, k = (rng.choice((1, 2, 7, 16, 65, 130)) for _ in range(3))
    a, b = matrices((*batch, m, k), of_a), matrices((*batch, n, k), of_b)
    out = times_transposed(a, b)
    assert (out.dtype, out.shape) == (torch.float32, (*batch, m, n))
    assert_near(out, a.double() @ b.double().mT, 1e-5, f"batch {batch}, m {m}, n {n}, k {k}")


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16, torch.bfloat16))
def test_other_dtypes(dtype, monkeypatch):
    monkeypatch.setattr(products, "LEAST_FLOPS", 0)
    a, b = torch.randn(2, 3, 5, dtype=dtype), torch.randn(2, 4, 5, dtype=dtype)
    assert torch.equal(times_transposed(a, b), a @ b.mT)


def test_what_is_not_finite(monkeypatch):
    """Matching meets infinite and undefined scores."""
    monkeypatch.setattr(products, "LEAST_FLOPS", 0)
    a, b = torch.randn(2, 40, 70), torch.randn(2, 50, 70)
    a[0, 3, 4], b[1, 5, 6] = float("inf"), float("nan")
    torch.testing.assert_close(times_transposed(a, b), a @ b.mT, equal_nan=True)


def test_large_products_are_left_to_onednn(monkeypatch):
    calls = []
    monkeypatch.setattr(products, "product", lambda a, b: calls.append(a.shape) or a @ b.mT)
    times_transposed(torch.randn(2, 128, 128), torch.randn(2, 128, 128))
    assert calls == [(128, 128)] * 2
    times_transposed(torch.randn(2, 64, 128), torch.randn(2, 128, 128))
    assert len(calls) == 2


def test_empty_batch():
    assert times_transposed(torch.empty(0, 2, 256, 128), torch.empty(0, 2, 256, 128)).shape == (0, 2, 256, 256)


@pytest.mark.parametrize(
    ("name", "instructions", "expected"),
    (
        ("Intel(R) Xeon(R) Processor", ("avx512_f", "avx_vnni"), "Intel"),
        ("11th Gen Intel(R) Core(TM) i7-1165G7", ("avx512_f",), "Intel"),
        ("AMD EPYC", ("avx512_f",), "Zen 4"),
        ("AMD EPYC", ("avx512_f", "avx_vnni"), "other"),  # Zen 5
        ("AMD EPYC", (), "other"),  # Zen 3
        ("", ("avx512_f",), "other"),
    ),
)
def test_processor(name, instructions, expected, monkeypatch):
    capabilities = {"cpu_name": name, "avx512_f": False, "avx_vnni": False} | dict.fromkeys(instructions, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products.processor.__wrapped__() == expected
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert products.processor.__wrapped__() == "other"


def test_where_mkl_is_fast(monkeypatch):
    for name, dtypes in (("Intel", {torch.float32, torch.bfloat16}), ("Zen 4", {torch.float32}), ("other", set())):
        monkeypatch.setattr(products, "processor", lambda name=name: name)
        assert {x for x in (torch.float32, torch.bfloat16) if products.has_fast_mkl(x)} == dtypes


@pytest.mark.parametrize("name", ("avx512_bf16", "amx_bf16", "avx512_f"))
def test_multiplies_bfloat16(name, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "amx_bf16": False, name: True})
    for has_onednn in (False, True):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda has=has_onednn: has)
        assert products.multiplies_bfloat16() == (has_onednn and name != "avx512_f")
