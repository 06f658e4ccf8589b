"""The engine alone: how well worker processes scale where the model only sleeps, and what handing out a block costs."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import distributed
import torch
from distributed.diagnostics.plugin import WorkerPlugin
from torch import nn

from actcache.cache.publish import publish, publish_metadata
from actcache.cache.store import Store, open_store
from actcache.jobs.cluster import OnCluster, on_cluster
from actcache.jobs.local_cluster import local_cluster
from actcache.jobs.options import ClusterOptions
from actcache.jobs.pending import PendingBlocks
from actcache.jobs.pool import BoundedPool
from actcache.jobs.progress import Silent
from actcache.jobs.resolve import Resolved, resolve
from actcache.jobs.stages import Usage
from actcache.jobs.worker import Done, Job
from actcache.schemas.capturable import Capturable
from actcache.schemas.grid import Grid
from actcache.schemas.plan import PLAN_KEY
from actcache.schemas.spec import Spec
from benchmarks.material import Material
from benchmarks.ratio import Result

TITLE = "engine: worker processes on a model that only sleeps; the cost of handing out a block"
NOTE = """  Each block of the sleeping model takes 0.5 s of sleep; processes are started, and the model loaded, outside the time.
  Tiny blocks do nothing at all: what is left is the engine's, the scheduler's and the network's."""
SLEEP = 0.5
BLOCKS = 48
TINY = 20_000
SCALING_GOAL, OVERHEAD_GOAL = 0.9, 10.0


class Sleeper(nn.Module):
    """Takes its time and computes next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input through one small layer, after a sleep."""
        time.sleep(SLEEP)
        result: torch.Tensor = self.one(x)
        return result


class Idle(WorkerPlugin):  # type: ignore[misc]  # distributed has no types
    """In a worker's place: blocks that are done at once."""

    def __init__(self, name: str) -> None:
        self.name = name

    is_full = False

    def worker(self) -> Idle:
        """Itself."""
        return self

    def well(self) -> None:
        """A block is done."""

    def perform(self, block: int) -> Done:
        """A block that needs nothing."""
        return Done(block, 1, "idle", Usage())


def run(material: Material) -> Iterator[Result]:
    """Scaling to 2 and 4 processes, and the milliseconds of a tiny block."""
    print(NOTE)
    with tempfile.TemporaryDirectory(prefix="actcache-benchmarks-", dir=material.memory) as folder:
        speeds = {workers: _blocks_a_second(Path(folder) / str(workers), workers) for workers in (1, 2, 4)}
        for workers in (2, 4):
            ratio = speeds[workers] / speeds[1] / workers
            figures = {f"{count} workers, blocks/s": speeds[count] for count in (1, workers)}
            yield Result(
                "engine", f"{workers} workers ÷ {workers} × one", ratio, ratio, ratio, 1, SCALING_GOAL, figures=figures
            )
        cost = _milliseconds_a_block(Path(folder) / "tiny")
        what = f"milliseconds to hand out one of {TINY:,} tiny blocks, 2 workers"
        yield Result("engine", what, cost, cost, cost, 1, OVERHEAD_GOAL, "lower")


def _blocks_a_second(folder: Path, workers: int) -> float:
    store, grid, resolved = _begun(folder, BLOCKS)
    job = Job(store.location, grid, resolved.source.reference, None, resolved.studied.anatomy)
    with on_cluster(job, ClusterOptions(workers), Silent()) as engine:
        warm = replace(grid, n_tokens=4 * workers)
        PendingBlocks(store, warm, None, Silent()).run(engine)  # every process has its model now
        pending = PendingBlocks(store, grid, None, Silent())
        count = len(pending)
        began = time.perf_counter()
        pending.run(engine)
        took = time.perf_counter() - began
    shutil.rmtree(folder)
    return count / took


def _milliseconds_a_block(folder: Path) -> float:
    store, grid, _ = _begun(folder, TINY)
    with local_cluster(2, 1, None) as cluster, distributed.Client(cluster, set_as_default=False) as client:
        client.register_plugin(Idle("idle"))
        engine = OnCluster(client, "idle", ClusterOptions(2), Silent())
        pending = PendingBlocks(store, grid, None, Silent())
        began = time.perf_counter()
        pending.run(engine)
        return (time.perf_counter() - began) / TINY * 1000


def _begun(folder: Path, blocks: int) -> tuple[Store, Grid, Resolved]:
    """A build of so many blocks of one item each, its tokens stored."""
    inputs: Any = torch.zeros(blocks, 4)
    capturable = Capturable(name="sleeper", module=Sleeper(), inputs=inputs, sites={"one": "one"})
    with _awake():
        resolved = resolve(Spec(model=capturable, sites="all", block_tokens=1, batch_size=1))
    store, pool = open_store(folder), BoundedPool()
    publish(store, PLAN_KEY, resolved.plan.to_bytes())
    tokens = resolved.corpus.store(store, pool)  # type: ignore[union-attr]  # the inputs of a module
    pool.shutdown()
    grid = Grid.of(resolved.plan, tokens)
    for layout in grid.block_arrays():
        publish_metadata(store, layout)
    return store, grid, resolved


@contextmanager
def _awake() -> Iterator[None]:
    """No sleep."""
    global SLEEP
    before, SLEEP = SLEEP, 0.0
    try:
        yield
    finally:
        SLEEP = before
