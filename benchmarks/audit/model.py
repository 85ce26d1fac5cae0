"""Times of a launch on GPUs that are not here, from its machine code and its traffic. Everything here is modelled."""

from dataclasses import dataclass
from itertools import combinations

from benchmarks.audit.shapes import Layer

WARP = 32


@dataclass(frozen=True)
class GPU:
    """Rates of a processor (SM) are per cycle; those of a scheduler, of which it has four, are cycles a warp.

    Sources: NVIDIA's A100 and H100 white papers (processors, clocks, tensor cores, memory, caches), the table of
    arithmetic throughput in the CUDA C++ programming guide (units), and measurements for cache_rate: gpu-l2-cache of
    github.com/te42kyfo/gpu-benches reads 5.4 TB/s on an A100 SXM 80 GB and 6.9 on an H100 PCIe, whose 114 processors
    are scaled to 132 here. That is no more than an H200, of the same processors, reads there (9.7), or than what the
    multiplication of github.com/pranjalssh/fast.cu without multicast (its kernel 6) moves on an H100 SXM: 777 Tflop/s
    from tiles of 192 x 192 in 16 bit are 8.1 TB/s.
    """

    name: str
    target: str
    processors: int
    clock: float  # Hz, at which the white paper's peaks hold
    memory: float  # bytes/s
    cache: float  # bytes of the second level
    cache_rate: float  # bytes/s from it
    tensor: dict[str, float]  # flops of a processor a cycle, in 16 bit, by instruction
    fma: float  # cycles a warp of float32 multiply-adds keeps a scheduler's unit busy


SUSTAINED = 0.9  # of the memory's bandwidth, as large copies reach
CACHE_SHARE = 0.8  # of the second-level cache that data to be read again may take
ROUNDING = 0.99  # of the bytes counted: small tiles are counted by less than 8 bytes a thread
MOST_PADDING = 6  # times the useful products: heads padded to powers of two, blocks and their number to 16
SCHEDULERS = 4
INTEGER = 2  # cycles a warp of integer, comparison or selection instructions keeps its unit busy
SPECIAL = 8  # and of exponentials, reciprocals, conversions
SHARED_BYTES = 128  # a cycle and processor

# HMMA on Hopper: 62.9% of the peak (Luo et al. 2025, arXiv 2501.12084).
H100 = GPU("H100 SXM", "sm_90", 132, 1.83e9, 3.35e12, 50e6, 8.0e12, {"HGMMA": 4096, "HMMA": 0.629 * 4096}, fma=1)
A100 = GPU("A100 SXM 80 GB", "sm_80", 108, 1.41e9, 2.039e12, 40e6, 5.4e12, {"HMMA": 2048}, fma=2)
GPUS = (H100, A100)


class UnknownLoops(ValueError):
    """The loops of the machine code are not those of the source."""


def executions(regions: list[dict], loops: list[float], loaded: float) -> list[float]:
    """How often a program runs through each region. loops: see traffic.Work; loaded: bytes a warp loads at least."""
    count = len(regions) - 1
    if count < len(loops):  # those that run once are none
        loops = [n for n in loops if n > 1]
    if count == len(loops):
        return [1, *loops]
    loads = [region["counts"].get("load", 0) for region in regions]
    if len(loops) == 1 and count > 1:  # unrolled by the compiler, with a loop for the rest
        least = min(x for x in loads[1:] if x)
        main = loads.index(max(loads[1:]), 1)
        return [1, *(loops[0] * least / loads[main] if i == main else 0 for i in range(1, count + 1))]

    def loads_of(times: tuple[float, ...]) -> float:
        return sum(n * load for n, load in zip(times, loads, strict=True))

    # Some are unrolled as a whole: those that are left must load enough, and none runs more often than it takes.
    possible = [(1, *kept) for kept in combinations(loops, count)]
    enough = [times for times in possible if loads_of(times) >= ROUNDING * loaded]
    if not enough:
        raise UnknownLoops(f"{count} loops in the machine code, {len(loops)} in the source")
    return list(min(enough, key=loads_of))


def totals(launch: dict) -> dict[str, float]:
    """Per warp of a program: instructions and bytes of machine_code.count, and cycles by where loads come from."""
    regions, found = launch["code"]["regions"], {}
    warps = max(1, launch["work"]["active"]) * launch["code"]["warps"]
    times = executions(regions, launch["work"]["loops"], first_loads(launch) / warps)
    for region, n in zip(regions, times, strict=True):
        for name, x in (*region["counts"].items(), *(("cycles " + k, x) for k, x in region["cycles"].items())):
            found[name] = found.get(name, 0) + n * x
    return found


def memory_bytes(access: dict, gpu: GPU, resident: int) -> float:
    """What comes from or goes to memory when `resident` programs run at a time."""
    if access["again"]:
        return 0
    if access["window"] and min(access["window"] * resident, access["once"]) <= CACHE_SHARE * gpu.cache:
        return access["once"]
    return access["bytes"] / max(1, min(access["in_step"], resident))


def asked_bytes(launch: dict) -> float:
    """What the compiled loads and stores ask for: tiles that the source reads again count if the code still does."""
    work = launch["work"]
    again = [x["bytes"] for x in work["accesses"] if x["again"] and x["is_tile"] and x["bytes"]]
    first = sum(x["bytes"] for x in work["accesses"] if not x["again"])
    if not again:
        return first
    executed = totals(launch)["tile_load"] * work["active"] * launch["code"]["warps"] / work["padding"]
    least = min(again)  # what is less, rows that many threads load at once, is none of these
    return first + min(sum(again), max(0, int((executed - first_loads(launch)) / least + 0.1) * least))


def first_loads(launch: dict) -> float:
    """Bytes of tiles loaded, without those that the same program has just read."""
    accesses = launch["work"]["accesses"]
    return sum(x["bytes"] for x in accesses if x["is_tile"] and not x["is_store"] and not x["again"])


def launch_memory(gpu: GPU, launch: dict) -> float:
    """Bytes to and from memory."""
    running = min(gpu.processors * launch["code"]["resident"], launch["work"]["active"])
    return sum(memory_bytes(x, gpu, running) for x in launch["work"]["accesses"])


def launch_time(gpu: GPU, launch: dict) -> dict[str, float]:
    """Seconds that each resource would need alone; the launch takes the largest."""
    work, code = launch["work"], launch["code"]
    active = work["active"]
    if not active:
        return {"memory": 0.0}
    counts = totals(launch)
    resident = gpu.processors * code["resident"]
    warps = -(-active // gpu.processors) * code["warps"]  # of the busiest processor, one after the other
    cycle = 1 / gpu.clock

    def unit(cycles: float) -> float:
        return warps * cycles / SCHEDULERS * cycle

    def get(*names: str) -> float:
        return sum(counts.get(name, 0) for name in names)

    moved, asked = launch_memory(gpu, launch), asked_bytes(launch)
    latency = "memory" if moved > asked / 2 else "L2"
    return {
        "memory": moved / (SUSTAINED * gpu.memory),
        "cache": asked / gpu.cache_rate,
        "tensor": warps * sum(get(name) / rate for name, rate in gpu.tensor.items()) * cycle,
        "issue": unit(get("issue")),
        "fma": unit(get("fma") * gpu.fma + get("imad") * INTEGER),
        "integer": unit(get("alu") * INTEGER),
        "special": unit(get("sfu") * SPECIAL),
        "shared": warps * get("shared") / SHARED_BYTES * cycle,
        "latency": -(-active // resident) * get(f"cycles {latency}") * cycle,
    }


@dataclass(frozen=True)
class Need:
    """What an operation cannot do without: bytes moved, flops in matrix products and elsewhere, exponentials."""

    bytes: float
    products: float = 0
    other: float = 0
    exponentials: float = 0

    def floor(self, gpu: GPU, dtype: str) -> dict[str, float]:
        """Seconds that each resource needs at least; the floor is the largest."""
        fma = gpu.processors * SCHEDULERS * WARP / gpu.fma * 2 * gpu.clock
        tensor = gpu.processors * max(gpu.tensor.values()) * gpu.clock
        special = gpu.processors * SCHEDULERS * WARP / SPECIAL * gpu.clock
        return {
            "memory": self.bytes / (SUSTAINED * gpu.memory),
            "tensor": self.products / (fma if dtype == "float32" else tensor),
            "fma": self.other / fma,
            "special": self.exponentials / special,
        }


@dataclass(frozen=True)
class Estimate:
    """An operation on one GPU. memory and asked: bytes that memory moves and that the loads and stores ask for, both
    with PyTorch's; seconds: modelled; bound: what binds its longest launch; in_flight: the bytes that launch has under
    way, over memory's bandwidth times latency; suspicious: launches whose machine code moves or computes less than
    the source asks for, or far more, so that the count of one of them is wrong."""

    need: Need
    floor: dict[str, float]
    memory: float
    asked: float
    seconds: float
    bound: str
    in_flight: float
    suspicious: tuple[str, ...]

    @property
    def floor_seconds(self) -> float:
        return max(self.floor.values())

    @property
    def ratio(self) -> float:
        return self.seconds / self.floor_seconds


def estimate(gpu: GPU, entry: dict, need: Need) -> Estimate:
    """entry: an operation as compiler.Task.run describes it, compiled for the GPU's target. Launches follow one
    another; PyTorch's operators around them cost what they move."""
    times = [launch_time(gpu, x) for x in entry["launches"]]
    longest = max(times, key=lambda x: max(x.values()))
    moved = entry["torch_bytes"]
    return Estimate(
        need,
        need.floor(gpu, entry["dtype"]),
        moved + sum(launch_memory(gpu, x) for x in entry["launches"]),
        moved + sum(asked_bytes(x) for x in entry["launches"]),
        sum(max(x.values()) for x in times) + moved / (SUSTAINED * gpu.memory),
        max(longest, key=longest.get),
        longest["memory"] / longest["latency"],
        tuple(x["kernel"] for x in entry["launches"] if is_suspicious(x)),
    )


def is_suspicious(launch: dict) -> bool:
    """Whether the machine code's loads of tiles or products, times its loops' iterations, do not fit the source's."""
    work, code = launch["work"], launch["code"]
    if not work["active"]:
        return False
    counts, warps = totals(launch), work["active"] * code["warps"]
    products = counts.get("HMMA", 0) + counts.get("HGMMA", 0)
    too_few = counts.get("load", 0) * warps < ROUNDING * first_loads(launch)
    return too_few or (products > 0 and not 0.99 <= products * warps / work["flops"] <= MOST_PADDING)


def operation_need(operation: str, layer: Layer, picture: int, element: int) -> Need:
    """operation: as launches.record_operations names them; element: bytes.

    Key and value of block_attention count once per pair of a query block and the key block it chose.
    """
    points, n, heads = layer.side(picture) ** 2, layer.blocks(picture), layer.num_heads
    r, key, value = points // n, heads * layer.dim, heads * layer.value_dim
    name, _, _ = operation.partition(",")
    index = n * heads * 4
    both, pairs, block_pairs = (key + value) * points, points * n, points * r
    if name == "block_match":
        return Need(2 * points * key * element + index, 2 * pairs * key)
    if name == "block_aggregate":
        return Need((both + both // r) * element, other=(5 * key + 2 * value) * points)
    if name == "block_aggregate backward":
        return Need((2 * both + both // r) * element, other=(12 * key + 5 * value) * points)
    forward, backward = 2 * (key + value), 2 * (3 * key + 2 * value)
    if name == "distributed_attention":
        return Need(2 * both * element, forward * pairs, exponentials=heads * pairs)
    if name == "distributed_attention backward":
        return Need((3 * both + points * key) * element, backward * pairs, exponentials=heads * pairs)
    if name == "block_attention":
        return Need(2 * both * element + index, forward * block_pairs, exponentials=heads * block_pairs)
    if name == "block_attention backward":
        moved = (4 * key + 3 * value) * points * element + index
        return Need(moved, backward * block_pairs, exponentials=heads * block_pairs)
    raise ValueError(operation)
