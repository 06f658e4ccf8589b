"""A plan made ready to run in this process: the model, its inputs, and the proof that its tensors are what they should be."""

from __future__ import annotations

from actcache.cache.store import Store
from actcache.jobs.batches import Batch, TokenBatch
from actcache.jobs.compiled import compile_proven
from actcache.jobs.feeds import Feed, ReadTokens, token_ids
from actcache.jobs.items import Items
from actcache.jobs.model import load_model
from actcache.jobs.parts import ModelParts
from actcache.jobs.proof import prove, prove_sites
from actcache.jobs.resolve import Chosen
from actcache.schemas.grid import Grid
from actcache.schemas.sites import MODULE
from actcache.schemas.spec import ResolvedSpec

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


def inputs_of(store: Store, grid: Grid, chosen: Chosen) -> Items | ReadTokens:
    """The inputs of a plan: the stored tokens, or the items of a user's own module."""
    items = chosen.source.items()
    return token_ids(store, grid) if items is None else items


def make_ready(grid: Grid, parts: ModelParts, feed: Feed) -> dict[str, float]:
    """Prove on the first batch that the tensors are what they should be, and compile the blocks where the plan says so.

    Returns the errors of the identities.

    Raises:
        ProofFailed: one does not hold.
        Unsupported: the blocks cannot be compiled.
    """
    spec, first = grid.plan.spec, feed.batches(*grid.block_range(0))[0]
    errors = _proof(spec, parts, feed, first)
    if spec.execution.compile:
        errors["compiled"] = compile_proven(parts, spec.sites, feed.inputs(first), spec.execution.compute_dtype)
    return errors


def _proof(spec: ResolvedSpec, parts: ModelParts, feed: Feed, first: Batch) -> dict[str, float]:
    """The errors of the identities that the first batch must satisfy."""
    dtype = spec.execution.compute_dtype
    if isinstance(first, TokenBatch) and parts.anatomy.head:
        modules = [site for site in spec.sites if site.startswith(MODULE)]
        return prove(parts, first.input_ids, first.attention_mask, dtype, modules)
    alone = [feed.alone(sequence) for sequence in first.sequences[:PROVED_ALONE].tolist()]
    return prove_sites(parts, spec.sites, feed.inputs(first), alone, dtype)
