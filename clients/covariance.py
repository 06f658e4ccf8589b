"""Covariances of the states of all layers, in one pass over the data and in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from actcache.cache.threads import spread
from actcache.clients.states import Piece, States


@dataclass
class Products:
    """Sums over tokens of x, y and x yᵀ: sums of products are added up piece by piece, in float64.

    Attributes:
        n: how many tokens, or the sum of their weights.
        x: Σ x, (d,) float64.
        y: Σ y, (k,) float64.
        xy: Σ x yᵀ, (d, k) float64.
    """

    n: float
    x: np.ndarray
    y: np.ndarray
    xy: np.ndarray

    @classmethod
    def empty(cls, d: int, k: int) -> Products:
        """Of no token."""
        return cls(0.0, np.zeros(d), np.zeros(k), np.zeros((d, k)))

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Count rows x (n, d) and y (n, k), float32. `x is y` takes half the work."""
        self.n += len(x)
        self.x += x.sum(axis=0, dtype=np.float64)
        self.y += y.sum(axis=0, dtype=np.float64)
        self.xy += x.T @ y

    def __add__(self, other: Products) -> Products:
        return Products(self.n + other.n, self.x + other.x, self.y + other.y, self.xy + other.xy)

    def __sub__(self, other: Products) -> Products:
        return Products(self.n - other.n, self.x - other.x, self.y - other.y, self.xy - other.xy)

    def moved(self, x: np.ndarray, y: np.ndarray) -> Products:
        """The sums of what is counted after `x` (d,) is added to every x, and `y` (k,) to every y."""
        xy = self.xy + np.outer(x, self.y) + np.outer(self.x, y) + self.n * np.outer(x, y)
        return Products(self.n, self.x + self.n * x, self.y + self.n * y, xy)

    @property
    def covariance(self) -> np.ndarray:
        """Covariance of x and y, (d, k): the mean of (x − x̄)(y − ȳ)ᵀ."""
        return self.xy / self.n - np.outer(self.x / self.n, self.y / self.n)


def centres(read: States, sites: Sequence[str] | None = None) -> list[np.ndarray]:
    """The stored mean of each site over the whole dataset, (d,) float32: subtracted first, it keeps sums of squares exact."""
    statistics = read.ds.statistics
    return [statistics[site]["mean"].astype(np.float32) for site in (read.sites if sites is None else sites)]


def one_pass(read: States, work: Callable[[int, np.ndarray, Piece], None], sites: Sequence[str] | None = None) -> None:
    """Call `work(layer, x, piece)` for every layer of every piece, the layers of a piece on all cores; x is centred, (n, d) float32.

    The mean that is subtracted is that of `centres`. BLAS has one thread in each call.
    """
    shift = centres(read, sites)
    for piece in read.pieces(sites):

        def layer_of(layer: int, piece: Piece = piece) -> None:
            work(layer, piece.states[layer] - shift[layer], piece)

        with threadpool_limits(1, user_api="blas"):
            spread(layer_of, range(len(shift)))
