"""Reading compiled kernels: resources, instructions by loop, widths of accesses, and a warp's way through the code.

NVIDIA code is read from the cubin with the tools in Triton's wheel and cuxray's parsers, AMD's from Triton's assembly.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import cuxray
import networkx
import triton
from cuxray.parse import ctrl, resusage, sass
from triton.compiler import CompiledKernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
AMD_WAVES = 8  # of 64 threads on each of gfx942's four SIMD units

WARP = 32
MODELLED = (80, 90)
SIMULATED_ITERATIONS = 3
# Cycles until a result is there. Global memory: Luo et al. 2025, table 5 and 6 (H100 and A100 within 15%); the others
# likewise or from Jia et al. 2018, rounded. What has a fixed latency is in the compiler's own stall counts.
LATENCY = {"memory": 600, "L2": 270, "shared": 30, "MUFU": 24, "SHFL": 24, "S2R": 24, "LDC": 40, "BAR": 30, "other": 20}


def read(compiled: CompiledKernel) -> dict:
    """What is known of a compiled kernel, ready for JSON.

    registers, spilled (bytes a thread on NVIDIA, where instructions access any; registers on AMD), shared (bytes),
    warps, occupancy (fraction), resident (programs on a processor), limited_by, tensor (the instructions), loads and
    stores (count by width in bytes). For MODELLED architectures also regions: what is outside of loops and every loop,
    see `read_regions`.
    """
    report = read_amd if "amdgcn" in compiled.asm else read_nvidia
    metadata = compiled.metadata
    return {"shared": metadata.shared, "warps": metadata.num_warps, **report(compiled)}


# ---- AMD


def read_amd(compiled: CompiledKernel) -> dict:
    code, metadata = compiled.asm["amdgcn"], compiled.metadata
    numbers = {name: int(x) for name, x in re.findall(r"[.; ](\w+):\s+(\d+)\s*$", code, re.MULTILINE)}
    waves = numbers["Occupancy"]
    by_shared = (64 << 10) // metadata.shared * metadata.num_warps if metadata.shared else 4 * AMD_WAVES
    resident = min(4 * waves, by_shared) // metadata.num_warps
    return {
        "registers": numbers["vgpr_count"],
        "spilled": numbers["vgpr_spill_count"],
        "occupancy": resident * metadata.num_warps / (4 * AMD_WAVES),
        "resident": resident,
        "limited_by": "shared_memory" if by_shared < 4 * waves else "registers",
        "tensor": sorted(set(re.findall(r"\bv_mfma_\w+", code))),
        "loads": amd_widths(code, "load"),
        "stores": amd_widths(code, "store"),
    }


def amd_widths(code: str, kind: str) -> dict[int, int]:
    names = re.findall(rf"\b(?:global|buffer)_{kind}_[us]?(dword(?:x[234])?|short|byte)", code)
    widths = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}
    return dict(Counter(widths[name] for name in names))


# ---- NVIDIA


def read_nvidia(compiled: CompiledKernel) -> dict:
    metadata = compiled.metadata
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run_tool("cuobjdump", "--dump-resource-usage", file.name)
        listing = run_tool("nvdisasm", "-c", "-hex", file.name)
    (resources,) = resusage.parse(usage).values()
    (function,) = sass.parse_gi(listing).functions.values()
    (controls,) = ctrl.parse_sass_controls(f"Function : {function.name}\n{listing}").values()
    occupancy = cuxray.compute(
        cuxray.lookup(f"sm_{metadata.target.arch}"),
        resources.reg,
        WARP * metadata.num_warps,
        smem_dynamic=metadata.shared,
    )
    local_accesses = sum(map(sass.is_spill, function.instructions))
    return {
        "registers": resources.reg,
        "spilled": local_accesses and max(local_accesses, resources.stack + resources.local),
        "occupancy": occupancy.active_warps / occupancy.max_warps,
        "resident": occupancy.blocks_per_sm,
        "limited_by": occupancy.limiter,
        "tensor": sorted({name for x in function.instructions if (name := tensor_name(x.opcode))}),
        "loads": dict(Counter(width(x.opcode) for x in function.instructions if is_global_load(x.opcode))),
        "stores": dict(Counter(width(x.opcode) for x in function.instructions if x.opcode.startswith("STG"))),
        "regions": read_regions(function, controls) if metadata.target.arch in MODELLED else [],
    }


def run_tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def is_global_load(opcode: str) -> bool:
    return opcode.startswith("LDG.") or opcode.startswith("LDGSTS")


def width(opcode: str) -> int:
    """Bytes a thread moves with a load or store, to global or shared memory."""
    if opcode.startswith(("LDSM", "STSM")):
        return 4 * int(opcode[-1]) if opcode[-1] in "24" else 4
    names = opcode.split(".")
    for name, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if name in names:
            return size
    return 4


def tensor_name(opcode: str) -> str | None:
    """HMMA, HGMMA, ... with its shape; None for other instructions."""
    found = re.match(r"(UTC\w*MMA|HMMA|HGMMA|[QIOD]G?MMA)((?:\.\d+(?:x\d+)*)?)", opcode)
    return found.group(1) + found.group(2) if found else None


def tensor_flops(opcode: str) -> int:
    """Flops of a tensor instruction per warp that executes it."""
    name, _, shape = tensor_name(opcode).partition(".")
    if name == "HGMMA":  # of the four warps of a group together
        m, n, k = map(int, shape.split("x"))
        return 2 * m * n * k // 4
    return {"16816": 4096, "1688": 2048, "1684": 1024}[shape] if name == "HMMA" else 0


@dataclass
class Block:
    """A basic block."""

    instructions: list[sass.Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


def basic_blocks(function: sass.Function) -> list[Block]:
    """In the order of their addresses."""
    blocks, first_of, previous = [], {}, None
    for instruction in function.instructions:
        if previous is None or instruction.block != previous.block or is_jump(previous):
            blocks.append(Block())
            first_of.setdefault(instruction.block, len(blocks) - 1)
        blocks[-1].instructions.append(instruction)
        previous = instruction
    for number, block in enumerate(blocks):
        last = block.instructions[-1]
        target = re.search(r"\((\.\w+)\)", last.operands) if is_jump(last) else None
        if target:
            block.successors.append(first_of[target.group(1)])
        if (not is_jump(last) or last.predicate) and number + 1 < len(blocks):
            block.successors.append(number + 1)
    return blocks


def is_jump(instruction: sass.Instruction) -> bool:
    """ptxas also leaves loops by calls that never return."""
    return instruction.opcode.startswith(("BRA", "EXIT", "RET", "CALL.REL.NOINC"))


@dataclass
class Region:
    """A loop, or what is outside of all loops. blocks: those of inner loops included."""

    blocks: set[int]
    parent: int | None = None


def find_regions(blocks: list[Block]) -> list[Region]:
    """The whole code, then its natural loops by address, outer before inner."""
    graph = networkx.DiGraph((i, j) for i, block in enumerate(blocks) for j in block.successors)
    graph.add_node(0)
    reachable = networkx.descendants(graph, 0) | {0}
    graph = graph.subgraph(reachable)
    loops: dict[int, set[int]] = {}
    dominators = networkx.immediate_dominators(graph, 0)
    for tail, header in graph.edges:
        if header in dominating(dominators, tail):
            above = graph.subgraph(reachable - {header})
            members = networkx.ancestors(above, tail) | {tail} if tail != header else set()
            loops.setdefault(header, {header}).update(members)
    regions = [Region(reachable)]
    for members in sorted(loops.values(), key=lambda x: (min(x), -len(x))):
        around = [i for i, region in enumerate(regions) if members <= region.blocks]
        regions.append(Region(members, around[-1]))
    return regions


def dominating(dominators: dict[int, int], node: int) -> set[int]:
    """The node and all that every path to it passes."""
    found = set()
    while node is not None and node not in found:
        found.add(node)
        node = dominators.get(node)
    return found


def read_regions(function: sass.Function, controls: dict[int, ctrl.Ctrl]) -> list[dict]:
    """What one pass through every region does, inner loops left out; the first is what is outside of loops.

    parent: number of the region around it. counts: per warp, see `count`. cycles: of a single warp that nobody
    delays, where global loads come from "memory" or from "L2".
    """
    blocks = basic_blocks(function)
    regions = find_regions(blocks)
    innermost = {block: number for number, region in enumerate(regions) for block in region.blocks}
    found = []
    for number, region in enumerate(regions):
        own = [x for block in sorted(region.blocks) if innermost[block] == number for x in blocks[block].instructions]
        found.append({"parent": region.parent, "counts": count(own)})
    for source in ("memory", "L2"):
        for entry, cycles in zip(found, region_cycles(blocks, regions, controls, LATENCY[source]), strict=True):
            entry.setdefault("cycles", {})[source] = cycles
    return found


# Which unit executes an instruction, by the first part of its name; all others only take an issue slot.
UNITS = {
    "fma": ("FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2"),
    "imad": ("IMAD",),
    "alu": (
        "LOP3", "IADD3", "ISETP", "LEA", "SHF", "SEL", "FSEL", "FSETP", "FMNMX", "F2FP", "PRMT", "IABS", "VIADD",
        "SGXT", "VIMNMX", "VIMNMX3", "IMNMX", "PLOP3", "P2R", "R2P", "MOV", "CS2R", "I2FP", "VIADDMNMX",
    ),
    "sfu": ("MUFU", "I2F", "F2I", "F2F", "POPC", "FLO"),
}  # fmt: skip
UNIT_OF = {name: unit for unit, names in UNITS.items() for name in names}


def count(instructions: list[sass.Instruction]) -> dict[str, int]:
    """Per warp: instructions (issue) and those of every unit, tensor flops by instruction (HMMA, HGMMA), and bytes
    loaded from and stored to global memory (tile_load: by accesses of 8 bytes or more, which numbers are not) and
    moved through shared memory, if all threads take part."""
    counts = Counter()
    for x in instructions:
        name = x.opcode.split(".")[0]
        counts["issue"] += 1
        counts[UNIT_OF.get(name, "other")] += 1
        if tensor_name(x.opcode):
            counts[name] += tensor_flops(x.opcode)
            counts["shared"] += operand_bytes(x)
        if is_global_load(x.opcode):
            counts["load"] += WARP * width(x.opcode)
            counts["tile_load"] += WARP * width(x.opcode) * (width(x.opcode) >= 8)
        if name == "STG":
            counts["store"] += WARP * width(x.opcode)
        if name in ("LDS", "STS", "LDSM", "STSM", "LDGSTS"):
            counts["shared"] += WARP * width(x.opcode)
    return dict(counts)


def operand_bytes(instruction: sass.Instruction) -> int:
    """Shared memory that an HGMMA reads for its operands, per warp of the four."""
    if not instruction.opcode.startswith("HGMMA"):
        return 0
    m, n, _ = map(int, tensor_name(instruction.opcode).partition(".")[2].split("x"))
    a_is_shared = instruction.operands.split(",")[1].strip().startswith("gdesc")
    bytes_of_k = 32  # every shape's k spans 32 bytes
    return (m * a_is_shared + n) * bytes_of_k // 4


def region_cycles(
    blocks: list[Block], regions: list[Region], controls: dict[int, ctrl.Ctrl], latency: int
) -> list[int]:
    """Cycles of one pass through every region, inner loops left out, when every loop runs SIMULATED_ITERATIONS times.

    A loop's are those from the end of its last but one iteration to the end of its last.
    """
    warp = Warp(controls, latency)
    marks: dict[int, list[float]] = {}

    def walk(number: int) -> None:
        inner = {i for i, region in enumerate(regions) if region.parent == number}
        covered = {block: i for i in inner for block in regions[i].blocks}
        done = set()
        for block in sorted(regions[number].blocks):
            if block not in covered:
                warp.run(blocks[block].instructions)
            elif covered[block] not in done:
                done.add(covered[block])
                for _ in range(SIMULATED_ITERATIONS):
                    walk(covered[block])
                    marks.setdefault(covered[block], []).append(warp.clock)

    walk(0)
    inclusive = [warp.clock] + [marks[i][-1] - marks[i][-2] for i in range(1, len(regions))]
    return [
        max(0, inclusive[i] - sum(SIMULATED_ITERATIONS * inclusive[j] for j, x in enumerate(regions) if x.parent == i))
        for i in range(len(regions))
    ]


class Warp:
    """The clock of a warp that runs alone, by the compiler's stall counts and scoreboards and by LATENCY."""

    def __init__(self, controls: dict[int, ctrl.Ctrl], global_latency: int) -> None:
        self.controls, self.global_latency = controls, global_latency
        self.clock = 0
        self.scoreboards = [0] * 8  # when each is free; the last stands for none
        self.copies, self.copy_groups = 0, []  # asynchronous copies to shared memory: last, and by group
        self.tensor_free, self.products = 0, []  # HGMMA: when the unit is free, and when each group ends

    def run(self, instructions: list[sass.Instruction]) -> None:
        for x in instructions:
            control = self.controls[x.addr]
            waits = [self.scoreboards[i] for i in range(6) if control.watdb >> i & 1]
            self.clock = max([self.clock, *waits])
            self.issue(x)
            ready = self.clock + self.latency(x.opcode)
            self.scoreboards[control.wrtdb] = max(self.scoreboards[control.wrtdb], ready)
            self.scoreboards[control.readdb] = max(self.scoreboards[control.readdb], self.clock + LATENCY["other"])
            self.clock += max(1, control.stall)

    def issue(self, x: sass.Instruction) -> None:
        """What the scoreboards do not show: asynchronous copies and products."""
        if x.opcode.startswith("LDGSTS"):
            self.copies = self.clock + self.global_latency
        elif x.opcode == "LDGDEPBAR":
            self.copy_groups.append(self.copies)
        elif x.opcode == "DEPBAR.LE" and self.copy_groups:
            self.wait(self.copy_groups, x)
        elif x.opcode.startswith("HGMMA"):
            flops_per_cycle = 1024  # of a quarter processor
            self.tensor_free = max(self.tensor_free, self.clock) + tensor_flops(x.opcode) / flops_per_cycle
            if "gsb0" in x.operands:
                self.products.append(self.tensor_free + LATENCY["shared"])
        elif x.opcode == "WARPGROUP.DEPBAR.LE" and self.products:
            self.wait(self.products, x)

    def wait(self, groups: list[float], x: sass.Instruction) -> None:
        """Until all groups but the last few have ended."""
        pending = int(x.operands.split(",")[1].strip(), 16)
        if len(groups) > pending:
            self.clock = max(self.clock, groups[len(groups) - pending - 1])

    def latency(self, opcode: str) -> int:
        name = opcode.split(".")[0]
        if name == "LDG":
            return self.global_latency
        if name in ("LDS", "LDSM"):
            return LATENCY["shared"]
        return LATENCY.get(name, LATENCY["other"])
