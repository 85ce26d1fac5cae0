"""The Triton kernels compile for GPUs that are not there: without spills, in little shared memory, with tensor cores
and 16-byte accesses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HELPER = Path(__file__).with_name("compile_kernels.py")
SHARED_LIMIT = {"sm_80": 99 << 10, "sm_90": 99 << 10, "gfx942": 64 << 10}
NETWORKS = ("32,32,8,8,64", "48,48,4,4,64")  # d_k, d_v, heads, block size, side of the map: C = 256 and 192
OTHER_NETWORKS = ("64,64,8,8,64", "64,64,8,4,64", "24,24,4,8,64")  # C = 512, 512, 96
LOSSES = ("24,16,8,16,64", "56,32,8,8,64", "120,64,8,8,64", "184,64,8,4,64")  # forward only


def compile_kernels(target: str, dtype: str, direction: str, shapes: tuple[str, ...]) -> list[dict]:
    """What compile_kernels.py finds, in a process whose Triton is not the interpreter."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(HELPER.parents[2]), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, str(HELPER), target, dtype, direction, *shapes]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


def assert_well_compiled(target: str, dtype: str, found: list[dict]) -> None:
    for kernel in found:
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= SHARED_LIMIT[target], kernel
        if dtype != "float32" and re.search("match|attention|distributed", kernel["kernel"]):
            assert kernel["tensor_cores"] > 0, kernel


def assert_wide_accesses(found: list[dict]) -> None:
    """16 bytes an access, wherever a map is read or written."""
    for kernel in found:
        if kernel["kernel"] != "best_split_kernel":
            assert kernel["wide_loads"] > 0, kernel
        if kernel["kernel"] not in ("best_split_kernel", "block_match_kernel", "block_aggregate_fwd_kernel"):
            assert kernel["wide_stores"] > 0, kernel


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_kernels_of_the_networks(target):
    found = compile_kernels(target, "bfloat16", "backward", NETWORKS)
    assert len({kernel["kernel"] for kernel in found}) == 10
    assert_well_compiled(target, "bfloat16", found)
    if target.startswith("sm_"):
        assert_wide_accesses(found)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_kernels_of_all_shapes(target, dtype):
    found = compile_kernels(target, dtype, "backward", NETWORKS + OTHER_NETWORKS)
    if target.startswith("sm_"):
        assert_wide_accesses(found)
    found += compile_kernels(target, dtype, "forward", LOSSES)
    assert_well_compiled(target, dtype, found)
