"""How much memory the pipeline of a worker holds: a stated number of blocks, whatever the number of tokens."""

from __future__ import annotations

from actcache.schemas.dtypes import numpy_dtype
from actcache.schemas.grid import Grid

BLOCKS_AT_ONCE = 2
"""Blocks of a worker under way: one with the model, one with the store."""
STAGING_BYTES = 256 << 20
"""Activations that are computed and not yet taken by the encoders."""


def staging_bytes(grid: Grid) -> int:
    """Room for activations between the model and the encoders: at least two sites of the largest batch."""
    return max(STAGING_BYTES, 2 * largest_batch_bytes(grid))


def largest_batch_bytes(grid: Grid) -> int:
    """Most bytes of one site of one batch, as stored; the kept tokens of a batch are those of its block."""
    rule = grid.plan.batches
    spec = grid.plan.spec
    most = rule.tokens if rule.tokens is not None else (rule.size or 1) * spec.context
    tokens = min(max(most, spec.context), grid.block_tokens)
    width = max(grid.width(site) for site in spec.sites)
    return tokens * width * numpy_dtype(spec.stored_dtype).itemsize


def block_bytes(grid: Grid) -> int:
    """Bytes of a whole block, not compressed, of every array."""
    return sum(layout.row_bytes for layout in grid.block_arrays()) * min(grid.block_tokens, grid.n_tokens)


def pipeline_bytes(grid: Grid) -> int:
    """Most bytes that the pipeline holds: its blocks, the staging room, and shards on their way to the store."""
    return BLOCKS_AT_ONCE * block_bytes(grid) + staging_bytes(grid)
