"""Replay: a few stored sequences, drawn by the dataset's key, run through the model once more and compared."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch

from actcache.cache.quantise import QuantisedReader
from actcache.cache.reader import ArrayReader
from actcache.cache.store import Store
from actcache.jobs.capture import run
from actcache.jobs.model import to_numpy
from actcache.jobs.parts import ModelParts
from actcache.jobs.proof import relative_error, tolerance
from actcache.schemas.dtypes import numpy_dtype
from actcache.schemas.errors import ProofFailed
from actcache.schemas.grid import Grid
from actcache.schemas.quantised import error_bound, quantised_layouts
from actcache.schemas.root import ReplayResult

SEQUENCES = 4


def replay(store: Store, grid: Grid, parts: ModelParts, sequence_start: np.ndarray) -> ReplayResult:
    """Run each sequence alone, without padding, and compare every site with what is stored, in every form.

    A quantised form may differ by what quantising can do to any vector, beside rounding. The result tells of the exact
    arrays, where they are stored, else of the first kind of quantised ones.

    Raises:
        ProofFailed: an error is beyond what rounding explains; the message names site and sequence.
        Corrupt: a stored shard is not what was written.
    """
    spec = grid.plan.spec
    rng = random.Random(grid.plan.key)
    drawn = sorted(rng.sample(range(grid.n_sequences), min(SEQUENCES, grid.n_sequences)))
    tokens = ArrayReader(store, grid.token_arrays()["token_id"])
    rounding = tolerance(spec.execution.compute_dtype, grid.plan.model.n_layers)
    limit = rounding + 2 * float(torch.finfo(getattr(torch, spec.stored_dtype)).eps)
    readers = _readers(store, grid, limit, rounding)
    worst, told = 0.0, readers[0].limit
    for sequence in drawn:
        start, stop = int(sequence_start[sequence]), int(sequence_start[sequence + 1])
        ids = torch.from_numpy(tokens.read(start, stop).astype(np.int64))[None]
        states: dict[str, np.ndarray] = {}

        def keep(site: str, tensor: torch.Tensor, states: dict[str, np.ndarray] = states) -> None:
            states[site] = to_numpy(tensor[0])

        run(parts, ids.to(parts.device), torch.ones_like(ids).to(parts.device), spec.sites, keep)
        for stored in readers:
            error = relative_error(_wide(stored.reader.read(start, stop)), _wide(states[stored.site]))
            worst = max(worst, error) if stored.limit == told else worst
            if not error <= stored.limit:
                raise ProofFailed(
                    f"{stored.name}, sequence {sequence}: the replay differs from what is stored by {error:.3g} "
                    f"(tolerance {stored.limit:.3g}); "
                    "not sealed; the dataset was computed on broken hardware or with another model"
                )
    return ReplayResult(status="replayed", sequences=tuple(drawn), largest_relative_error=worst, tolerance=told)


@dataclass(frozen=True)
class _Stored:
    """A stored form of a site, and by how much it may differ from a replay."""

    name: str
    site: str
    reader: ArrayReader | QuantisedReader
    limit: float


def _readers(store: Store, grid: Grid, limit: float, rounding: float) -> list[_Stored]:
    """Every form of every site; the exact ones, where they are stored, come first."""
    found = [_Stored(site, site, ArrayReader(store, grid.site(site)), limit) for site in grid.exact_sites]
    asked = grid.plan.spec.quantize
    for kind in asked.kinds if asked is not None else ():
        for site in grid.plan.spec.sites:
            assert asked is not None
            codes, scales = (
                ArrayReader(store, layout) for layout in quantised_layouts(grid.site(site), kind, asked.group)
            )
            reader = QuantisedReader(codes, scales, kind, asked.group)
            found.append(_Stored(codes.layout.name, site, reader, rounding + error_bound(kind, asked.group)))
    return found


def _wide(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rows.astype(np.float32) if rows.dtype == numpy_dtype("bfloat16") else rows)
