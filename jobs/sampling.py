"""Running a few tokens through the pipeline of a build without storing anything, to learn what all of them will take."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from actcache.cache.cores import available_cores
from actcache.cache.seal import head_layout
from actcache.cache.store import open_store
from actcache.jobs.batches import Batch
from actcache.jobs.blocks import BlockRunner
from actcache.jobs.capture import keep_nothing, run
from actcache.jobs.determinism import deterministic
from actcache.jobs.environment import device_name
from actcache.jobs.feeds import Feed, ReadTokens, feed_of
from actcache.jobs.forecast import Sample
from actcache.jobs.head import head_parts
from actcache.jobs.items import Items
from actcache.jobs.loaded import loaded_parts, make_ready
from actcache.jobs.memory_plan import batch_positions, staging_bytes
from actcache.jobs.parts import ModelParts
from actcache.jobs.progress import untold
from actcache.jobs.resident import Peak, resident_bytes
from actcache.jobs.resolve import Chosen
from actcache.jobs.stages import Meter
from actcache.jobs.staging import Staging
from actcache.schemas.grid import Grid

NOWHERE = "memory://sample"


def first_sequences(grid: Grid, sequence_start: np.ndarray, limit: int) -> tuple[Grid, np.ndarray]:
    """A grid of the first sequences alone, at least one and of about `limit` tokens within the first block, and their row splits."""
    most = min(limit, grid.block_range(0)[1])
    count = max(1, int(np.searchsorted(sequence_start, most, side="right")) - 1)
    starts = sequence_start[: count + 1]
    return replace(grid, n_tokens=int(starts[-1]), n_sequences=count), starts


def sample_here(chosen: Chosen, grid: Grid, sequence_start: np.ndarray, inputs: Items | ReadTokens) -> Sample:
    """Load a plan's model in this process, prove it, and run the sequences of a small grid.

    Raises:
        ActcacheError: as a build's worker.
    """
    with deterministic():
        parts = loaded_parts(chosen)
        feed = feed_of(grid, inputs, sequence_start, parts.device)
        peak = Peak(parts.device)
        make_ready(grid, parts, feed)
        return sample(grid, parts, feed, available_cores(), peak.taken())


def sample(grid: Grid, parts: ModelParts, feed: Feed, threads: int, proof_bytes: int) -> Sample:
    """Run the first block of a small grid: once for the memory of its largest batch, once as a build does, for time and sizes.

    `proof_bytes` is what proving the tensors took at its peak, of the device's memory.
    """
    resident = resident_bytes()
    spec = grid.plan.spec
    start, stop = grid.block_range(0)
    batches = feed.batches(start, stop)
    largest = max(batches, key=lambda batch: batch.keep.numel())
    peak = Peak(parts.device)
    run(parts, feed.inputs(largest), spec.sites, keep_nothing, whole=bool(spec.outputs))
    taken = peak.taken()
    meter = Meter(encode=threads)
    with ThreadPoolExecutor(threads, "actcache-encode") as pool:
        runner = BlockRunner(open_store(NOWHERE), grid, parts, feed, pool, Staging(staging_bytes(grid)), meter)
        began = time.perf_counter()
        computed = runner.compute(0, batches, untold)
        peak.wait()
        sizes = runner.sizes(computed)
        seconds = time.perf_counter() - began
    raw = {layout.name: (stop - start) * layout.row_bytes for layout in grid.block_arrays()}
    cuda = parts.device.type == "cuda"
    head = (
        [head_layout(name, a.shape, a.dtype.name) for name, a in head_parts(parts).arrays.items()] if spec.head else []
    )
    return Sample(
        tokens=stop - start,
        seconds=seconds,
        forward_seconds=meter.drain().busy.get("forward", seconds),
        ratios={name: size / raw[name] for name, size in sizes.items()},
        device=device_name(parts),
        cores=1 if cuda else torch.get_num_threads(),
        on_gpu=cuda,
        resident_bytes=resident,
        model_bytes=_model_bytes(parts),
        forward_bytes=_scaled(taken, largest, grid),
        proof_bytes=proof_bytes,
        head_objects=1 + bool(head) + sum(1 + layout.n_shards for layout in head) if spec.head else 0,
        head_bytes=sum(layout.row_bytes * layout.shape[0] for layout in head),
    )


def _scaled(taken: int, largest: Batch, grid: Grid) -> int:
    """What a batch of the full size takes, from what this one took: memory grows with the positions."""
    return int(taken * max(1.0, batch_positions(grid.plan) / largest.keep.numel()))


def _model_bytes(parts: ModelParts) -> int:
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*parts.model.parameters(), *parts.model.buffers())}
    return sum(tensors.values())
