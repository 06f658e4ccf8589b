"""Running one block: forward passes, encoding while they go on, then create-only PUTs and the receipt last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from actcache.cache.encoder import Placement, ShardEncoder, encode_shard
from actcache.cache.publish import PublishedShard, publish, publish_shard
from actcache.cache.statistics import Moments, measure, pack, unpack
from actcache.cache.store import Store
from actcache.jobs.batches import Batch, TokenBatch
from actcache.jobs.capture import run
from actcache.jobs.feeds import Feed
from actcache.jobs.head import numpy_head
from actcache.jobs.memory_plan import SHARDS_AT_ONCE
from actcache.jobs.outputs import OutputEncoder
from actcache.jobs.parts import ModelParts
from actcache.jobs.quantised import QuantisedEncoder
from actcache.jobs.stages import Meter, MeteredPool
from actcache.jobs.staging import Staging
from actcache.jobs.transfer import Taken, Transfer
from actcache.schemas.array import ArrayLayout
from actcache.schemas.errors import Corrupt, OutOfRange
from actcache.schemas.grid import Grid
from actcache.schemas.plan import StoredObject
from actcache.schemas.receipt import Receipt, receipt_key, statistics_key

_one_blas = Lock()
"""The number of BLAS threads is the process's: who sets it must be alone."""

Tick = Callable[[int], None]


@dataclass(frozen=True)
class Measured:
    """Of some rows of a site: their moments, and the norm of each, (n,), of the tokens (n,)."""

    moments: Moments
    norms: np.ndarray
    tokens: np.ndarray


@dataclass
class Computed:
    """A block that was run: its sites are being encoded, nothing is stored yet."""

    block: int
    start: int
    stop: int
    encoders: dict[str, ShardEncoder]
    measured: dict[str, list[Future[Measured]]]
    outputs: OutputEncoder
    quantised: QuantisedEncoder


class BlockRunner:
    """Computes and stores the blocks of one build. One block at a time is computed; any number are stored meanwhile."""

    def __init__(
        self,
        store: Store,
        grid: Grid,
        parts: ModelParts,
        feed: Feed,
        pool: Executor,
        staging: Staging,
        meter: Meter,
    ) -> None:
        self._store = store
        self._grid = grid
        self._parts = parts
        self._feed = feed
        self._pool = MeteredPool(pool, meter, "encode")
        self._staging = staging
        self._meter = meter
        self._transfer = Transfer(parts.device)
        self._stored = getattr(torch, grid.plan.spec.stored_dtype)
        self._head = numpy_head(parts) if grid.plan.spec.quantize and grid.plan.spec.head else None

    def compute(self, block: int, batches: Sequence[Batch], tick: Tick) -> Computed:
        """Run the batches of a block. `tick` is called with the tokens kept from each batch; what it raises ends the run.

        Raises:
            OutOfRange: a value is not finite, or the stored dtype cannot hold it.
        """
        grid = self._grid
        start, stop = grid.block_range(block)
        sites = grid.plan.spec.sites
        encoders = {site: ShardEncoder(grid.site(site), self._pool) for site in grid.exact_sites}
        outputs = OutputEncoder(grid.outputs.values(), grid.plan.model.vocab_size, start, stop, self._pool)
        quantised = QuantisedEncoder(grid, start, stop, self._pool)
        computed = Computed(block, start, stop, encoders, {site: [] for site in sites}, outputs, quantised)
        with self._meter.busy("forward"):
            for batch in batches:
                self._run(batch, tick, computed)
                tick(len(batch.tokens))
                _raise_first(computed)
                quantised.drain()
        return computed

    def _run(self, batch: Batch, tick: Tick, computed: Computed) -> None:
        spec = self._grid.plan.spec
        placement = Placement(batch.tokens - computed.start)

        def take(site: str, tensor: torch.Tensor) -> None:
            with self._meter.paused("forward"):
                self._take(site, tensor, batch, placement, tick, computed)

        whole = bool(computed.outputs.names)
        state = run(self._parts, self._feed.inputs(batch), spec.sites, take, whole)
        if state is not None and isinstance(batch, TokenBatch) and whole:
            computed.outputs.append(self._parts, state, batch)

    def _take(
        self, site: str, tensor: torch.Tensor, batch: Batch, placement: Placement, tick: Tick, computed: Computed
    ) -> None:
        """Copy a site's kept rows and have them encoded, measured and quantised."""
        narrows = tensor.dtype != self._stored
        size = len(batch.tokens) * tensor.shape[-1] * (self._stored.itemsize + narrows * tensor.dtype.itemsize)
        self._wait_for_room(size, tick, computed)
        readers: list[Future[Any]] = []
        try:
            with self._meter.busy("copy"):
                rows = self._transfer.select(tensor, batch)
                stored = self._transfer.take(rows.to(self._stored))
                wide = self._transfer.take(rows) if computed.quantised.wants_computed and narrows else stored
            inspected = self._pool.submit(_inspect, site, batch.tokens, stored, rows if narrows else None)
            readers.append(inspected)
            computed.measured[site].append(inspected)
            if site in computed.encoders:
                readers += computed.encoders[site].place(placement, stored.rows, stored.ready)
            readers += computed.quantised.append(site, batch.tokens, placement, wide)
        finally:
            self._staging.give_back_after(size, readers)

    def _wait_for_room(self, size: int, tick: Tick, computed: Computed) -> None:
        """Wait until the encoding has room. A GPU that computes all the while is counted as busy."""
        began = self._meter.clock()

        def check() -> None:
            tick(0)
            _raise_first(computed)

        self._staging.take(size, check)
        if self._transfer.computing():
            self._meter.add("forward", self._meter.clock() - began)

    def sizes(self, computed: Computed) -> dict[str, int]:
        """Bytes of the shards of the sites and their quantised forms, encoded and not stored. It ends the block."""
        found = {site: len(encoder.finish()) for site, encoder in computed.encoders.items()}
        computed.quantised.drain(wait=True)
        return found | {name: len(computed.quantised.finish(name)) for name in self._grid.quantised}

    def publish(self, computed: Computed) -> Receipt:
        """Store a block's shards, norms, outputs and statistics, then its receipt.

        Raises:
            OutOfRange: see `compute`.
            StoreError, Corrupt: the store failed, or holds something else under a key.
        """
        grid, block = self._grid, computed.block
        sites = grid.plan.spec.sites
        with ThreadPoolExecutor(SHARDS_AT_ONCE, thread_name_prefix="actcache-put") as puts:
            stored = list(puts.map(lambda site: self._publish_site(site, computed), sites))
            computed.quantised.drain(wait=True)
            quantised = list(puts.map(self._shard(block, computed.quantised.finish), grid.quantised.values()))
            outputs = list(puts.map(self._shard(block, computed.outputs.finish), grid.outputs.values()))
        shards = [shard for shard, _, _ in stored if shard is not None]
        shards += quantised
        norms = encode_shard(grid.norm, np.stack([norms for _, _, norms in stored], axis=1), self._pool)
        shards.append(self._put(grid.norm, block, norms))
        shards += outputs
        with _one_blas, threadpool_limits(1, "blas"):  # its products' last bits depend on the number of threads
            damage = computed.quantised.damage(self._head)
        statistics, other = self._publish_statistics(block, [moments for _, moments, _ in stored])
        receipt = Receipt(
            block=block,
            start=computed.start,
            stop=computed.stop,
            objects=(*(shard.stored for shard in shards), statistics),
            mixed_attempts=(*(shard.stored.key for shard in shards if shard.kept is not None), *other),
            quantised=damage,
        )
        key = receipt_key(block, grid.records)
        published = publish(self._store, key, receipt.to_bytes())
        if published.other is None:
            return receipt
        return Receipt.from_bytes(bytes(published.other), str(self._store.location.child(key)))

    def _publish_site(self, site: str, computed: Computed) -> tuple[PublishedShard | None, Moments, np.ndarray]:
        """Store a site's shard, if its values are stored as they are. Returns its moments and norms (token) too.

        They are of what is stored, whoever wrote it; without an exact array, of the values before quantising.
        """
        parts = [future.result() for future in computed.measured[site]]
        shard = None
        if encoder := computed.encoders.pop(site, None):
            shard = self._put(self._grid.site(site), computed.block, encoder.finish())
        if shard is not None and shard.kept is not None:
            return shard, *measure(shard.kept)
        whole = parts[0].moments
        for part in parts[1:]:
            whole = whole.merge(part.moments)
        norms = np.empty(computed.stop - computed.start, parts[0].norms.dtype)
        for part in parts:
            norms[part.tokens - computed.start] = part.norms
        return shard, whole, norms

    def _shard(self, block: int, finish: Callable[[str], memoryview]) -> Callable[[ArrayLayout], PublishedShard]:
        """What stores a block's shard of an array, encoded by then but for its end."""
        return lambda layout: self._put(layout, block, finish(layout.name))

    def _put(self, layout: ArrayLayout, block: int, data: memoryview) -> PublishedShard:
        with self._meter.busy("upload"):
            return publish_shard(self._store, layout, block, data)

    def _publish_statistics(self, block: int, moments: list[Moments]) -> tuple[StoredObject, list[str]]:
        """Store a block's statistics. Those of an earlier attempt that differ by rounding alone are kept and reported."""
        key = statistics_key(block, self._grid.records)
        published = publish(self._store, key, pack(moments))
        if published.other is None:
            return published.stored, []
        try:
            theirs = unpack(published.other, [len(part.mean) for part in moments], moments[0].count)
            same = all(
                np.allclose(a.mean, b.mean) and np.allclose(a.m2, b.m2) for a, b in zip(moments, theirs, strict=True)
            )
        except ValueError:
            same = False
        if not same:
            where = self._store.location.child(key)
            raise Corrupt(f"{where}: holds statistics of other values; remove it and run again")
        return published.stored, [published.stored.key]


def _raise_first(computed: Computed) -> None:
    """Raise what a finished measurement found wrong, rather than after the whole block."""
    for futures in computed.measured.values():
        for future in futures:
            if future.done():
                future.result()


def _inspect(site: str, tokens: np.ndarray, stored: Taken, before: torch.Tensor | None) -> Measured:
    """Measure rows, and refuse a value that is not finite. `before` has the values before they were narrowed."""
    values = stored.values()
    moments, norms = measure(values)
    if not np.isfinite(moments.mean).all():
        row, column = (int(i) for i in np.argwhere(~np.isfinite(values.astype(np.float32)))[0])
        where = f"{site}, token {tokens[row]}, dimension {column}"
        value = float(values[row, column] if before is None else before[row, column])
        if before is not None and np.isfinite(value):
            raise OutOfRange(
                f"{where}: {value!r} does not fit into {values.dtype.name}; build with --dtype float32 or bfloat16 into another URL"
            )
        raise OutOfRange(f"{where}: the model computed {value!r}; try --compute-dtype float32, into another URL")
    return Measured(moments, norms, tokens)
