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
from actcache.jobs.capture import run
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


def replay(store: Store, grid: Grid, parts: ModelParts, sequence_start: np.ndarray) -> ReplayResult:
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
    tokens = ArrayReader(store, grid.token_arrays()["token_id"])
    rounding = tolerance(spec.execution.compute_dtype, grid.plan.model.n_layers)
    exact = rounding + 2 * float(torch.finfo(getattr(torch, spec.stored_dtype)).eps)
    forms = [*_exact(store, grid), *_quantised(store, grid)]
    worst, told = 0.0, 0.0
    for sequence in drawn:
        start, stop = int(sequence_start[sequence]), int(sequence_start[sequence + 1])
        ids = torch.from_numpy(tokens.read(start, stop).astype(np.int64))[None]
        states: dict[str, np.ndarray] = {}

        def keep(site: str, tensor: torch.Tensor, states: dict[str, np.ndarray] = states) -> None:
            states[site] = to_numpy(tensor[0])

        run(parts, ids.to(parts.device), torch.ones_like(ids).to(parts.device), spec.sites, keep)
        receipts = _receipts(store, grid, start, stop) if spec.quantize is not None else []
        for form in forms:
            error = relative_error(_wide(form.reader.read(start, stop)), _wide(states[form.site]))
            limit = exact if form.bound is None else _damaged(form, receipts, rounding)
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
class _Form:
    """A stored form of a site; of a quantised one the largest relative error that quantising can cause."""

    name: str
    site: str
    reader: ArrayReader | QuantisedReader
    bound: float | None = None


def _exact(store: Store, grid: Grid) -> Iterator[_Form]:
    for site in grid.exact_sites:
        yield _Form(site, site, ArrayReader(store, grid.site(site)))


def _quantised(store: Store, grid: Grid) -> Iterator[_Form]:
    asked = grid.plan.spec.quantize
    if asked is None:
        return
    for site in grid.plan.spec.sites:
        for kind in asked.kinds:
            layouts = quantised_layouts(grid.site(site), kind, asked.group)
            codes, scales = (ArrayReader(store, layout) for layout in layouts)
            reader = QuantisedReader(codes, scales, kind, asked.group)
            yield _Form(codes.layout.name, site, reader, error_bound(kind, asked.group))


def _receipts(store: Store, grid: Grid, start: int, stop: int) -> list[Receipt]:
    """The receipts of the blocks that hold tokens [start, stop)."""
    blocks = range(start // grid.block_tokens, (stop - 1) // grid.block_tokens + 1)
    keys = [receipt_key(block, grid.records) for block in blocks]
    return [Receipt.from_bytes(bytes(store.get(key)), str(store.location.child(key))) for key in keys]


def _damaged(form: _Form, receipts: list[Receipt], rounding: float) -> float:
    """By how much a quantised form may differ from a replay.

    With ‖x - q‖ ≤ e ‖x‖ recorded and ‖x - x'‖ ≤ r ‖x'‖ from rounding, ‖q - x'‖ ≤ (e (1 + r) + r) ‖x'‖; twice r, since what is stored
    may be of an attempt on other hardware than what is recorded.
    """
    assert form.bound is not None
    recorded = [receipt.quantised[form.name].largest for receipt in receipts if form.name in receipt.quantised]
    return min(form.bound, max(recorded, default=form.bound)) * (1 + 2 * rounding) + 2 * rounding


def _wide(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rows.astype(np.float32) if rows.dtype == numpy_dtype("bfloat16") else rows)
