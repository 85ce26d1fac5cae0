"""The audit counts the bytes that Triton's interpreter sees the kernels load and store."""

import os
from collections import Counter

import pytest
import torch
from cases import fresh_seeds, make_case

pytest.importorskip("triton")
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("counts lanes in Triton's interpreter", allow_module_level=True)

import interpreter_fixes
import numpy
from triton.runtime import interpreter

from benchmarks.audit.traffic import count_work


@pytest.fixture
def launches(monkeypatch):
    """Every launch's name, grid, arguments and bytes loaded and stored, as they happen."""
    found = []
    builder, run = interpreter.InterpreterBuilder, interpreter.InterpretedFunction.run
    masked_load, masked_store = builder.create_masked_load, builder.create_masked_store

    def active_bytes(pointers, mask):
        return numpy.count_nonzero(mask.data) * pointers.get_element_ty().primitive_bitwidth // 8

    def counting_load(self, pointers, mask, *rest):
        found[-1][3]["load"] += active_bytes(pointers, mask)
        return masked_load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        found[-1][3]["store"] += active_bytes(pointers, mask)
        return masked_store(self, pointers, value, mask, *rest)

    def counting_run(self, *args, grid, warmup, **options):
        arguments = dict(zip(self.arg_names, args, strict=False)) | options
        found.append((self.__name__, grid, arguments, Counter()))
        return run(self, *args, grid=grid, warmup=warmup, **options)

    interpreter_fixes.install(monkeypatch)
    monkeypatch.setattr(builder, "create_masked_load", counting_load)
    monkeypatch.setattr(builder, "create_masked_store", counting_store)
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", counting_run)
    return found


F32, B16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = (
    {"block_size": 4, "d_k": 24, "d_v": 16, "query_size": (5, 7), "key_size": (6, 7), "dtype": B16, "batch": 2},
    {"block_size": 8, "d_k": 7, "d_v": 33, "query_size": (20, 9), "key_size": (9, 17), "dtype": F32},
    {"block_size": 3, "d_k": 136, "d_v": 70, "query_size": (4, 5), "key_size": (4, 5), "dtype": F32},
    {"block_size": 16, "d_k": 24, "d_v": 16, "query_size": (18, 9), "key_size": (5, 33), "dtype": F16},
    {"block_size": 1, "d_k": 5, "d_v": 3, "query_size": (6, 7), "key_size": (1, 2), "dtype": F32},  # long lists
)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"b{shape['block_size']}")
@pytest.mark.parametrize("operation", ["block_aggregate", "distributed_attention", "block_match", "block_attention"])
def test_bytes_of_every_launch(operation, shape, launches):
    (seed,) = fresh_seeds(1)
    print(f"A2K_TEST_SEED={seed}")
    case = make_case(operation, **{"batch": 1} | shape, layouts=("channels_last",) * 3, scale=0.1, seed=seed)
    outs = case.run("triton")
    if operation != "block_match":
        torch.autograd.grad(outs, list(case.differentiable().values()), [torch.ones_like(x) for x in outs])
    assert launches
    for kernel, grid, arguments, seen in launches:
        work = count_work(kernel, grid, arguments)
        for name in ("load", "store"):
            counted = sum(x.bytes for x in work.accesses if x.is_store == (name == "store"))
            assert counted == seen[name], f"{kernel} {name}s {seen[name]} bytes, the audit counts {counted}"
