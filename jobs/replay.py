"""Replay: a few stored sequences, drawn by the dataset's key, run through the model once more and compared."""

from __future__ import annotations

import random

import numpy as np
import torch

from actcache.cache.reader import ArrayReader
from actcache.cache.store import Store
from actcache.jobs.capture import run
from actcache.jobs.head import to_numpy
from actcache.jobs.parts import ModelParts
from actcache.jobs.proof import relative_error, tolerance
from actcache.schemas.dtypes import numpy_dtype
from actcache.schemas.errors import ProofFailed
from actcache.schemas.grid import Grid
from actcache.schemas.root import ReplayResult

SEQUENCES = 4


def replay(store: Store, grid: Grid, parts: ModelParts, sequence_start: np.ndarray) -> ReplayResult:
    """Run each sequence alone, without padding, and compare every site with what is stored.

    Raises:
        ProofFailed: an error is beyond what rounding explains; the message names site and sequence.
        Corrupt: a stored shard is not what was written.
    """
    spec = grid.plan.spec
    rng = random.Random(grid.plan.key)
    drawn = sorted(rng.sample(range(grid.n_sequences), min(SEQUENCES, grid.n_sequences)))
    tokens = ArrayReader(store, grid.token_arrays()["token_id"])
    readers = {site: ArrayReader(store, grid.site(site)) for site in spec.sites}
    rounding = tolerance(spec.execution.compute_dtype, grid.plan.model.n_layers)
    limit = rounding + 2 * float(torch.finfo(getattr(torch, spec.stored_dtype)).eps)
    worst = 0.0
    for sequence in drawn:
        start, stop = int(sequence_start[sequence]), int(sequence_start[sequence + 1])
        ids = torch.from_numpy(tokens.read(start, stop).astype(np.int64))[None]
        states: dict[str, np.ndarray] = {}

        def keep(site: str, tensor: torch.Tensor, states: dict[str, np.ndarray] = states) -> None:
            states[site] = to_numpy(tensor[0])

        run(parts, ids.to(parts.device), torch.ones_like(ids).to(parts.device), spec.sites, keep)
        for site, reader in readers.items():
            there = _wide(reader.read(start, stop))
            error = relative_error(there, _wide(states[site]))
            worst = max(worst, error)
            if not error <= limit:
                raise ProofFailed(
                    f"{site}, sequence {sequence}: the replay differs from what is stored by {error:.3g} (tolerance {limit:.3g}); "
                    "not sealed; the dataset was computed on broken hardware or with another model"
                )
    return ReplayResult(status="replayed", sequences=tuple(drawn), largest_relative_error=worst, tolerance=limit)


def _wide(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rows.astype(np.float32) if rows.dtype == numpy_dtype("bfloat16") else rows)
