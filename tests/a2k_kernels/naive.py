"""The five operations once more, as loops over Python floats written from DESIGN.md's formulas alone."""

from math import exp, isnan

import torch
from torch import Tensor


def blocks_of(size: tuple[int, int], b: int) -> list[dict[int, tuple[int, int]]]:
    """Per block, in row-major order: its points as {position: (row, column)}."""
    H, W = size
    return [
        {dy * b + dx: (top + dy, left + dx) for dy in range(b) for dx in range(b) if top + dy < H and left + dx < W}
        for top in range(0, H, b)
        for left in range(0, W, b)
    ]


def vector(x: list, head: int, heads: int, point: tuple[int, int]) -> list[float]:
    """The channels of one head at one point of a (C, H, W) nested list."""
    d = len(x) // heads
    return [x[head * d + c][point[0]][point[1]] for c in range(d)]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def mean(vectors: list[list[float]]) -> list[float]:
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def attend(q: list[float], keys: list, values: list, scale: float) -> list[float]:
    scores = [scale * dot(q, k) for k in keys]
    weights = [exp(s - max(scores)) for s in scores]
    return [
        sum(w * v for w, v in zip(weights, column, strict=True)) / sum(weights) for column in zip(*values, strict=True)
    ]


def block_aggregate(key: Tensor, value: Tensor, alpha: float, beta: float, *, block_size: int, num_heads: int):
    k_agg, v_agg = [], []
    for key_map, value_map in zip(key.tolist(), value.tolist(), strict=True):
        for head in range(num_heads):
            for block in blocks_of(key.shape[-2:], block_size):
                k = [vector(key_map, head, num_heads, point) for point in block.values()]
                v = [vector(value_map, head, num_heads, point) for point in block.values()]
                gates = [1 / (1 + exp(-(beta + alpha * dot(mean(k), k_y)))) for k_y in k]
                for points, aggregates in ((k, k_agg), (v, v_agg)):
                    gated = [[g * x for x in y] for g, y in zip(gates, points, strict=True)]
                    total = [sum(column) for column in zip(*gated, mean(points), strict=True)]
                    aggregates.append([x / (len(points) + 1) for x in total])
    shape = (key.shape[0], num_heads, len(blocks_of(key.shape[-2:], block_size)))
    return tuple(torch.tensor(x, dtype=torch.float64).view(*shape, -1) for x in (k_agg, v_agg))


def distributed_attention(query, key, value, alpha, beta, *, block_size, num_heads, scale) -> Tensor:
    k_agg, v_agg = block_aggregate(key, value, alpha, beta, block_size=block_size, num_heads=num_heads)
    (B, _, H, W), d_v = query.shape, value.shape[1] // num_heads
    out = torch.zeros(B, value.shape[1], H, W, dtype=torch.float64)
    for b, query_map in enumerate(query.tolist()):
        for head in range(num_heads):
            keys, values = k_agg[b, head].tolist(), v_agg[b, head].tolist()
            for y in range(H):
                for x in range(W):
                    q = vector(query_map, head, num_heads, (y, x))
                    attended = attend(q, keys, values, scale)
                    out[b, head * d_v : (head + 1) * d_v, y, x] = torch.tensor(attended, dtype=torch.float64)
    return out


def block_match(query: Tensor, key: Tensor, *, block_size: int, num_heads: int) -> Tensor:
    index = []
    for query_map, key_map in zip(query.tolist(), key.tolist(), strict=True):
        for head in range(num_heads):
            for x in blocks_of(query.shape[-2:], block_size):
                scores = [
                    sum(
                        dot(
                            vector(query_map, head, num_heads, x[y]),
                            vector(key_map, head, num_heads, z[y]),
                        )
                        for y in x
                        if y in z
                    )
                    for z in blocks_of(key.shape[-2:], block_size)
                ]
                unordered = [i for i, score in enumerate(scores) if isnan(score)]
                index.append(unordered[0] if unordered else scores.index(max(scores)))
    return torch.tensor(index, dtype=torch.int32).view(query.shape[0], num_heads, -1)


def block_attention(query, key, value, index, *, block_size, num_heads, scale) -> Tensor:
    (B, _, H, W), d_v = query.shape, value.shape[1] // num_heads
    out = torch.zeros(B, value.shape[1], H, W, dtype=torch.float64)
    key_blocks = blocks_of(key.shape[-2:], block_size)
    maps = zip(query.tolist(), key.tolist(), value.tolist(), index.tolist(), strict=True)
    for b, (query_map, key_map, value_map, chosen) in enumerate(maps):
        for head in range(num_heads):
            for i, block in enumerate(blocks_of((H, W), block_size)):
                points = key_blocks[chosen[head][i]].values()
                keys = [vector(key_map, head, num_heads, point) for point in points]
                values = [vector(value_map, head, num_heads, point) for point in points]
                for y, x in block.values():
                    attended = attend(vector(query_map, head, num_heads, (y, x)), keys, values, scale)
                    out[b, head * d_v : (head + 1) * d_v, y, x] = torch.tensor(attended, dtype=torch.float64)
    return out
