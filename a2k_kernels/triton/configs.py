"""Tile sizes, as plain functions of the shape, the element size and the architecture (sm_90, gfx942, ...)."""

from a2k_kernels.triton.tiles import tile_side

SHARED_100_KIB = ("sm_86", "sm_89", "sm_120")


def chunk_width(dim: int, element_size: int) -> int:
    """Channels per tile: all of them where they fit, else chunks of 64 bytes or more without much padding.

    float32 products without tensor cores hold their operands in registers, so their chunks are narrow.
    """
    padded = tile_side(dim)
    if element_size == 4 or padded <= 128:
        return min(padded, 32 if element_size == 4 else 128)
    return min((32, 64, 128), key=lambda width: (-(-dim // width) * width, -width))


def attention_tiles(block_size: int, dim: int, value_dim: int, element_size: int) -> dict[str, int]:
    """block_attention: BLOCK_M query points against all BLOCK_N points of a key block, channels in chunks."""
    block_n = tile_side(block_size**2)
    tiles = {
        "BLOCK_M": min(64, block_n),
        "BLOCK_N": block_n,
        "BLOCK_D": chunk_width(dim, element_size),
        "BLOCK_DV": chunk_width(value_dim, element_size),
        "num_warps": min(4, block_n // 16),
        "num_stages": 2,
    }
    if element_size == 2:
        return tiles
    if block_n > 64:
        return tiles | {"BLOCK_M": 8192 // block_n, "BLOCK_D": 16, "BLOCK_DV": 16, "num_warps": 4, "num_stages": 1}
    # as many warps as registers need, of those that move 16 bytes a thread
    num_warps = min(16, block_n * min(tiles["BLOCK_D"], tiles["BLOCK_DV"]) // 128)
    return tiles | {"num_warps": num_warps, "num_stages": 1}


def attention_backward_tiles(block_size: int, dim: int, value_dim: int, element_size: int, arch: str) -> dict[str, int]:
    """block_attention backward: as forward, but all channels where a block fits one tile, without a pipeline over the
    query blocks, of which most key blocks have few; and else fewer query points where registers are short."""
    tiles = attention_tiles(block_size, dim, value_dim, element_size)
    if fits_one_tile(block_size, dim, value_dim):
        tiles |= {"BLOCK_D": tile_side(dim), "BLOCK_DV": tile_side(value_dim)}
        if element_size == 4:
            is_small = tiles["BLOCK_N"] * max(tiles["BLOCK_D"], tiles["BLOCK_DV"]) <= 2048
            has_registers = is_small or arch == "gfx942"  # a thread of gfx942 may have 512
            return tiles | {"BLOCK_M": 16, "num_warps": 4 if has_registers else 8, "num_stages": 1}
        # Else ptxas spills to fit one more program on a processor: by Triton 3.9 on the former, by 3.6 on the latter.
        if arch in ("sm_80", "sm_100") and max(dim, value_dim) <= 32:
            return tiles | {"num_stages": 2}
        if arch == "sm_90" and tiles["BLOCK_N"] <= 16 and max(dim, value_dim) <= 32:
            return tiles | {"num_stages": 1, "maxnreg": 128}
        return tiles | {"num_stages": 1}
    if tiles["BLOCK_N"] > 64 or element_size == 4:
        widths = {"BLOCK_D": chunk_width(dim, element_size), "BLOCK_DV": chunk_width(value_dim, element_size)}
        return tiles | widths | {"BLOCK_M": 16, "num_warps": 8, "num_stages": 2}
    return tiles


def fits_one_tile(block_size: int, dim: int, value_dim: int) -> bool:
    """Whether the single-pass backward of block_attention holds a block's keys and values in registers."""
    return block_size**2 <= 64 and max(dim, value_dim) <= 64


def match_tiles(n_query: int, n_key: int, depth: int, maps: int, element_size: int, arch: str) -> dict[str, int]:
    """block_match: BLOCK_M query blocks by BLOCK_N key blocks, BLOCK_K of the depth elements of a block at a time.

    16 bit: tiles as large as registers allow, where there are enough of them for a GPU of 132 processors. Where shared
    memory is 100 KiB, ptxas must be kept from spilling to fit more programs than that holds, or a second large one.
    """
    widest = 256 if arch == "sm_90" else 128
    if element_size == 2 and maps * -(-n_query // 128) * -(-n_key // widest) >= 128:
        sides = {"BLOCK_M": 128, "BLOCK_N": widest, "num_warps": 8}
        sides["num_stages"] = 3 if arch in SHARED_100_KIB else 4
    else:
        sides = {"BLOCK_M": min(64, tile_side(n_query)), "BLOCK_N": min(64, tile_side(n_key))}
        smaller_tile = min(sides.values()) * min(32, tile_side(depth)) * element_size  # bytes; a thread moves 16
        sides["num_warps"] = min(4 if element_size == 2 else 8, smaller_tile // 512)
        if element_size == 2 and arch in SHARED_100_KIB:
            sides["maxnreg"] = 128
    return {"BLOCK_K": min(32, tile_side(depth)), "num_stages": 4} | sides


def aggregate_tiles(block_size: int, dim: int, value_dim: int, element_size: int, backward: bool) -> dict[str, int]:
    """block_aggregate: all points of a block, channels in chunks of at most 8192 elements a tile.

    Few warps, so that the sums over points are mostly sums within a thread; but backward 2 KiB a warp, for registers.
    """
    block_r = tile_side(block_size**2)
    widest = max(16, 8192 // block_r)
    block_d, block_dv = min(widest, tile_side(dim)), min(widest, tile_side(value_dim))
    elements = block_r * max(block_d, block_dv)
    return {
        "BLOCK_R": block_r,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "num_warps": max(1, elements * element_size // 2048 if backward else elements // 2048),
    }


def distributed_tiles(n_key: int, dim: int, value_dim: int, element_size: int, arch: str) -> dict[str, int]:
    """distributed_attention: BLOCK_M query points by BLOCK_N aggregated keys, all channels in one tile.

    As for the query's gradient, but where registers suffice more queries share what is loaded of the keys. With three
    stages, keys are loaded a whole iteration ahead; where shared memory is 100 KiB, two programs are worth more.
    With 128 registers a thread, two programs run on a processor, and with 128 keys none is left for a third stage.
    """
    tiles = distributed_query_tiles(n_key, dim, value_dim, element_size)
    if element_size == 4 or max(dim, value_dim) > 64:
        return tiles
    tiles |= {"BLOCK_M": 128, "num_warps": 8}
    if arch == "sm_90" and max(dim, value_dim) <= 32:
        tiles |= {"BLOCK_N": min(128, tile_side(n_key)), "maxnreg": 128}
    elif arch == "sm_90":
        tiles["num_stages"] = 3
    return tiles


def distributed_query_tiles(n_key: int, dim: int, value_dim: int, element_size: int) -> dict[str, int]:
    """distributed_attention, gradient of the query.

    float32 products without tensor cores hold their operands in registers: small tiles, no pipeline, and as many warps
    as still move 16 bytes a thread.
    """
    block_d, block_dv = tile_side(dim), tile_side(value_dim)
    block_n = (64 if element_size == 2 else 32) // (1 if max(block_d, block_dv) <= 128 else 2)
    return {
        "BLOCK_M": block_n if element_size == 2 else 16,
        "BLOCK_N": min(block_n, tile_side(n_key)),
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "num_warps": 4 if element_size == 2 else min(8, min(block_d, block_dv) // 8),
        "num_stages": 2 if element_size == 2 else 1,
    }


def distributed_key_tiles(n_key: int, dim: int, value_dim: int, element_size: int, arch: str) -> dict[str, int]:
    """distributed_attention, gradients of the keys: two accumulators more, so more warps share them.

    Where shared memory is 100 KiB, it holds three programs, and ptxas must be kept from spilling to fit more.
    """
    tiles = distributed_query_tiles(n_key, dim, value_dim, element_size)
    widest = max(tiles["BLOCK_D"], tiles["BLOCK_DV"])
    if element_size == 4:
        return tiles
    if widest <= 32:
        return tiles | ({"maxnreg": 168} if arch in SHARED_100_KIB else {})
    return tiles | {"num_warps": 8, "num_stages": 2 if widest <= 128 else 1}


def match_splits(programs: int, key_tiles: int) -> int:
    """block_match: ranges the keys are split into, so that few query blocks still fill a GPU of 132 processors, and
    that of many, only as many are in use at a time as its second-level cache holds."""
    wanted = max(1, min(key_tiles, max(8, 264 // max(1, programs))))
    return -(-key_tiles // -(-key_tiles // wanted))  # no empty range


def distributed_splits(programs: int, query_tiles: int) -> int:
    """distributed_attention, gradients of the keys: ranges the queries are split into, to fill 132 processors."""
    return max(1, min(query_tiles, 528 // max(1, programs)))
