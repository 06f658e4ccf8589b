"""What runs the blocks of a build in one process: the model, loaded once, and the pipeline from its tokens to the store.

Two blocks are under way at a time: one has the model, while the other's activations are encoded and put into the store.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from threading import BoundedSemaphore, Event, Lock

import numpy as np

from actcache.cache.cores import available_cores
from actcache.cache.location import Location
from actcache.cache.publish import publish, publish_array, publish_document
from actcache.cache.reader import ArrayReader
from actcache.cache.seal import environments_of, head_layout
from actcache.cache.store import Store, open_store
from actcache.jobs.allocator import few_arenas
from actcache.jobs.anatomy import Studied
from actcache.jobs.blocks import BlockRunner
from actcache.jobs.determinism import deterministic
from actcache.jobs.environment import environment
from actcache.jobs.feeds import Feed, ReadTokens, feed_of
from actcache.jobs.forecast import Sample
from actcache.jobs.head import head_parts
from actcache.jobs.items import Items
from actcache.jobs.loaded import inputs_of, loaded_parts, make_ready
from actcache.jobs.memory_plan import BLOCKS_AT_ONCE, staging_bytes
from actcache.jobs.parts import ModelParts
from actcache.jobs.progress import untold
from actcache.jobs.replay import replay
from actcache.jobs.resident import Peak
from actcache.jobs.resolve import Chosen
from actcache.jobs.sampling import first_sequences, sample
from actcache.jobs.source import source_of
from actcache.jobs.stages import Meter, Usage
from actcache.jobs.staging import Staging
from actcache.schemas.anatomy import Anatomy
from actcache.schemas.array import head_group
from actcache.schemas.canonical import canonical, sha256
from actcache.schemas.capturable import Capturable
from actcache.schemas.errors import NotFound
from actcache.schemas.grid import Grid
from actcache.schemas.plan import StoredObject
from actcache.schemas.receipt import HEAD_RECEIPT, HeadArray, HeadReceipt, receipt_key
from actcache.schemas.root import ReplayResult


class Stopped(Exception):
    """The build is to end now; the block is not stored."""


@dataclass(frozen=True)
class Job:
    """All that a process needs to run blocks of a build. It holds no secret: each process finds its own credentials."""

    location: Location
    grid: Grid
    model: str | Capturable
    revision: str | None
    anatomy: Anatomy


@dataclass(frozen=True)
class Done:
    """A block is stored. `found` says that it was before; `usage` is the worker's since it last told."""

    block: int
    tokens: int
    worker: str
    usage: Usage
    bytes_written: int = 0
    mixed_attempts: int = 0
    found: bool = False


class Worker:
    """Runs blocks, from any number of threads. `threads` is how many encode, by default one a core."""

    def __init__(self, store: Store, grid: Grid, chosen: Chosen, threads: int | None = None) -> None:
        few_arenas()
        self._store = store
        self._grid = grid
        self._chosen = chosen
        self._threads = threads or available_cores()
        self._name = f"{platform.node()}-{os.getpid()}"
        self._slots = BoundedSemaphore(BLOCKS_AT_ONCE)
        self._opening = Lock()
        self._stopping = Event()
        self._inside: _Inside | None = None
        self._closing = ExitStack()

    @classmethod
    def of(cls, job: Job, threads: int | None = None) -> Worker:
        """A worker of a job that came from another process.

        Raises:
            InvalidInput, StoreError: the model is not found here, or the store is not reached.
        """
        source = source_of(job.model, job.revision)
        chosen = Chosen(job.grid.plan, source, Studied(job.anatomy, source.ready), travelled=True)
        return cls(open_store(job.location), job.grid, chosen, threads)

    @property
    def is_full(self) -> bool:
        """Whether as many blocks are under way as can be."""
        if not self._slots.acquire(blocking=False):
            return True
        self._slots.release()
        return False

    def perform(self, block: int, tick: Callable[[int], None] = untold) -> Done:
        """Run and store a block, or find it stored. `tick` is called with the tokens of each batch that was run.

        Raises:
            ActcacheError: see `BlockRunner`, `load_model` and `prove`.
            Stopped: `stop` was called meanwhile.
        """
        start, stop = self._grid.block_range(block)

        def ticked(tokens: int) -> None:
            if self._stopping.is_set():
                raise Stopped
            tick(tokens)

        with self._slots:
            if self._is_stored(block):
                return Done(block, stop - start, self._name, Usage(), found=True)
            inside = self._open()
            with inside.meter.busy("read"):
                batches = inside.feed.batches(start, stop)
            ticked(0)
            computed = inside.model_thread.submit(inside.runner.compute, block, batches, ticked).result()
            receipt = inside.runner.publish(computed)
            return Done(
                block,
                stop - start,
                self._name,
                inside.meter.drain(),
                sum(entry.size for entry in receipt.objects),
                len(receipt.mixed_attempts),
            )

    def prepare(self) -> None:
        """Load the model, prove the tensors, and store the head and what is known of this environment."""
        self._open()

    def replay(self) -> ReplayResult:
        """Run a few stored sequences once more.

        Raises:
            ProofFailed: what is stored differs.
        """
        inside = self._open()
        arguments = (self._store, self._grid, inside.parts, inside.feed, inside.sequence_start)
        return inside.model_thread.submit(replay, *arguments).result()

    def sample(self, limit: int) -> Sample:
        """What running about so many of the first tokens takes and gives. Nothing of it is stored."""
        inside = self._open()
        grid, starts = first_sequences(self._grid, inside.sequence_start, limit)
        feed = feed_of(grid, inside.inputs, starts, inside.parts.device)
        return inside.model_thread.submit(sample, grid, inside.parts, feed, self._threads, inside.proof_bytes).result()

    def stop(self) -> None:
        """Have every block end with `Stopped` at its next batch."""
        self._stopping.set()

    def close(self) -> None:
        """End the threads and let go of the model; no other block is begun. Nothing should be under way."""
        self._stopping.set()
        with self._opening:
            self._inside = None
            self._closing.close()

    def _is_stored(self, block: int) -> bool:
        try:
            self._store.size(receipt_key(block, self._grid.records))
        except NotFound:
            return False
        return True

    def _open(self) -> _Inside:
        with self._opening:
            if self._stopping.is_set():
                raise Stopped
            if self._inside is None:
                with ExitStack() as stack:
                    stack.enter_context(deterministic())
                    model_thread = stack.enter_context(ThreadPoolExecutor(1, "actcache-model"))
                    pool = stack.enter_context(ThreadPoolExecutor(self._threads, "actcache-encode"))
                    self._inside = model_thread.submit(self._make, model_thread, pool).result()
                    self._closing = stack.pop_all()
            return self._inside

    def _make(self, model_thread: ThreadPoolExecutor, pool: ThreadPoolExecutor) -> _Inside:
        store, grid = self._store, self._grid
        parts = loaded_parts(self._chosen)
        starts = ArrayReader(store, grid.token_arrays()["sequence_start"]).read()
        inputs = inputs_of(store, grid, self._chosen)
        feed = feed_of(grid, inputs, starts, parts.device)
        peak = Peak(parts.device)
        record = canonical(environment(parts, grid.plan.spec, make_ready(grid, parts, feed)))
        proof_bytes = peak.taken()
        publish(store, f"{environments_of(grid.records)}{sha256(record)}.json", record)
        _store_head(store, grid, parts, pool)
        meter = Meter(encode=self._threads)
        runner = BlockRunner(store, grid, parts, feed, pool, Staging(staging_bytes(grid)), meter)
        return _Inside(parts, inputs, starts, feed, runner, meter, model_thread, proof_bytes)


@dataclass(frozen=True)
class _Inside:
    """What a worker has once its model is loaded."""

    parts: ModelParts
    inputs: Items | ReadTokens
    sequence_start: np.ndarray
    feed: Feed
    runner: BlockRunner
    meter: Meter
    model_thread: ThreadPoolExecutor
    proof_bytes: int


def _store_head(store: Store, grid: Grid, parts: ModelParts, pool: ThreadPoolExecutor) -> None:
    if not grid.plan.spec.head or grid.number or store.get_or_none(HEAD_RECEIPT) is not None:
        return
    head = head_parts(parts)
    stored: list[StoredObject] = [publish_document(store, "head/zarr.json", head_group(head.operations))]
    arrays = {}
    for name, array in head.arrays.items():
        layout = head_layout(name, array.shape, array.dtype.name)
        stored += publish_array(store, layout, array, pool)
        arrays[name] = HeadArray(shape=array.shape, dtype=layout.dtype)
    receipt = HeadReceipt(arrays=arrays, operations=head.operations, objects=tuple(stored))
    publish(store, HEAD_RECEIPT, receipt.to_bytes())
