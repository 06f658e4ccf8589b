"""Carrying out a plan: tokenise, blocks, replay, seal. This half of a build needs torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from actcache.cache.added import generation_of, seal_added
from actcache.cache.publish import publish, publish_metadata
from actcache.cache.reader import ArrayReader
from actcache.cache.roots import newest_root
from actcache.cache.seal import NOT_REPLAYED, Sealed, seal
from actcache.cache.store import Store
from actcache.jobs.encode import load_tokenizer
from actcache.jobs.engine import Engine, in_process
from actcache.jobs.forecast import Counted, Forecast, counted, forecast
from actcache.jobs.grouping import recomputed_fraction
from actcache.jobs.items import Items
from actcache.jobs.memory_plan import batch_positions
from actcache.jobs.options import RunOptions
from actcache.jobs.pending import PendingBlocks
from actcache.jobs.pool import BoundedPool
from actcache.jobs.prices import load_prices
from actcache.jobs.progress import Progress, Reporter
from actcache.jobs.resolve import Chosen, Resolved
from actcache.jobs.tokenise import tokenise
from actcache.jobs.tokenizer_files import tokenizer_files
from actcache.jobs.torch_half import torch_half
from actcache.jobs.worker import Job, Worker
from actcache.schemas.canonical import canonical
from actcache.schemas.grid import Grid
from actcache.schemas.part import parts_of
from actcache.schemas.plan import TokensRecord
from actcache.schemas.root import ROOT_KEY
from actcache.schemas.tokenizer import MAX_FILE_BYTES, files_among

RECOMPUTED_WARNING = 0.03
SAMPLED_PART = 32
"""A sample is at most about this part of a build, or one context."""


@dataclass(frozen=True)
class Outcome:
    """What a run of the build of a key did. `blocks` are those that it was to see stored: all, or a part's."""

    key: str
    sealed: Sealed | None
    blocks_run: int = 0
    bytes_written: int = 0
    recomputed: float = 0.0
    blocks: range = range(0)


def run_plan(store: Store, resolved: Resolved, reporter: Reporter, options: RunOptions) -> Outcome:
    """Carry out a plan that is in place, from wherever it stands.

    Raises:
        ActcacheError: whatever stops it; running again resumes.
    """
    began = datetime.now(UTC)
    with _threads() as pool:
        reporter.progress(Progress("tokenise"))
        tokens = _tokens(store, resolved, pool, reporter)
        grid = Grid.of(resolved.plan, tokens)
        if options.stop_after == "tokenise":
            return Outcome(grid.plan.key, None, recomputed=_recomputed(grid, _sequence_start(store, grid)))
        sizes = tuple(file.size for file in files_among(tokens.objects))
        return _capture(store, grid, resolved, reporter, options, pool, began, sizes)


def run_added(store: Store, grid: Grid, chosen: Chosen, reporter: Reporter, options: RunOptions) -> Outcome:
    """Carry out an added build that has claimed its names, from wherever it stands. The tokens are there.

    Raises:
        ActcacheError: whatever stops it; running again resumes.
    """
    began = datetime.now(UTC)
    with _threads() as pool:
        return _capture(store, grid, chosen, reporter, options, pool, began)


def _tokens(store: Store, resolved: Resolved, pool: BoundedPool, reporter: Reporter) -> TokensRecord:
    """The token axis, stored."""
    if isinstance(resolved.corpus, Items):
        return resolved.corpus.store(store, pool)
    return tokenise(
        store,
        resolved.plan,
        resolved.corpus,
        lambda: _tokenizer(resolved),
        pool,
        lambda count: reporter.progress(Progress("tokenise", count)),
        reporter.note,
        lambda tokenizer: _files(resolved, tokenizer, reporter),
    )


def _capture(
    store: Store,
    grid: Grid,
    chosen: Chosen,
    reporter: Reporter,
    options: RunOptions,
    pool: BoundedPool,
    began: datetime,
    tokenizer: tuple[int, ...] = (),
) -> Outcome:
    """Run the blocks of a grid, replay and seal; of a part, the blocks alone. `tokenizer` are the sizes of its stored files."""
    reporter.event("build", url=store.location.url, key=grid.plan.key, tokens=grid.n_tokens, blocks=grid.n_blocks)
    sequence_start = _sequence_start(store, grid)
    recomputed = _recomputed(grid, sequence_start)
    if recomputed > RECOMPUTED_WARNING:
        reporter.note(
            f"{recomputed:.1%} more tokens are run than stored, since sequences cross blocks of {grid.block_tokens} tokens; "
            "larger blocks (--block-tokens) cost less"
        )
    for layout in grid.block_arrays():
        publish_metadata(store, layout)
    if options.part is not None:
        publish(store, f"{parts_of(grid.records)}{options.part.of}.json", canonical({"parts": options.part.of}))
    blocks = PendingBlocks(store, grid, options.part, reporter)
    result = NOT_REPLAYED
    with _engine(store, grid, chosen, reporter, options) as engine:
        if blocks:
            reporter.forecast(_forecast(grid, counted(sequence_start, tokenizer), engine, blocks.tokens_left))
        blocks.run(engine)
        if options.part is None and not _is_sealed(store, grid):
            reporter.progress(replace(blocks.state, stage="replay"))
            result = engine.replay()
    outcome = Outcome(grid.plan.key, None, blocks.count, blocks.state.bytes_written, recomputed, blocks.blocks)
    if options.part is not None:
        return outcome
    reporter.progress(replace(blocks.state, stage="seal"))
    sealed = seal_added(store, pool, grid, result, began) if grid.number else seal(store, pool, result, began)
    reporter.event("sealed", manifest=sealed.root.attributes.generations[-1].manifest, by_us=sealed.by_us)
    return replace(outcome, sealed=sealed)


def _forecast(grid: Grid, known: Counted, engine: Engine, left: int) -> Forecast:
    """What the build will take for the tokens that are left, from a sample that is small beside them."""
    limit = min(batch_positions(grid.plan), max(grid.plan.spec.context, left // SAMPLED_PART))
    found = engine.sample(limit)
    return forecast(grid, known, found, max(1, engine.workers), load_prices(), left=left)


@contextmanager
def _engine(store: Store, grid: Grid, chosen: Chosen, reporter: Reporter, options: RunOptions) -> Iterator[Engine]:
    """What runs the blocks. No model is loaded before the first block, or the replay, asks for it."""
    if not options.cluster.wanted:
        with in_process(lambda: Worker(store, grid, chosen)) as engine:
            yield engine
        return
    job = Job(store.location, grid, chosen.source.reference, chosen.source.revision, chosen.studied.anatomy)
    with torch_half("cluster").on_cluster(job, options.cluster, reporter) as engine:
        yield engine


@contextmanager
def _threads() -> Iterator[BoundedPool]:
    pool = BoundedPool()
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _sequence_start(store: Store, grid: Grid) -> np.ndarray:
    return ArrayReader(store, grid.token_arrays()["sequence_start"]).read()


def _recomputed(grid: Grid, sequence_start: np.ndarray) -> float:
    return recomputed_fraction(sequence_start, grid.n_tokens, grid.block_tokens)


def _is_sealed(store: Store, grid: Grid) -> bool:
    """Whether another build sealed the same meanwhile."""
    if grid.number == 0:
        return store.get_or_none(ROOT_KEY) is not None
    return generation_of(newest_root(store).attributes, grid.plan.key) is not None


def _tokenizer(resolved: Resolved) -> Any:
    if resolved.plan.spec.tokenizer is None:
        return None
    tokenizer = load_tokenizer(resolved.source.folder)
    resolved.check_tokenizer()
    return tokenizer


def _files(resolved: Resolved, tokenizer: Any, reporter: Reporter) -> dict[str, bytes]:
    """What is stored of the tokenizer, which is that of the plan."""
    if tokenizer is None:
        return {}
    files = tokenizer_files(resolved.source.folder, tokenizer)
    resolved.check_tokenizer()
    if not files:
        reporter.note(f"the tokenizer is not stored: one of its files has more than {MAX_FILE_BYTES >> 20} MiB")
    return files
