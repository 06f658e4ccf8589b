"""Intervals by resampling whole documents: the bootstrap (Efron 1979) of clusters, whose tokens are not independent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actcache.clients.results import Measure

RESAMPLES = 1000
CONFIDENCE = 0.95
WEIGHTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Groups:
    """Which tokens belong together.

    Attributes:
        of: the group of each token, (token,), 0 to count - 1.
        count: how many groups.
        by: what a group is: `document` or `sequence`.
    """

    of: np.ndarray
    count: int
    by: str

    def sums(self, values: np.ndarray) -> np.ndarray:
        """The sum over the tokens of each group, of values (token, …): (count, …), float64."""
        flat = np.asarray(values).reshape(len(values), -1)
        found = np.empty((self.count, flat.shape[1]))
        for column in range(flat.shape[1]):
            found[:, column] = np.bincount(self.of, flat[:, column], self.count)
        return found.reshape(self.count, *values.shape[1:])

    def __getitem__(self, chosen: np.ndarray) -> Groups:
        """The groups of some of the tokens, numbered anew."""
        kept, numbers = np.unique(self.of[chosen], return_inverse=True)
        return Groups(numbers, len(kept), self.by)


def mean(sums: np.ndarray, counts: np.ndarray, unit: str, axes: tuple[str, ...] = ("layer",), seed: int = 0) -> Measure:
    """A mean over tokens, Σ sums / Σ counts, with the percentile interval of resampled groups.

    `sums` is (group, …), `counts` the tokens of each group, (group,) or shaped as `sums`. The interval covers 95 %, from 1,000
    resamples. Of fewer than two groups there is none.
    """
    counts = np.asarray(counts, np.float64)
    counts = counts.reshape(counts.shape + (1,) * (sums.ndim - counts.ndim))
    with np.errstate(invalid="ignore", divide="ignore"):
        value = sums.sum(axis=0) / counts.sum(axis=0)
        if len(sums) < 2:
            return Measure(value, unit, axes)
        drawn = resampled(sums, seed) / resampled(counts, seed)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return Measure(value, unit, axes, low, high)


def resampled(sums: np.ndarray, seed: int = 0) -> np.ndarray:
    """Sums over groups drawn with replacement, as many as there are: (1000, …) from (group, …). A seed draws the same groups again."""
    groups = len(sums)
    generator = np.random.default_rng(seed)
    flat = sums.reshape(groups, -1)
    found = np.empty((RESAMPLES, flat.shape[1]))
    step = max(1, WEIGHTS_AT_ONCE // groups)
    for low in range(0, RESAMPLES, step):
        high = min(low + step, RESAMPLES)
        drawn = (np.bincount(generator.integers(groups, size=groups), minlength=groups) for _ in range(low, high))
        found[low:high] = np.stack(list(drawn)) @ flat
    return found.reshape(RESAMPLES, *sums.shape[1:])
