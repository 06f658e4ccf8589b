"""Replay: a few stored sequences, drawn by the dataset's key, run through the model once more and compared."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from actcache.cache.quantise import QuantisedReader
from actcache.cache.reader import ArrayReader
from actcache.cache.store import Store
from actcache.jobs.capture import read_sites
from actcache.jobs.feeds import Feed
from actcache.jobs.head import to_numpy
from actcache.jobs.parts import ModelParts
from actcache.jobs.proof import relative_error, tolerance
from actcache.schemas.dtypes import numpy_dtype
from actcache.schemas.errors import ProofFailed
from actcache.schemas.grid import Grid
from actcache.schemas.quantised import error_bound, quantised_layouts
from actcache.schemas.receipt import Receipt, receipt_key
from actcache.schemas.root import ReplayResult

SEQUENCES = 4


def replay(store: Store, grid: Grid, parts: ModelParts, feed: Feed, sequence_start: np.ndarray) -> ReplayResult:
    """Run each sequence alone, without padding, and compare every site with what is stored, in every form.

    A quantised form may differ by the damage that its blocks' receipts record, beside rounding, and never by more than quantising
    can do to any vector. The result tells of the exact arrays, where they are stored, else of the quantised ones.

    Raises:
        ProofFailed: an error is beyond what rounding explains; the message names site and sequence.
        Corrupt: a stored shard is not what was written.
    """
    spec = grid.plan.spec
    rng = random.Random(grid.plan.key)
    drawn = sorted(rng.sample(range(grid.n_sequences), min(SEQUENCES, grid.n_sequences)))
    forms = forms_of(store, grid)
    worst, told = 0.0, 0.0
    for sequence in drawn:
        start, stop = int(sequence_start[sequence]), int(sequence_start[sequence + 1])
        states = read_sites(parts, feed.alone(sequence), spec.sites)
        receipts = receipts_of_tokens(store, grid, start, stop)
        for form in forms:
            error = relative_error(wide(form.reader.read(start, stop)), wide(to_numpy(states[form.site][0])))
            limit = limit_of(form, grid, receipts)
            if form.bound is None or not grid.exact_sites:
                worst, told = max(worst, error), max(told, limit)
            if not error <= limit:
                raise ProofFailed(
                    f"{form.name}, sequence {sequence}: the replay differs from what is stored by {error:.3g} "
                    f"(tolerance {limit:.3g}); "
                    "not sealed; the dataset was computed on broken hardware or with another model"
                )
    return ReplayResult(status="replayed", sequences=tuple(drawn), largest_relative_error=worst, tolerance=told)


@dataclass(frozen=True)
class Form:
    """A stored form of a site; of a quantised one the largest relative error that quantising can cause."""

    name: str
    site: str
    reader: ArrayReader | QuantisedReader
    bound: float | None = None


def forms_of(store: Store, grid: Grid) -> list[Form]:
    """Every form in which a build's sites are stored."""
    return [*_exact(store, grid), *_quantised(store, grid)]


def _exact(store: Store, grid: Grid) -> Iterator[Form]:
    for site in grid.exact_sites:
        yield Form(site, site, ArrayReader(store, grid.site(site)))


def _quantised(store: Store, grid: Grid) -> Iterator[Form]:
    asked = grid.plan.spec.quantize
    if asked is None:
        return
    for site in grid.plan.spec.sites:
        for kind in asked.kinds:
            layouts = quantised_layouts(grid.site(site), kind, asked.group)
            codes, scales = (ArrayReader(store, layout) for layout in layouts)
            reader = QuantisedReader(codes, scales, kind, asked.group)
            yield Form(codes.layout.name, site, reader, error_bound(kind, asked.group))


def receipts_of_tokens(store: Store, grid: Grid, start: int, stop: int) -> list[Receipt]:
    """The receipts of the blocks that hold tokens [start, stop), which tell of quantising; none where nothing is quantised."""
    if grid.plan.spec.quantize is None:
        return []
    blocks = range(start // grid.block_tokens, (stop - 1) // grid.block_tokens + 1)
    keys = [receipt_key(block, grid.records) for block in blocks]
    return [Receipt.from_bytes(bytes(store.get(key)), str(store.location.child(key))) for key in keys]


def limit_of(form: Form, grid: Grid, receipts: list[Receipt]) -> float:
    """By how much a stored form may differ from what the model computes again, as a ratio of norms.

    Rounding r of the computation and of the stored dtype; of a quantised form the damage too: with ‖x - q‖ ≤ e ‖x‖ recorded and
    ‖x - x'‖ ≤ r ‖x'‖, ‖q - x'‖ ≤ (e (1 + r) + r) ‖x'‖; twice r, since what is stored may be of an attempt on other hardware
    than what is recorded.
    """
    spec = grid.plan.spec
    rounding = tolerance(spec.execution.compute_dtype, grid.plan.model.n_layers)
    if form.bound is None:
        return rounding + 2 * float(torch.finfo(getattr(torch, spec.stored_dtype)).eps)
    recorded = [receipt.quantised[form.name].largest for receipt in receipts if form.name in receipt.quantised]
    return min(form.bound, max(recorded, default=form.bound)) * (1 + 2 * rounding) + 2 * rounding


def wide(rows: np.ndarray) -> torch.Tensor:
    """Rows as a tensor; bfloat16, which torch cannot take from numpy, as float32."""
    return torch.from_numpy(rows.astype(np.float32) if rows.dtype == numpy_dtype("bfloat16") else rows)
