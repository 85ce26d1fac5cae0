"""Compiles the Triton kernels for a GPU that need not be there, and prints what became of each, one JSON a line.

    python compile_kernels.py TARGET DTYPE forward|backward d_k,d_v,heads,block_size,side ...

TARGET: sm_90, gfx942, ... The launchers run with a driver that names the target, and every launch stops once the
kernel is compiled. To be run without TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from a2k_kernels.blocks import count_blocks
from a2k_kernels.triton import block_aggregate, block_attention, block_match, distributed_attention

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Driver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def target_of(name: str) -> GPUTarget:
    return GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)


def channels_last(channels: int, side: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(1, channels, side, side, dtype=dtype).to(memory_format=torch.channels_last)


def launch(d_k: int, d_v: int, num_heads: int, block_size: int, side: int, dtype: torch.dtype, backward: bool) -> None:
    """Every kernel once, on channels_last maps of side x side points."""
    (query, key, grad_query, grad_key), (value, out, grad_out, grad_value) = (
        [channels_last(num_heads * d, side, dtype) for _ in range(4)] for d in (d_k, d_v)
    )
    rows, cols = count_blocks((side, side), block_size)
    index = torch.zeros(1, num_heads, rows * cols, dtype=torch.int32)
    alpha = torch.ones(())
    blocks = {"block_size": block_size, "num_heads": num_heads}
    attention = {"scale": 1.0, "precision": "ieee"}
    block_match.block_match(query, key, precision="ieee", **blocks)
    block_attention.block_attention_fwd(query, key, value, index, out, **attention, **blocks)
    keys, values = block_aggregate.block_aggregate_fwd(key, value, alpha, alpha, **blocks)
    lse = distributed_attention.attend_fwd(query, keys, values, out, num_heads=num_heads, **attention)
    if not backward:
        return
    block_attention.block_attention_bwd(
        query, key, value, index, grad_out, grad_query, grad_key, grad_value, **attention, **blocks
    )
    block_aggregate.block_aggregate_bwd(key, value, alpha, alpha, keys, values, grad_key, grad_value, **blocks)
    distributed_attention.attend_bwd(
        query, keys, values, out, lse, grad_out, grad_query, True, num_heads=num_heads, **attention
    )


def findings(name: str, kernel) -> dict:
    report = nvidia_findings if "cubin" in kernel.asm else amd_findings
    return {"kernel": name, "shared": kernel.metadata.shared, **report(kernel.asm)}


def nvidia_findings(asm: dict) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    resources = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": resources["REG"],
        "spilled": resources["STACK"] + resources["LOCAL"],
        "tensor_cores": len(re.findall(r"\bH(?:G|Q)?MMA\b|\bHMMA\.", code)),
        "wide_loads": len(re.findall(r"(?:LDG|LDGSTS)\.E[.\w]*\.128", code)),
        "wide_stores": len(re.findall(r"STG\.E[.\w]*\.128", code)),
    }


def amd_findings(asm: dict) -> dict:
    code = asm["amdgcn"]
    counts = {name: int(number) for name, number in re.findall(r"\.(\w+_count):\s+(\d+)", code)}
    return {
        "registers": counts["vgpr_count"],
        "spilled": counts["vgpr_spill_count"],
        "tensor_cores": code.count("v_mfma"),
        "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", code)),
        "wide_stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", code)),
    }


def main(target: str, dtype: str, direction: str, *shapes: str) -> None:
    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **options)))

    JITFunction.run = compile_only
    driver.set_active(Driver(target_of(target)))
    for shape in shapes:
        compiled.clear()
        launch(*map(int, shape.split(",")), getattr(torch, dtype), direction == "backward")
        for name, kernel in compiled:
            print(json.dumps({"shape": shape, **findings(name, kernel)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
