"""Quantising a block's sites while the forward passes go on, and measuring what that costs."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np

from actcache.cache.damage import Errors, block_damage, divergences, sample
from actcache.cache.encoder import Placement, ShardEncoder
from actcache.cache.head import Head
from actcache.cache.quantise import dequantise, quantise
from actcache.jobs.transfer import Taken
from actcache.schemas.grid import Grid
from actcache.schemas.quantised import BlockDamage, Kind, quantised_name, scale_name
from actcache.schemas.sites import is_residual

VALUES_AT_ONCE = 1 << 16
"""Values that are quantised at once: with what is made of them they fit a core's cache."""


@dataclass(frozen=True)
class Portion:
    """A portion of a site's rows, quantised; of its sampled tokens the values, and what came back of them."""

    codes: np.ndarray
    scales: np.ndarray
    errors: Errors
    sampled: np.ndarray
    back: np.ndarray


class QuantisedEncoder:
    """Quantises and encodes the sites of one block. Empty where the spec asks for none."""

    def __init__(self, grid: Grid, start: int, stop: int, pool: Executor) -> None:
        self._pool = pool
        self._grid = grid
        self._sample = sample(start, stop)
        self._encoders = {layout.name: ShardEncoder(layout, pool) for layout in grid.quantised.values()}
        self._waiting: deque[tuple[str, Kind, Placement, Future[Portion]]] = deque()
        self._errors: dict[str, list[Errors]] = {}
        self._sampled: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}

    @property
    def wants_computed(self) -> bool:
        """Whether it takes the values as computed, also where they are stored narrower."""
        return self._grid.plan.spec.quantize is not None

    def append(self, site: str, tokens: np.ndarray, placement: Placement, taken: Taken) -> list[Future[Portion]]:
        """Add rows of a site as computed, (n, width), any floating-point dtype; row i is that of token `tokens[i]`.

        They must not change before the futures that are returned are done.
        """
        asked = self._grid.plan.spec.quantize
        if asked is None:
            return []
        sampled = np.flatnonzero(np.isin(tokens, self._sample)) if is_residual(site) else self._sample[:0]
        portions = [self._pool.submit(quantise_portion, taken, kind, asked.group, sampled) for kind in asked.kinds]
        for kind, portion in zip(asked.kinds, portions, strict=True):
            self._waiting.append((site, kind, placement, portion))
        return portions

    def drain(self, wait: bool = False) -> None:
        """Hand what is quantised to the encoders, in order: what is done by now, or everything."""
        while self._waiting and (wait or self._waiting[0][3].done()):
            site, kind, placement, future = self._waiting.popleft()
            portion = future.result()
            name = quantised_name(site, kind)
            self._encoders[name].place(placement, portion.codes)
            self._encoders[scale_name(site, kind)].place(placement, portion.scales)
            self._errors.setdefault(name, []).append(portion.errors)
            self._sampled.setdefault(name, []).append((portion.sampled, portion.back))

    def finish(self, name: str) -> memoryview:
        """The bytes of an array's shard. Call it after `drain(wait=True)`."""
        return self._encoders.pop(name).finish()

    def damage(self, head: Head | None) -> dict[str, BlockDamage]:
        """The record of each quantised array. Call it after `drain(wait=True)`, on one thread alone.

        Linear algebra that several threads ask for at once may be cut differently, and then differs in its last bits.
        """
        asked = self._grid.plan.spec.quantize
        found: dict[str, BlockDamage] = {}
        if asked is None:
            return found
        for site in self._grid.plan.spec.sites:
            names = {kind: quantised_name(site, kind) for kind in asked.kinds}
            kl: dict[str, np.ndarray] = {}
            if head is not None and is_residual(site):
                values = np.concatenate([part for part, _ in self._sampled[names[asked.kinds[0]]]])
                forms = {n: np.concatenate([back for _, back in self._sampled[n]]) for n in names.values()}
                kl = divergences(head, values, forms)
            found |= {name: block_damage(self._errors[name], kl.get(name)) for name in names.values()}
        return found


def quantise_portion(taken: Taken, kind: Kind, group: int, sampled: np.ndarray) -> Portion:
    """Quantise rows (n, width) on this thread; `sampled` are the rows whose predictions are to be compared."""
    values = taken.values()
    step = max(1, VALUES_AT_ONCE // values.shape[1])
    codes, scales, errors = [], [], []
    for low in range(0, len(values), step):
        rows = values[low : low + step].astype(np.float32, copy=False)
        some_codes, some_scales = quantise(rows, kind, group)
        codes.append(some_codes)
        scales.append(some_scales)
        errors.append(Errors.of(rows, dequantise(some_codes, some_scales, kind, group)))
    whole_codes, whole_scales = np.concatenate(codes), np.concatenate(scales)
    return Portion(
        whole_codes,
        whole_scales,
        Errors(np.concatenate([part.error for part in errors]), np.concatenate([part.norm for part in errors])),
        values[sampled].astype(np.float32),
        dequantise(whole_codes[sampled], whole_scales[sampled], kind, group),
    )
