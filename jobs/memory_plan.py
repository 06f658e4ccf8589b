"""How much memory the pipeline of a worker holds: a stated number of blocks, whatever the number of tokens."""

from __future__ import annotations

from actcache.schemas.dtypes import numpy_dtype
from actcache.schemas.grid import Grid
from actcache.schemas.plan import Plan

BLOCKS_AT_ONCE = 2
"""Blocks of a worker under way: one with the model, one with the store."""
STAGING_BYTES = 256 << 20
"""Activations that are computed and not yet taken by the encoders."""
SHARDS_AT_ONCE = 4
"""Shards of a block that are put together, hashed and sent at once."""

ALLOCATOR_BYTES = 256 << 20
"""What allocators keep and threads of libraries need beside: 150 MB were seen on two cores."""


def staging_bytes(grid: Grid) -> int:
    """Room for activations between the model and the encoders: at least two sites of the largest batch."""
    return max(STAGING_BYTES, 2 * largest_batch_bytes(grid))


def batch_positions(plan: Plan) -> int:
    """Most positions of a batch, pads among them."""
    rule, context = plan.batches, plan.spec.context
    return max(rule.tokens, context) if rule.tokens is not None else (rule.size or 1) * context


def largest_batch_bytes(grid: Grid) -> int:
    """Most bytes of one site of one batch, as computed and as stored; the kept tokens of a batch are those of its block."""
    tokens = min(batch_positions(grid.plan), grid.block_range(0)[1])
    width = max(grid.width(site) for site in grid.plan.spec.sites)
    stored, computed = grid.plan.spec.stored_dtype, grid.plan.spec.execution.compute_dtype
    dtypes = {stored, computed}  # both are held where values are narrowed
    return tokens * width * sum(numpy_dtype(dtype).itemsize for dtype in dtypes)


def block_bytes(grid: Grid) -> int:
    """Bytes of a whole block, not compressed, of every array."""
    return sum(layout.row_bytes for layout in grid.block_arrays()) * grid.block_range(0)[1]


def pipeline_bytes(grid: Grid) -> int:
    """Most bytes that the pipeline holds: its blocks, the staging room, and shards on their way to the store."""
    rows = grid.block_range(0)[1]
    largest = max(layout.row_bytes for layout in grid.block_arrays()) * rows
    at_once = BLOCKS_AT_ONCE * SHARDS_AT_ONCE * largest
    staging = min(staging_bytes(grid), BLOCKS_AT_ONCE * block_bytes(grid))
    return BLOCKS_AT_ONCE * block_bytes(grid) + staging + at_once
