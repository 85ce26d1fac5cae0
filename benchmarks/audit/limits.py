"""What the kernels must keep to. All limits are in LIMITS."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.audit.model import GPU, GPUS, Estimate, UnknownLoops, estimate, operation_need
from benchmarks.audit.shapes import LAYERS, Layer

LAYER = {layer.name: layer for layer in LAYERS}
KIB = 1024
LARGE = 1024  # pictures from which on time and bytes are limited


@dataclass(frozen=True)
class Kernel:
    """A kernel as compiled for one target, for one operation at one size."""

    target: str
    dtype: str
    layer: Layer
    picture: int
    name: str
    code: dict


@dataclass(frozen=True)
class Operation:
    """An operation at one size on a GPU that is modelled. balanced: its time with another key block for every query
    block, where the index matters."""

    gpu: GPU
    dtype: str
    layer: Layer
    picture: int
    name: str
    launches: int
    torch_calls: int
    estimate: Estimate
    balanced: float | None


@dataclass(frozen=True)
class Limit:
    """value(x) must be at most `most` for every x that it applies to."""

    name: str
    of: type[Kernel] | type[Operation]
    applies: Callable[[Kernel | Operation], bool]
    value: Callable[[Kernel | Operation], float]
    most: float
    unit: str = ""


def is_16_bit(x: Kernel | Operation) -> bool:
    return x.dtype != "float32"


def multiplies_blocks(x: Kernel) -> bool:
    """Whether it is a 16-bit kernel of matching or attention on blocks of at least 256 elements."""
    named = any(word in x.name for word in ("match", "attention", "distributed"))
    return is_16_bit(x) and named and x.layer.block_size**2 * min(x.layer.dim, x.layer.value_dim) >= 256


def narrowest(x: Kernel) -> float:
    """How many times narrower than 512 bytes a warp, 16 for each of NVIDIA's 32 threads, are the widest accesses with
    which the kernel reads maps, or writes them."""
    kinds = ["loads"] if x.name in NO_MAP_WRITTEN else ["loads", "stores"]
    threads = 32 if x.target.startswith("sm_") else 64
    return 512 / threads / min(max(map(int, x.code[kind])) for kind in kinds)


NO_MAP_WRITTEN = ("block_match_kernel", "block_aggregate_fwd_kernel")
NO_MAP = ("best_split_kernel",)


def is_large(x: Operation, *names: str) -> bool:
    return x.picture >= LARGE and x.layer.backward and x.name in names


def limits_time(*names: str) -> Callable[[Operation], bool]:
    return lambda x: x.gpu.name.startswith("H100") and is_16_bit(x) and is_large(x, *names)


AGGREGATE_TIME = "time / floor, H100, 16 bit, from 1024 px: aggregate and block_attention"
DISTRIBUTED_TIME = "time / floor, H100, 16 bit, from 1024 px: distributed_attention"
ATTENTION = ("block_attention, permutation", "block_attention, uniform")
ATTENTION_BACKWARD = ("block_attention backward, permutation", "block_attention backward, uniform")

LIMITS = (
    Limit("spilled registers", Kernel, lambda x: True, lambda x: x.code["spilled"], 0),
    Limit(
        "shared memory, NVIDIA",
        Kernel,
        lambda x: x.target.startswith("sm_"),
        lambda x: x.code["shared"] / KIB,
        99,
        " KiB",
    ),
    Limit(
        "shared memory, gfx942",
        Kernel,
        lambda x: not x.target.startswith("sm_"),
        lambda x: x.code["shared"] / KIB,
        64,
        " KiB",
    ),
    Limit("kernels without tensor cores", Kernel, multiplies_blocks, lambda x: not x.code["tensor"], 0),
    Limit("512 bytes / widest access of a warp", Kernel, lambda x: x.name not in NO_MAP, narrowest, 1),
    Limit(
        "bytes asked for / compulsory: aggregate, block_attention, forward and backward, from 1024 px",
        Operation,
        lambda x: is_large(x, "block_aggregate", "block_aggregate backward", *ATTENTION, *ATTENTION_BACKWARD),
        lambda x: x.estimate.asked / x.estimate.need.bytes,
        1.1,
    ),
    Limit(
        "time, one key block for all / balanced: block_attention backward",
        Operation,
        lambda x: x.name == "block_attention backward, one",
        lambda x: x.estimate.seconds / x.balanced,
        3,
    ),
    Limit(
        AGGREGATE_TIME,
        Operation,
        limits_time("block_aggregate", *ATTENTION),
        lambda x: x.estimate.ratio,
        1.15,
    ),
    Limit(
        "time / floor, H100, 16 bit, from 1024 px: their backward",
        Operation,
        limits_time("block_aggregate backward", *ATTENTION_BACKWARD),
        lambda x: x.estimate.ratio,
        1.3,
    ),
    Limit(
        DISTRIBUTED_TIME,
        Operation,
        limits_time("distributed_attention"),
        lambda x: x.estimate.ratio,
        1.5,
    ),
    Limit(
        "time / floor, H100, 16 bit, at 4096 px: block_match",
        Operation,
        lambda x: limits_time("block_match")(x) and x.picture == 4096,
        lambda x: x.estimate.ratio,
        1.5,
    ),
    Limit(
        "launches whose machine code does not fit the count",
        Operation,
        lambda x: True,
        lambda x: len(x.estimate.suspicious),
        0,
    ),
)


def kernels(entries: list[dict]) -> list[Kernel]:
    return [
        Kernel(e["target"], e["dtype"], LAYER[e["layer"]], e["picture"], launch["kernel"], launch["code"])
        for e in entries
        for launch in e["launches"]
    ]


def operations(entries: list[dict]) -> tuple[list[Operation], list[str]]:
    """Of the entries compiled for a GPU that is modelled; and those that cannot be, saying why."""
    found: dict[tuple, Operation] = {}
    problems = []
    gpus = {gpu.target: gpu for gpu in GPUS}
    for e in entries:
        if e["target"] not in gpus:
            continue
        gpu, layer, name = gpus[e["target"]], LAYER[e["layer"]], e["operation"]
        place = (e["target"], e["dtype"], e["layer"], e["picture"])
        need = operation_need(name, layer, e["picture"], 4 if e["dtype"] == "float32" else 2)
        try:
            result = estimate(gpu, e, need)
        except UnknownLoops as error:
            problems.append(f"{name}, {', '.join(map(str, place))}: {error}")
            continue
        balanced = found.get((*place, name.replace("one", "permutation")))
        found[(*place, name)] = Operation(
            gpu, e["dtype"], layer, e["picture"], name, len(e["launches"]), e["torch_calls"], result,
            balanced.estimate.seconds if balanced else None,
        )  # fmt: skip
    return list(found.values()), problems


@dataclass(frozen=True)
class Verdict:
    """The worst case of a limit, and all that break it."""

    limit: Limit
    worst: Kernel | Operation | None
    broken: list[Kernel | Operation]


def judge(compiled: list[Kernel], modelled: list[Operation]) -> list[Verdict]:
    found = []
    for limit in LIMITS:
        cases = [x for x in (*compiled, *modelled) if isinstance(x, limit.of) and limit.applies(x)]
        worst = max(cases, key=limit.value, default=None)
        found.append(Verdict(limit, worst, [x for x in cases if limit.value(x) > limit.most + 1e-9]))
    return found
