"""Sums of numbers of tokens by document, some thousand tokens at a time, that become means with intervals."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from actcache.clients.bootstrap import Groups, mean
from actcache.clients.results import Measure


class Tally:
    """Running sums of several quantities, each with the same axes.

    Args:
        units: of each quantity, by name.
        groups: which tokens are of one document.
        shape: places on each axis, such as the number of layers.
    """

    def __init__(self, units: Mapping[str, str], groups: Groups, shape: tuple[int, ...]) -> None:
        self.units = dict(units)
        self.of = groups.of
        self.sums = np.zeros((len(self.units), groups.count, *shape))
        self.counts = np.zeros_like(self.sums)

    def add(self, low: int, values: np.ndarray) -> None:
        """Count values (quantity, …, n) of the tokens from place `low` on. NaN is not counted."""
        owner = self.of[low : low + values.shape[-1]]
        for number, found in enumerate(values):
            there = np.moveaxis(~np.isnan(found), -1, 0)
            np.add.at(self.counts[number], owner, there)
            np.add.at(self.sums[number], owner, np.where(there, np.moveaxis(found, -1, 0), 0))

    def measures(self, axes: tuple[str, ...]) -> dict[str, Measure]:
        """The mean of each quantity over the tokens, with its interval by resampled documents."""
        return {
            name: mean(self.sums[number], self.counts[number], unit, axes)
            for number, (name, unit) in enumerate(self.units.items())
        }
