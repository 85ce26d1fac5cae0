"""All-to-key attention (StyA2K, ICCV 2023) for feature maps."""

from a2k_kernels.api import (
    attend_aggregates,
    block_aggregate,
    block_attention,
    block_match,
    distributed_attention,
    progressive_attention,
)

__all__ = [
    "attend_aggregates",
    "block_aggregate",
    "block_attention",
    "block_match",
    "distributed_attention",
    "progressive_attention",
]
