"""Carrying out a plan: tokenise, blocks, replay, seal. This half of a build needs torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from actcache.cache.added import generation_of, seal_added
from actcache.cache.publish import publish, publish_array, publish_document, publish_metadata
from actcache.cache.reader import ArrayReader
from actcache.cache.roots import newest_root
from actcache.cache.seal import NOT_REPLAYED, Sealed, environments_of, head_layout, seal
from actcache.cache.store import Store
from actcache.jobs.batches import TokenBatch, recomputed_fraction
from actcache.jobs.blocks import BlockRunner
from actcache.jobs.determinism import deterministic
from actcache.jobs.encode import load_tokenizer
from actcache.jobs.environment import environment
from actcache.jobs.feeds import Feed, ItemFeed, TokenFeed
from actcache.jobs.head import head_parts
from actcache.jobs.items import Items
from actcache.jobs.model import load_model
from actcache.jobs.parts import ModelParts
from actcache.jobs.pending import PendingBlocks
from actcache.jobs.pool import BoundedPool
from actcache.jobs.progress import Progress, Reporter
from actcache.jobs.proof import prove, prove_sites
from actcache.jobs.replay import replay
from actcache.jobs.resolve import Chosen, Resolved
from actcache.jobs.tokenise import tokenise
from actcache.schemas.array import head_group
from actcache.schemas.canonical import canonical, sha256
from actcache.schemas.grid import Grid
from actcache.schemas.plan import StoredObject, TokensRecord
from actcache.schemas.receipt import HEAD_RECEIPT, HeadArray, HeadReceipt
from actcache.schemas.root import ROOT_KEY
from actcache.schemas.sites import MODULE

RECOMPUTED_WARNING = 0.03
PROVED_ALONE = 3


@dataclass(frozen=True)
class Outcome:
    """What a run did."""

    sealed: Sealed | None
    blocks_run: int
    bytes_written: int
    recomputed: float


@deterministic()
def run_plan(store: Store, resolved: Resolved, reporter: Reporter, tokenise_only: bool = False) -> Outcome:
    """Carry out a plan that is in place, from wherever it stands.

    Raises:
        ActcacheError: whatever stops it; running again resumes.
    """
    began = datetime.now(UTC)
    plan = resolved.plan
    pool = BoundedPool()
    try:
        reporter.progress(Progress("tokenise"))
        tokens = _tokens(store, resolved, pool, reporter)
        grid = Grid.of(plan, tokens)
        if tokenise_only:
            return Outcome(None, 0, 0, _recomputed(grid, _sequence_start(store, grid)))
        return _capture(store, grid, resolved, reporter, pool, began)
    finally:
        pool.shutdown(cancel_futures=True)


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
    )


@deterministic()
def run_added(store: Store, grid: Grid, chosen: Chosen, reporter: Reporter) -> Outcome:
    """Carry out an added build that has claimed its names, from wherever it stands. The tokens are there.

    Raises:
        ActcacheError: whatever stops it; running again resumes.
    """
    began = datetime.now(UTC)
    pool = BoundedPool()
    try:
        return _capture(store, grid, chosen, reporter, pool, began)
    finally:
        pool.shutdown(cancel_futures=True)


def _capture(
    store: Store, grid: Grid, chosen: Chosen, reporter: Reporter, pool: BoundedPool, began: datetime
) -> Outcome:
    """Run the blocks of a grid, replay and seal."""
    sequence_start = _sequence_start(store, grid)
    recomputed = _recomputed(grid, sequence_start)
    if recomputed > RECOMPUTED_WARNING:
        reporter.note(
            f"{recomputed:.1%} more tokens are run than stored, since sequences cross blocks of {grid.block_tokens} tokens; "
            "larger blocks (--block-tokens) cost less"
        )
    parts = loaded_parts(chosen)
    feed = feed_of(store, grid, chosen, sequence_start, parts)
    runner = BlockRunner(store, grid, parts, feed, pool)
    for layout in grid.block_arrays():
        publish_metadata(store, layout)
    _prepare(store, grid, parts, feed, pool)
    blocks = PendingBlocks(store, grid, runner, reporter)
    blocks.run()
    result = NOT_REPLAYED
    if not _is_sealed(store, grid):
        reporter.progress(replace(blocks.state, stage="replay"))
        result = replay(store, grid, parts, feed, sequence_start)
    reporter.progress(replace(blocks.state, stage="seal"))
    sealed = seal_added(store, pool, grid, result, began) if grid.number else seal(store, pool, result, began)
    return Outcome(sealed, blocks.count, blocks.state.bytes_written, recomputed)


def _sequence_start(store: Store, grid: Grid) -> np.ndarray:
    return ArrayReader(store, grid.token_arrays()["sequence_start"]).read()


def _recomputed(grid: Grid, sequence_start: np.ndarray) -> float:
    return recomputed_fraction(sequence_start, grid.n_tokens, grid.block_tokens)


def _is_sealed(store: Store, grid: Grid) -> bool:
    """Whether another build sealed the same meanwhile."""
    if grid.number == 0:
        return store.get_or_none(ROOT_KEY) is not None
    return generation_of(newest_root(store).attributes, grid.plan.key) is not None


def loaded_parts(chosen: Chosen) -> ModelParts:
    """The model of a plan, loaded.

    Raises:
        InvalidInput: it cannot be loaded, or its files are no longer those of the plan.
    """
    spec, model = chosen.plan.spec, chosen.studied.model
    if model is None:
        execution = spec.execution
        model, _ = load_model(chosen.source.folder, spec.model.family, execution.compute_dtype, execution.attention)
    chosen.check_model()
    return ModelParts(model, chosen.studied.anatomy)


def _tokenizer(resolved: Resolved) -> Any:
    if resolved.plan.spec.tokenizer is None:
        return None
    tokenizer = load_tokenizer(resolved.source.folder)
    resolved.check_tokenizer()
    return tokenizer


def feed_of(store: Store, grid: Grid, chosen: Chosen, sequence_start: np.ndarray, parts: ModelParts) -> Feed:
    """Where the inputs of a plan come from: the stored tokens, or the items of a user's own module."""
    items = chosen.source.items()
    if items is not None:
        return ItemFeed(items, grid, parts.device)
    return TokenFeed(store, grid, sequence_start, parts.device)


def _prepare(store: Store, grid: Grid, parts: ModelParts, feed: Feed, pool: BoundedPool) -> None:
    """Prove the tensors, record the environment and store the head."""
    spec = grid.plan.spec
    record = canonical(environment(parts, spec, _proof(grid, parts, feed)))
    publish(store, f"{environments_of(grid.records)}{sha256(record)}.json", record)
    if not spec.head or grid.number or store.get_or_none(HEAD_RECEIPT) is not None:
        return
    head = head_parts(parts)
    stored: list[StoredObject] = [publish_document(store, "head/zarr.json", head_group(head.operations))]
    arrays = {}
    for name, array in head.arrays.items():
        layout = head_layout(name, array.shape, array.dtype.name)
        stored += publish_array(store, layout, array, pool)
        arrays[name] = HeadArray(shape=array.shape, dtype=layout.dtype)
    publish(
        store, HEAD_RECEIPT, HeadReceipt(arrays=arrays, operations=head.operations, objects=tuple(stored)).to_bytes()
    )


def _proof(grid: Grid, parts: ModelParts, feed: Feed) -> dict[str, float]:
    """The errors of the identities that the first batch must satisfy."""
    first, dtype = feed.batches(*grid.block_range(0))[0], grid.plan.spec.execution.compute_dtype
    if isinstance(first, TokenBatch) and parts.anatomy.head:
        modules = [site for site in grid.plan.spec.sites if site.startswith(MODULE)]
        return prove(parts, first.input_ids, first.attention_mask, dtype, modules)
    alone = [feed.alone(sequence) for sequence in first.sequences[:PROVED_ALONE]]
    return prove_sites(parts, grid.plan.spec.sites, feed.inputs(first), alone, dtype)
