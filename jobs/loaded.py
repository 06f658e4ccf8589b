"""A plan made ready to run in this process: the model, its inputs, and the proof that its tensors are what they should be."""

from __future__ import annotations

import numpy as np

from actcache.cache.store import Store
from actcache.jobs.batches import TokenBatch
from actcache.jobs.compiled import compile_proven
from actcache.jobs.feeds import Feed, ItemFeed, TokenFeed
from actcache.jobs.model import load_model
from actcache.jobs.parts import ModelParts
from actcache.jobs.proof import prove, prove_sites
from actcache.jobs.resolve import Chosen
from actcache.schemas.grid import Grid
from actcache.schemas.sites import MODULE

PROVED_ALONE = 3


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


def feed_of(store: Store, grid: Grid, chosen: Chosen, sequence_start: np.ndarray, parts: ModelParts) -> Feed:
    """Where the inputs of a plan come from: the stored tokens, or the items of a user's own module."""
    items = chosen.source.items()
    if items is not None:
        return ItemFeed(items, grid, parts.device)
    return TokenFeed.stored(store, grid, sequence_start, parts.device)


def make_ready(grid: Grid, parts: ModelParts, feed: Feed) -> dict[str, float]:
    """Prove on the first batch that the tensors are what they should be, and compile the blocks where the plan says so.

    Returns the errors of the identities.

    Raises:
        ProofFailed: one does not hold.
        Unsupported: the blocks cannot be compiled.
    """
    errors = _proof(grid, parts, feed)
    if grid.plan.spec.execution.compile:
        inputs = feed.inputs(feed.batches(*grid.block_range(0))[0])
        errors["compiled"] = compile_proven(parts, grid.plan.spec.sites, inputs, grid.plan.spec.execution.compute_dtype)
    return errors


def _proof(grid: Grid, parts: ModelParts, feed: Feed) -> dict[str, float]:
    """The errors of the identities that the first batch must satisfy."""
    first, dtype = feed.batches(*grid.block_range(0))[0], grid.plan.spec.execution.compute_dtype
    if isinstance(first, TokenBatch) and parts.anatomy.head:
        modules = [site for site in grid.plan.spec.sites if site.startswith(MODULE)]
        return prove(parts, first.input_ids, first.attention_mask, dtype, modules)
    alone = [feed.alone(sequence) for sequence in first.sequences[:PROVED_ALONE].tolist()]
    return prove_sites(parts, grid.plan.spec.sites, feed.inputs(first), alone, dtype)
