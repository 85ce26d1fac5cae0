"""The quick part of the audit holds, and the audit finds what it is there to find."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
pytest.importorskip("cuxray")

from cuxray.parse import sass
from cuxray.parse.ctrl import Ctrl

from benchmarks.audit import limits, machine_code, model
from benchmarks.audit.shapes import LITE, LOSSES, VGG

ROOT = Path(__file__).parents[2]


def test_quick_audit():
    """In a process of its own: kernels for Triton's interpreter cannot be compiled."""
    command = [sys.executable, "-m", "benchmarks.audit", "--quick"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


LISTING = """
	.section	.text.kernel,"ax",@progbits
kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/               @P2 EXIT ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64] ;
        /*0050*/               @P0 BRA `(.L_x_0) ;
        /*0060*/                   MUFU.EX2 R4, R4 ;
        /*0070*/               @P1 CALL.REL.NOINC `(.L_x_3) ;
        /*0080*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0090*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
"""


def disassembled() -> sass.Function:
    (function,) = sass.parse_gi(LISTING).functions.values()
    return function


def test_loops_are_found_and_counted():
    controls = {
        x.addr: Ctrl(stall=2, yield_=0, wrtdb=7, readdb=7, watdb=0, reuse=0) for x in disassembled().instructions
    }
    whole, outer, inner = machine_code.read_regions(disassembled(), controls)
    assert (whole["parent"], outer["parent"], inner["parent"]) == (None, 0, 1)
    assert whole["counts"]["issue"] == 4  # not what follows the exit
    assert whole["counts"]["store"] == 32 * 8
    assert outer["counts"]["issue"] == 4
    assert outer["counts"]["load"] == 32 * 16
    assert outer["counts"]["sfu"] == 1
    assert inner["counts"]["HMMA"] == 2 * 16 * 8 * 16
    assert inner["counts"]["load"] == 32 * 16
    assert (whole["cycles"]["memory"], outer["cycles"]["memory"], inner["cycles"]["memory"]) == (8, 8, 6)


def cycles_of(*instructions: tuple[str, int, int]) -> list[int]:
    """Clock after every instruction: (name, scoreboard it sets, scoreboards it waits for as a mask)."""
    code = [sass.Instruction(16 * i, name, "SB0, 0x0") for i, (name, _, _) in enumerate(instructions)]
    controls = {
        x.addr: Ctrl(stall=4, yield_=0, wrtdb=sets, readdb=7, watdb=waits, reuse=0)
        for x, (_, sets, waits) in zip(code, instructions, strict=True)
    }
    warp, clocks = machine_code.Warp(controls, 600), []
    for x in code:
        warp.run([x])
        clocks.append(warp.clock)
    return clocks


def test_a_warp_waits_for_what_it_loads():
    load, other, user = ("LDG.E.128", 1, 0), ("FADD", 7, 0b1), ("FADD", 7, 0b10)
    assert cycles_of(load, other, user, user) == [4, 8, 604, 608]


def test_a_warp_waits_for_copies_to_shared_memory():
    copy, group, wait = ("LDGSTS.E.BYPASS.128", 7, 0), ("LDGDEPBAR", 7, 0), ("DEPBAR.LE", 7, 0)
    assert cycles_of(copy, copy, group, copy, wait) == [4, 8, 12, 16, 4 + 600 + 4]


def test_iterations_of_loops():
    regions = [{"counts": {"load": x}} for x in (0, 8, 2)]
    assert model.executions(regions, [5, 40], 0) == [1, 5, 40]
    assert model.executions(regions, [12], 0) == [1, 3, 0]  # unrolled four times
    assert model.executions(regions[:2], [1, 40], 0) == [1, 40]  # the loop that runs once is gone
    assert model.executions(regions[:1], [4], 0) == [1]  # unrolled as a whole
    with pytest.raises(model.UnknownLoops):
        model.executions(regions[:1], [4], 1)


def test_iterations_of_loops_of_which_some_are_unrolled_as_a_whole():
    """The loop that is left is the one that runs often enough to load what the source loads."""
    regions = [{"counts": {"load": x}} for x in (4, 8)]
    assert model.executions(regions, [2, 6], 4 + 6 * 8) == [1, 6]
    assert model.executions(regions, [2, 6], 4 + 2 * 8) == [1, 2]
    with pytest.raises(model.UnknownLoops):
        model.executions(regions, [2, 6], 4 + 7 * 8)


def test_memory_of_shared_reads():
    access = {"again": False, "bytes": 1e9, "in_step": 1, "window": 0, "once": 0}
    assert model.memory_bytes(access, model.H100, 100) == 1e9
    assert model.memory_bytes(access | {"again": True}, model.H100, 100) == 0
    assert model.memory_bytes(access | {"in_step": 50}, model.H100, 100) == 1e9 / 50
    assert model.memory_bytes(access | {"in_step": 500}, model.H100, 100) == 1e9 / 100
    held = access | {"window": 1e5, "once": 1e8}
    assert model.memory_bytes(held, model.H100, 300) == 1e8
    assert model.memory_bytes(held, model.H100, 500) == 1e9


def test_floors():
    """block_attention's floor is its memory's, 4 N C elements; that of block_match at 4096 px its products'."""
    need = model.operation_need("block_attention, uniform", VGG[0], 1024, 2)
    assert need.bytes == 4 * 256**2 * 256 * 2 + 8 * 1024 * 4
    assert max(need.floor(model.H100, "bfloat16").values()) == need.bytes / (0.9 * 3.35e12)
    need = model.operation_need("block_match", VGG[0], 4096, 2)
    assert need.products == 2 * 8 * 16384**2 * 64 * 32
    assert max(need.floor(model.H100, "bfloat16").values()) == pytest.approx(need.products / 989e12, rel=0.01)
    need = model.operation_need("distributed_attention", VGG[0], 4096, 2)
    assert need.exponentials == 8 * 1024**2 * 16384


def compiled(**changes) -> limits.Kernel:
    code = {"spilled": 0, "shared": 1024, "tensor": ["HMMA.16816"], "loads": {"16": 4}, "stores": {"16": 1}}
    place = {
        "target": "sm_90",
        "dtype": "bfloat16",
        "layer": VGG[0],
        "picture": 1024,
        "name": "block_attention_fwd_kernel",
    }
    return limits.Kernel(**place | {name: x for name, x in changes.items() if name in place},
                         code=code | {name: x for name, x in changes.items() if name in code})  # fmt: skip


def broken(*cases) -> list[str]:
    kernels = [x for x in cases if isinstance(x, limits.Kernel)]
    operations = [x for x in cases if isinstance(x, limits.Operation)]
    return [x.limit.name for x in limits.judge(kernels, operations) if x.broken]


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"spilled": 1}, "spilled registers"),
        ({"shared": 100 << 10}, "shared memory, NVIDIA"),
        ({"target": "gfx942", "shared": 65 << 10}, "shared memory, gfx942"),
        ({"tensor": []}, "kernels without tensor cores"),
        ({"loads": {"8": 4}}, "512 bytes / widest access of a warp"),
        ({"stores": {"8": 4}}, "512 bytes / widest access of a warp"),
    ],
)
def test_limits_of_kernels(changes, limit):
    assert broken(compiled(), compiled(**changes)) == [limit]


def test_limits_that_do_not_apply():
    small = LOSSES[3]  # blocks of 16 points, 64 channels: large enough for tensor cores
    assert broken(compiled(layer=small, tensor=[])) == ["kernels without tensor cores"]
    assert not broken(compiled(dtype="float32", tensor=[]))
    assert not broken(compiled(name="block_aggregate_fwd_kernel", tensor=[], stores={"2": 1}))
    assert not broken(compiled(name="best_split_kernel", tensor=[], loads={"4": 1}, stores={"4": 1}))
    assert not broken(compiled(target="gfx942", stores={"8": 1}))


def modelled(name: str, picture: int = 1024, *, asked: float = 1, ratio: float = 1, balanced=None, gpu=model.H100):
    estimate = model.Estimate(model.Need(100), {"memory": 1.0}, 100, 100 * asked, ratio, "memory", 2.0, ())
    return limits.Operation(gpu, "float16", LITE[0], picture, name, 1, 0, estimate, balanced)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("block_aggregate", 1.15),
        ("block_attention, uniform", 1.15),
        ("block_aggregate backward", 1.3),
        ("block_attention backward, permutation", 1.3),
        ("distributed_attention", 1.5),
    ],
)
def test_limits_of_times(name, most):
    assert not broken(modelled(name, ratio=most))
    assert len(broken(modelled(name, ratio=most + 0.01))) == 1
    assert not broken(modelled(name, 512, ratio=most + 0.01))
    assert not broken(modelled(name, ratio=most + 0.01, gpu=model.A100))


def test_limits_of_bytes_match_and_worst_index():
    assert not broken(modelled("block_match", 2048, ratio=2), modelled("block_match", 4096, ratio=1.5))
    assert len(broken(modelled("block_match", 4096, ratio=1.51))) == 1
    assert len(broken(modelled("block_attention backward, uniform", asked=1.11))) == 1
    assert not broken(modelled("block_attention backward, one", asked=1.5, ratio=3, balanced=1.0))
    assert len(broken(modelled("block_attention backward, one", ratio=3.1, balanced=1.0))) == 1


def test_wrong_counts_are_suspicious():
    regions = [{"parent": None, "counts": {"load": 512, "HMMA": 4096}}]
    access = {"bytes": 4 * 512, "is_tile": True, "is_store": False, "again": False}
    launch = {"code": {"regions": [x | {"cycles": {}} for x in regions], "warps": 1},
              "work": {"active": 4, "loops": [], "flops": 4 * 4096, "accesses": [access]}}  # fmt: skip
    assert not model.is_suspicious(launch)
    launch["work"]["flops"] *= 2
    assert model.is_suspicious(launch)
    launch["work"] |= {"flops": 4 * 4096, "accesses": [access | {"bytes": 4 * 600}]}
    assert model.is_suspicious(launch)


def test_amd_code_is_read():
    text = """
	global_load_dwordx4 v[0:3], v4, s[0:1]
	buffer_load_ushort v1, v2, s[0:3], 0 offen
	global_store_dwordx2 v4, v[0:1], s[0:1]
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
; Occupancy: 4
    .vgpr_count:     120
    .vgpr_spill_count: 3
"""
    metadata = SimpleNamespace(shared=20 << 10, num_warps=4)
    found = machine_code.read_amd(SimpleNamespace(asm={"amdgcn": text}, metadata=metadata))
    assert (found["registers"], found["spilled"], found["resident"]) == (120, 3, 3)
    assert found["limited_by"] == "shared_memory"
    assert (found["loads"], found["stores"]) == ({16: 1, 2: 1}, {8: 1})
    assert found["tensor"] == ["v_mfma_f32_32x32x8_bf16_1k"]
