"""docs/gpu-audit.md, from what was compiled and modelled."""

import platform
from collections import defaultdict
from collections.abc import Iterable

import torch
import triton

from benchmarks.audit import limits, machine_code, model
from benchmarks.audit.limits import Kernel, Operation, Verdict
from benchmarks.audit.shapes import DTYPES, TARGETS

MICRO = 1e6
OPERATIONS = (
    "block_match",
    "block_aggregate",
    "block_aggregate backward",
    "distributed_attention",
    "distributed_attention backward",
    "block_attention, permutation",
    "block_attention backward, permutation",
    "block_attention backward, uniform",
    "block_attention backward, one",
)


def table(header: list[str], rows: Iterable[list]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def render(compiled: list[Kernel], modelled: list[Operation], verdicts: list[Verdict]) -> str:
    parts = [
        introduction(compiled),
        "## Limits\n",
        limit_table(verdicts),
        broken_list(verdicts),
        *(REASONS[x.limit.name] for x in verdicts if x.broken and x.limit.name in REASONS),
        "## Kernels: registers, spills, shared memory, occupancy\n",
        RESOURCES,
        *(resource_section(dtype, [x for x in compiled if x.dtype == dtype]) for dtype in DTYPES),
        "## Kernels by shape: sm_90, bfloat16\n",
        shape_table([x for x in compiled if (x.target, x.dtype) == ("sm_90", "bfloat16")]),
        "## Kernels: tensor-core instructions and width of accesses\n",
        WIDTHS,
        instruction_table(compiled),
        "## Modelled times\n",
        assumptions(),
        worst_ratio_table(modelled),
        *(operation_section(name, modelled) for name in OPERATIONS),
    ]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


INTRODUCTION = """# GPU audit

Written by `make audit` (`python -m benchmarks.audit`), with Triton {triton}, PyTorch {torch} and Python {python}: do
not edit. No GPU was used. The kernels' launchers ran with a stand-in for the GPU's driver, every kernel was compiled
for every target at every distinct configuration that the maps below need, and the machine code was read. Maps are
channels_last, content and style of the same size, batch 1, float32 products exact. Registers, spills, shared memory,
occupancy and instructions are the compiler's. **All times are modelled, none was measured**; how is said under
[Modelled times](#modelled-times).

- Targets: {targets}. Dtypes: {dtypes}.
- Maps: {layers}, of square pictures of {pictures} px; losses, if listed, at 256 px and forward only.
"""

RESOURCES = """Worst over all shapes: registers a thread / spilled registers (bytes on NVIDIA, if instructions access
any; ptxas at times reserves 8 that none does) / KiB of shared memory / least occupancy in %.
"""

WIDTHS = """bfloat16, over all shapes: tensor-core instructions, and bytes a thread moves with the widest load and
store. A warp has 32 threads on NVIDIA and 64 on gfx942, where 8 bytes each are the same 512 bytes an instruction.
block_match writes and best_split reads and writes two numbers a block, block_aggregate_fwd writes one row.
"""


REASONS = {
    limits.AGGREGATE_TIME: """Why block_aggregate breaks its limit where a map is small: styled relu5 at 1024 px are
2.2 MB, which memory moves in 0.74 us, 1,350 cycles. All 1,024 programs run at once, one warp each, so the launch takes
as long as a single warp, 1,740 cycles: some 250 until its loads are on their way, 600 until they arrive, 900 for three
sums over points and a sigmoid, each of which needs the one before. At lite relu5 memory takes 2,040 cycles and a warp
2,220 in bfloat16, but 2,660 in float16, where ptxas lets the loads of the key wait for those of the value. More warps
per block add barriers, which cost more. To launch a kernel takes longer than all of it.
""",
    limits.DISTRIBUTED_TIME: """Why distributed_attention breaks its limit: it is two launches, and attention cannot
start before the aggregation is over.

- relu5 of the small networks at 1024 px: the floor of both launches of styled relu5 is 1.39 us. Aggregation takes 0.74
  us of memory at least and the exponentials 1.2 us, so that 1.4 times the floor is the least that two launches can
  take. Its 128 programs, one for each of most of the 132 processors, run once, each as long as a warp's chain of
  loads, product, maximum, exponential, product. At 4096 px 16 times as many programs hide each other's waiting.
- Heads of 48 and 64 channels at 2048 px: the floor of vgg relu4, 139 us, is that of its products and at once of its
  exponentials. The aggregation's 45 us of memory leave 1.17 times the floor for attention, in which tensor cores and
  special units would both have to be busy 85% of the time. It takes 182 us, a cycle for each of 299 instructions of a
  warp for 64 keys: 178 of them are the softmax (maximum, scaling, exponential, sum, half a conversion for each of 32
  scores; the output scaled down), the others addresses, descriptors, fences and sums over threads. Shared memory,
  from which the products read, needs 180 us as well. With 128 keys at a time it would be 157 and 150 us, but two such
  programs on a processor lack registers: ptxas spills some and lets every product wait for the one before. At 4096 px
  the aggregation is 8% of the floor, and the limit is kept.

The floor counts memory. Against products and exponentials alone, of 8.7 us, vgg relu4 would take 2.9 times as long at
1024 px, as its maps alone take 22 us to read and write.
""",
}


def introduction(compiled: list[Kernel]) -> str:
    def distinct(values: Iterable) -> str:
        return ", ".join(map(str, dict.fromkeys(values)))

    return INTRODUCTION.format(
        triton=triton.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        targets=distinct(x.target for x in compiled),
        dtypes=distinct(x.dtype for x in compiled),
        layers=distinct(x.layer.name for x in compiled),
        pictures=distinct(sorted(x.picture for x in compiled)),
    )


def limit_table(verdicts: list[Verdict]) -> str:
    rows = []
    for x in verdicts:
        value = "none audited" if x.worst is None else number(x.limit.value(x.worst)) + x.limit.unit
        where = "" if x.worst is None else place(x.worst)
        verdict = f"**broken by {len(x.broken)}**" if x.broken else "kept"
        rows.append([x.limit.name, number(x.limit.most) + x.limit.unit, value, where, verdict])
    return table(["Limit (at most)", "limit", "worst", "where", "verdict"], rows)


def broken_list(verdicts: list[Verdict], most: int = 12) -> str:
    """The worst cases of every broken limit."""
    lines = []
    for verdict in verdicts:
        worst = sorted(verdict.broken, key=verdict.limit.value, reverse=True)
        if worst:
            lines.append(f"Broken: {verdict.limit.name}\n")
            lines += [f"- {number(verdict.limit.value(x))}: {place(x)}" for x in worst[:most]]
            lines += [f"- and {len(worst) - most} more"] * (len(worst) > most)
            lines.append("")
    return "\n".join(lines)


def number(x: float) -> str:
    return f"{x:.3g}" if x < 1000 else f"{x:,.0f}"


def place(x: Kernel | Operation) -> str:
    where = x.target if isinstance(x, Kernel) else x.gpu.name
    return f"{x.name}, {x.layer.name}, {x.picture} px, {x.dtype}, {where}"


def by_name_and_target(compiled: list[Kernel]) -> dict[str, dict[str, list[dict]]]:
    found: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for x in compiled:
        found[x.name][x.target].append(x.code)
    return found


def resource_section(dtype: str, compiled: list[Kernel]) -> str:
    def worst(codes: list[dict]) -> str:
        highest = (max(code[name] for code in codes) for name in ("registers", "spilled", "shared"))
        registers, spilled, shared = highest
        occupancy = min(code["occupancy"] for code in codes)
        return f"{registers} / {spilled} / {shared / limits.KIB:.3g} / {100 * occupancy:.0f}"

    return f"### {dtype}\n\n{kernel_table(compiled, worst)}" if compiled else ""


def shape_table(compiled: list[Kernel]) -> str:
    """One row per kernel, layer and machine code; sizes of the picture with the same figures share it."""
    rows: dict[tuple, list[int]] = defaultdict(list)
    for x in compiled:
        code = x.code
        widths = "/".join(str(max(map(int, code[kind]), default=0)) for kind in ("loads", "stores"))
        figures = (code["warps"], code["registers"], code["spilled"], f"{code['shared'] / limits.KIB:.3g}",
                   f"{100 * code['occupancy']:.0f}", code["limited_by"].replace("+", ", "),
                   ", ".join(code["tensor"]) or "-", widths)  # fmt: skip
        pictures = rows[(x.name.removesuffix("_kernel"), x.layer.name, *figures)]
        if x.picture not in pictures:
            pictures.append(x.picture)
    header = ["kernel", "layer", "px", "warps", "registers", "spilled", "KiB shared", "occupancy, %", "limited by",
              "tensor cores", "bytes a load/store"]  # fmt: skip
    return table(header, [[*key[:2], ", ".join(map(str, px)), *key[2:]] for key, px in sorted(rows.items())])


def instruction_table(compiled: list[Kernel]) -> str:
    def used(codes: list[dict]) -> str:
        names = sorted({name for code in codes for name in code["tensor"]})
        short = ", ".join(sorted({name.split(".")[0].removeprefix("v_").partition("_")[0] for name in names}))
        widths = (min(max(map(int, code[kind]), default=0) for code in codes) for kind in ("loads", "stores"))
        return f"{short or '-'} {'/'.join(map(str, widths))}"

    return kernel_table([x for x in compiled if x.dtype == "bfloat16"], used)


def kernel_table(compiled: list[Kernel], cell) -> str:
    targets = [target for target in TARGETS if any(x.target == target for x in compiled)]
    rows = [
        [name.removesuffix("_kernel"), *(cell(codes[target]) if target in codes else "" for target in targets)]
        for name, codes in sorted(by_name_and_target(compiled).items())
    ]
    return table(["kernel", *targets], rows)


def assumptions() -> str:
    cache_rates = ", ".join(f"{x.cache_rate / 1e12:.3g} TB/s on {x.name}" for x in model.GPUS)
    gpus = (
        f"{x.name}: {x.processors} processors, {x.clock / 1e9:.3g} GHz, {x.memory / 1e12:.4g} TB/s" for x in model.GPUS
    )
    return f"""A launch takes as long as the busiest of these resources, as if all others were hidden behind it; an
operation as long as its launches together. What it costs to launch (2 to 5 us each, where no CUDA graph removes it),
to fill the GPU and to drain it is left out; the column *launches* says how many there are, and how many more
operators of PyTorch, which are charged for the bytes of their operands and results.

- **memory**: the bytes counted, at {model.SUSTAINED:.0%} of the memory's bandwidth. Counted means: what the kernels'
  loads and stores ask for, masked lanes left out, re-reads included (a test compares the counts with what Triton's
  interpreter sees). Three kinds of re-reads are taken to be served by the second-level cache: of programs that walk
  over the same bytes side by side (the aggregated keys of distributed_attention, the queries of its backward, the
  keys of block_match); of query tiles of block_match while those of all running programs fit
  {model.CACHE_SHARE:.0%} of the cache; of what a program itself has just read.
- **cache**: all bytes asked for, at what others measured of the second-level cache: {cache_rates}
  ([gpu-benches](https://github.com/te42kyfo/gpu-benches), `gpu-l2-cache`: 5.4 TB/s on an A100 SXM; 6.9 on an H100 PCIe,
  here scaled from its 114 processors to 132). It is a cautious figure for H100: the same benchmark reads 9.7 TB/s on
  an H200, which has the same processors, and a matrix product without multicast was measured at 777 Tflop/s on an
  H100 SXM ([fast.cu](https://github.com/pranjalssh/fast.cu), kernel 6), for which its tiles of 192 x 192 load 8.1 TB/s.
  block_match is bound by it and needs 7.8 TB/s to keep to its limit: at 6.9 it would take 1.68 times its floor.
- **issue**: the instructions of the machine code, each loop's times its iterations, predicated ones included, one per
  scheduler and cycle; both sides of a branch count. **fma**, **integer**, **special** (exponentials, conversions):
  those of a unit, at its width by the CUDA programming guide. **shared**: bytes through shared memory, at
  {model.SHARED_BYTES} a cycle, without bank conflicts.
- **tensor**: the flops of the tensor-core instructions, padding included. HMMA reaches 62.9% of the peak on H100
  (Luo et al. 2025, arXiv 2501.12084), HGMMA all of it.
- **latency**: waves of programs, the last one full or not, times the cycles of a warp that runs alone: the compiler's
  stall counts and scoreboards, with {machine_code.LATENCY["memory"]} cycles for loads from memory and
  {machine_code.LATENCY["L2"]} from the cache (Luo et al. measure 480 and 270 on an idle H100). By Little's law this
  compares the bytes that the running programs have in flight with bandwidth times latency; their quotient, for the
  longest launch, is the column *in flight*: below 1, memory waits for the programs.

The busiest processor's share of the programs counts (with few programs some processors get one more). GPUs:
{"; ".join(gpus)}.

The **floor** is the largest of: compulsory bytes at the same {model.SUSTAINED:.0%} of the bandwidth, useful flops of
the products at the peak (float32: of the multiply-add units), exponentials at the special units' rate. Compulsory:
query and output once, key and value once, for block_attention once per pair of a query block and the key block it
chose; backward, the inputs and the upstream gradient once and the gradients once.
"""


def worst_ratio_table(modelled: list[Operation]) -> str:
    """Largest modelled time over floor from 1024 px on."""
    columns = [(gpu, dtype) for gpu in model.GPUS for dtype in DTYPES]
    rows = []
    for name in OPERATIONS:
        row = [name]
        for gpu, dtype in columns:
            cases = [
                x for x in modelled if (x.name, x.gpu, x.dtype) == (name, gpu, dtype) and x.picture >= limits.LARGE
            ]
            worst = max(cases, key=lambda x: x.estimate.ratio, default=None)
            row.append(f"{worst.estimate.ratio:.2f} {worst.estimate.bound}" if worst else "")
        rows.append(row)
    header = ["from 1024 px", *(f"{gpu.name.split()[0]} {dtype}" for gpu, dtype in columns)]
    return "Worst modelled time over floor, and what binds:\n\n" + table(header, rows)


def operation_section(name: str, modelled: list[Operation]) -> str:
    """One operation at all sizes in bfloat16."""
    cases: dict[tuple[str, int], dict[str, Operation]] = defaultdict(dict)
    for x in modelled:
        if x.name == name and x.dtype == "bfloat16":
            cases[x.layer.name, x.picture][x.gpu.name] = x
    gpus = [gpu for gpu in model.GPUS if any(gpu.name in found for found in cases.values())]
    header = ["bfloat16", "launches", "MB compulsory", "asked for", "GFLOP"]
    for gpu in gpus:
        header += [f"{gpu.name.split()[0]} floor, us", "modelled, us", "ratio", "bound", "in flight"]
    rows = []
    for (layer, picture), found in cases.items():
        first = next(iter(found.values()))
        need = first.estimate.need
        calls = f"{first.launches} + {first.torch_calls}" if first.torch_calls else first.launches
        row = [f"{layer}, {picture} px", calls, number(need.bytes / 1e6), f"{first.estimate.asked / need.bytes:.2f}x",
               number((need.products + need.other) / 1e9)]  # fmt: skip
        for gpu in gpus:
            if gpu.name not in found:  # not modelled, as the audit says
                row += [""] * 5
                continue
            x = found[gpu.name].estimate
            row += [
                number(x.floor_seconds * MICRO),
                number(x.seconds * MICRO),
                f"{x.ratio:.2f}",
                x.bound,
                f"{x.in_flight:.1f}x",
            ]
        rows.append(row)
    return f"### {name}\n\n{table(header, rows)}" if rows else ""
