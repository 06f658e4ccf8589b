"""Intervals of what is no mean, such as a similarity of two covariances: the infinitesimal jackknife over documents.

The derivative of a number by the weight of each document (its influence) is found exactly in a second pass over the data, without
keeping anything of the size of a covariance for each document. The variance is the sum of their squares, times g / (g - 1) for g
documents (Jaeckel 1972; Efron 1982, The Jackknife, the Bootstrap and Other Resampling Plans, chapter 6). It is the first-order limit
of deleting one document at a time: sampling variation, without the estimate's bias.
"""

from __future__ import annotations

import numpy as np

from actcache.clients.bootstrap import CONFIDENCE, Groups
from actcache.clients.results import Measure

MOST_GROUPS = 200
Z = 1.959963984540054
"""The standard normal quantile of 97.5 %."""
NUMERICALLY_ONE = 1e-9


def dealt(groups: Groups, seed: int = 0) -> Groups:
    """The same tokens in at most 200 groups: whole documents, dealt out at random where there are more."""
    if groups.count <= MOST_GROUPS:
        return groups
    new = np.random.default_rng(seed).permutation(groups.count) % MOST_GROUPS
    return Groups(new[groups.of], MOST_GROUPS, groups.by)


def said(groups: Groups) -> str:
    """How the intervals were found, for the facts of a result."""
    if groups.count < 2:
        return f"none: there is one {groups.by}"
    several = f"groups of {groups.by}s" if groups.count == MOST_GROUPS else f"{groups.by}s"
    return f"{CONFIDENCE:.0%}, infinitesimal jackknife over {groups.count} {several}"


def positive(value: np.ndarray, influence: np.ndarray, unit: str, axes: tuple[str, ...] = ("layer",)) -> Measure:
    """A number above 0 with the interval of its logarithm. `influence` is of the number, (group, …)."""
    if len(influence) < 2:
        return Measure(value, unit, axes)
    with np.errstate(invalid="ignore", divide="ignore"):
        factor = np.exp(Z * standard_error(influence) / value)
    return Measure(value, unit, axes, value / factor, value * factor)


def share(value: np.ndarray, influence: np.ndarray, unit: str, axes: tuple[str, ...] = ("layer",)) -> Measure:
    """A number from 0 to 1 with the interval of its logit. `influence` is of the number, (group, …)."""
    if len(influence) < 2:
        return Measure(value, unit, axes)
    inside = (value > 0) & (value < 1 - NUMERICALLY_ONE)
    safe = np.where(inside, value, 0.5)
    logit, half = np.log(safe / (1 - safe)), Z * standard_error(influence) / (safe * (1 - safe))
    low, high = (np.where(inside, 1 / (1 + np.exp(-(logit + sign * half))), value) for sign in (-1, 1))
    return Measure(value, unit, axes, low, high)


def standard_error(influence: np.ndarray) -> np.ndarray:
    """Of influences (group, …): shape (…)."""
    groups = len(influence)
    return np.asarray(np.sqrt(groups / (groups - 1) * np.square(influence).sum(axis=0)))
