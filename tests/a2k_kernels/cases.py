"""Random inputs for the tests of a2k_kernels, in every memory layout, and how results are compared."""

import os
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import a2k_kernels
from a2k_kernels.blocks import count_blocks, split_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the Triton kernels; ttsem's stand-in counts as a GPU
INPUTS = {
    "block_aggregate": ("key", "value"),
    "distributed_attention": ("query", "key", "value"),
    "block_match": ("query", "key"),
    "block_attention": ("query", "key", "value", "index"),
    "progressive_attention": ("query", "key", "value"),
}
OPERATIONS = tuple(INPUTS)
WITH_MAP_OUTPUT = ("distributed_attention", "block_attention", "progressive_attention")
DIFFERENTIABLE = ("block_aggregate", *WITH_MAP_OUTPUT)
LAYOUTS = (
    "contiguous",
    "channels_last",
    "sliced",
    "sliced_channels_last",
    "transposed",
    "strided",
    "strided_channels_last",
    "expanded_batch",
    "expanded_channels",
    "expanded_points",
)
CHANNELS_LAST = ("channels_last", "sliced_channels_last", "strided_channels_last", "expanded_points")


def fresh_seeds(count: int) -> range:
    """Other seeds in every run; A2K_TEST_SEED=n repeats from seed n on. Workers of pytest-xdist agree."""
    run = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID"))
    first = int(os.environ.get("A2K_TEST_SEED") or run.randrange(10**6))
    return range(first, first + count)


def arrange(x: Tensor, layout: str) -> Tensor:
    """x with the strides of that layout; what lies between is NaN. Expanded layouts repeat part of x."""
    B, C, H, W = x.shape
    memory_format = torch.channels_last if layout.endswith("channels_last") else torch.contiguous_format
    if layout in ("contiguous", "channels_last"):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format).copy_(x)
    if layout.startswith("sliced"):
        wider = F.pad(x, (0, 0, 0, 0, 1, 2), value=float("nan"))
        return wider.contiguous(memory_format=memory_format)[:, 1 : C + 1]
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout.startswith("strided"):
        wider = x.new_full((B, C, 2 * H, 3 * W), float("nan")).contiguous(memory_format=memory_format)
        wider[:, :, ::2, ::3] = x
        return wider[:, :, ::2, ::3]
    if layout == "expanded_batch":
        return x[:1].expand_as(x)
    if layout == "expanded_channels":
        return x[:, :1].clone().expand_as(x)
    if layout == "expanded_points":
        return x[:, :, :1, :1].clone().expand_as(x)
    raise ValueError(layout)


def format_of(layout: str, shape: torch.Size) -> torch.memory_format:
    """The memory format that DESIGN.md asks of results for an input of that layout and shape."""
    points_are_vectors = layout in CHANNELS_LAST and shape[1] > 1 and shape[2] * shape[3] > 1
    return torch.channels_last if points_are_vectors else torch.contiguous_format


@dataclass
class Case:
    """Inputs and options of one call."""

    operation: str
    tensors: dict[str, Tensor]
    options: dict

    def differentiable(self) -> dict[str, Tensor]:
        """The inputs that have gradients: maps, and alpha and beta where they are tensors."""
        return {name: x for name, x in self.tensors.items() if name != "index"}

    def run(self, backend: str, **changes) -> tuple[Tensor, ...]:
        tensors = self.tensors | changes
        maps = [tensors[name] for name in INPUTS[self.operation]]
        scalars = {name: tensors[name] for name in ("alpha", "beta") if name in tensors}
        out = getattr(a2k_kernels, self.operation)(*maps, **scalars, **self.options, backend=backend)
        return out if isinstance(out, tuple) else (out,)

    def converted(self, dtype: torch.dtype) -> "Case":
        """Contiguous copies in another dtype."""
        tensors = {
            name: x if name == "index" else x.detach().to(dtype).contiguous().requires_grad_()
            for name, x in self.tensors.items()
        }
        return Case(self.operation, tensors, self.options)


def make_case(
    operation: str,
    *,
    batch: int = 2,
    heads: int = 2,
    block_size: int = 4,
    d_k: int = 3,
    d_v: int = 5,
    query_size: tuple[int, int] = (7, 10),
    key_size: tuple[int, int] = (9, 6),
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous"),
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    scalar_shape: tuple[int, ...] = (),
    seed: int = 0,
    device: str = "cpu",
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    shapes = ((heads * d_k, *query_size), (heads * d_k, *key_size), (heads * d_v, *key_size))
    tensors = {
        name: arrange(normal(batch, *shape).to(dtype), layout).requires_grad_()
        for name, shape, layout in zip(("query", "key", "value"), shapes, layouts, strict=True)
        if name in INPUTS[operation]
    }
    if operation == "block_attention":
        rows, cols = count_blocks(query_size, block_size)
        key_rows, key_cols = count_blocks(key_size, block_size)
        tensors["index"] = torch.randint(
            key_rows * key_cols, (batch, heads, rows * cols), generator=generator, dtype=torch.int32
        ).to(device)
    options = {"block_size": block_size, "num_heads": heads}
    if operation in ("block_aggregate", "distributed_attention"):
        scalars = torch.float64 if dtype == torch.float64 else torch.float32
        for name in ("alpha", "beta"):
            tensors[name] = normal(*scalar_shape).to(scalars).requires_grad_()
    if operation in WITH_MAP_OUTPUT:
        options["scale"] = scale
    if operation == "progressive_attention":
        options["return_index"] = True
    return Case(operation, tensors, options)


def small_case(operation: str, **geometry) -> Case:
    """Six query blocks and six key blocks, most of them cut, where the Triton kernels run."""
    return make_case(operation, **{"batch": 1, "heads": 2, "device": DEVICE, **geometry})


def at_index(case: Case, index: Tensor) -> Case:
    """The block_attention that a progressive_attention becomes once its index is known."""
    options = {name: x for name, x in case.options.items() if name != "return_index"}
    return Case("block_attention", case.tensors | {"index": index}, options)


def random_upstream(outs: tuple[Tensor, ...], layout: str) -> list[Tensor]:
    return [arrange(torch.randn(x.shape, device=x.device).to(x.dtype), layout) for x in outs]


def gradients(case: Case, outs: tuple[Tensor, ...], upstream: list[Tensor]) -> dict[str, Tensor]:
    inputs = case.differentiable()
    upstream = [x.to(out.dtype) for x, out in zip(upstream, outs, strict=True)]
    return dict(zip(inputs, torch.autograd.grad(outs, inputs.values(), upstream), strict=True))


def random_case(seed: int) -> Case:
    """Any geometry, layout and operation, drawn again until the work is small."""
    rng = random.Random(seed)

    def mostly_small(highest: int) -> int:
        return round(highest ** rng.random())

    while True:
        geometry = {
            "batch": rng.choice((0, 1, 1, 1, 1, 2, 2, 2)),
            "heads": rng.randint(1, 8),
            "block_size": rng.randint(1, 16),
            "d_k": mostly_small(184),
            "d_v": mostly_small(184),
            "query_size": (mostly_small(70), mostly_small(70)),
            "key_size": (mostly_small(70), mostly_small(70)),
        }
        if work(**geometry) < 1_500_000:
            break
    return make_case(
        rng.choice(OPERATIONS),
        **geometry,
        layouts=tuple(rng.choices(LAYOUTS, k=3)),
        scale=rng.choice((1.0, geometry["d_k"] ** -0.5, 0.3, -0.5)),
        scalar_shape=rng.choice(((), (1,))),
        seed=seed,
    )


HEAD_DIMS = ((24, 16), (56, 32), (120, 64), (184, 64), (16, 16), (24, 24), (48, 48), (32, 32), (64, 64))


def random_blocks_case(seed: int, seconds: float) -> Case:
    """Any block size, head dimensions, dtype, layout and operation on up to 3 x 3 blocks, most of them cut.

    Drawn again until Triton's interpreter should take at most that long.
    """
    rng = random.Random(seed)
    operation = rng.choice(OPERATIONS)

    def size() -> tuple[int, int]:
        return tuple(block_size * rng.randint(0, 2) + rng.randint(1, block_size) for _ in range(2))

    while True:
        block_size = rng.randint(1, 16)
        d_k, d_v = rng.choice(HEAD_DIMS) if rng.random() < 0.5 else (round(256 ** rng.random()) for _ in range(2))
        geometry = {
            "batch": rng.choice((1, 1, 1, 2)),
            "heads": rng.choice((1, 1, 2, 2, 3)),
            "block_size": block_size,
            "d_k": d_k,
            "d_v": d_v,
            "query_size": size(),
            "key_size": size(),
        }
        if interpreter_seconds(operation, **geometry) < seconds:
            break
    dtype = rng.choice((torch.float32, torch.float32, torch.float32, torch.float16, torch.bfloat16))
    # Equal keys make the query's gradient 0, and equal values the output exact: in half precision, luck with rounding
    # then decides how a result compares with another.
    key_layouts = LAYOUTS if dtype == torch.float32 else [x for x in LAYOUTS if x != "expanded_points"]
    return make_case(
        operation,
        **geometry,
        layouts=(rng.choice(LAYOUTS), rng.choice(key_layouts), rng.choice(key_layouts)),
        dtype=dtype,
        scale=rng.choice((1.0 if d_k <= 16 else 0.1, d_k**-0.5, -0.1)),
        scalar_shape=rng.choice(((), (1,))),
        seed=seed,
        device=DEVICE,
    )


def interpreter_seconds(operation, *, batch, heads, block_size, d_k, d_v, query_size, key_size) -> float:
    """About the time of a forward and backward pass: programs and iterations, times what was seen of each."""
    n_q, n_k = (rows * cols for rows, cols in (count_blocks(s, block_size) for s in (query_size, key_size)))
    points, chunks = block_size**2, -(-d_k // 64) + -(-d_v // 64)
    matching = 0.017 * points * -(-d_k // 32)
    attention = 0.03 * (n_q * max(1, points / 32) * (1 + chunks) + n_k) * (1 + chunks / 4)
    seconds = {
        "block_aggregate": 0.025 * n_k * chunks,
        "distributed_attention": 0.03 * (n_k * chunks + n_q * points / 16),
        "block_match": matching,
        "block_attention": attention,
        "progressive_attention": matching + attention,
    }
    return batch * heads * seconds[operation]


def work(*, batch, heads, block_size, d_k, d_v, query_size, key_size) -> int:
    """Elements of the maps, filled up to whole blocks, and of the scores of distributed attention."""
    n_q, n_k = (rows * cols for rows, cols in (count_blocks(s, block_size) for s in (query_size, key_size)))
    points = block_size**2
    return batch * heads * points * (n_q * (d_k + n_k + points) + n_k * (d_k + d_v))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, name: str, least_scale: float = 1.0) -> None:
    """No error above tolerance times the largest expected value (or least_scale, whichever is larger)."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if not expected.numel():
        return
    error = (actual.detach().double() - expected.detach().double()).abs().max().item()
    limit = tolerance * max(least_scale, expected.detach().abs().max().item())
    assert error <= limit, f"{name}: error {error:.3g}, allowed {limit:.3g}"


def match_scores(case: Case) -> tuple[Tensor, Tensor]:
    """float64 scores of block_match, and |q| * |k| for each of them."""
    q, k = (
        split_blocks(case.tensors[name].detach().double(), case.options["block_size"], case.options["num_heads"])
        for name in ("query", "key")
    )
    q, k = q.flatten(-2), k.flatten(-2)
    return q @ k.mT, q.norm(dim=-1, keepdim=True) @ k.norm(dim=-1, keepdim=True).mT


def assert_matches(case: Case, index: Tensor) -> None:
    """index names the best block of the key, or one whose score cannot be told from it."""
    scores, size = match_scores(case)
    assert index.dtype == torch.int32
    assert index.shape == scores.shape[:-1]
    assert not index.requires_grad
    if not index.numel():
        return
    chosen = index.long()[..., None]
    best = scores.argmax(-1, keepdim=True)
    lost = scores.gather(-1, best) - scores.gather(-1, chosen)
    allowed = 1e-5 * torch.maximum(size.gather(-1, best), size.gather(-1, chosen))
    assert ((chosen == best) | (lost < allowed)).all()
