"""Covariances of the states of all layers, in one pass over the data and in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from actcache.cache.threads import spread
from actcache.clients.states import Piece, States

FAR = 8.0
"""Standard deviations between the mean of some rows and 0 from which on float32 loses what is asked for in their sums of products."""

SUMMED = 512
"""Rows that are summed in float32 before their sum is added up in float64."""


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
        left = Rows.of(x)
        self.count(left, left if x is y else Rows.of(y))

    def count(self, x: Rows, y: Rows) -> None:
        """Count rows x (n, d) and y (n, k)."""
        if not len(x.near):
            return
        found = Products(float(len(x.near)), x.sum, y.sum, x.near.T @ y.near)
        if x.far is not None or y.far is not None:
            found = found.moved(*(np.zeros(len(each.sum)) if each.far is None else each.far for each in (x, y)))
        self.n += found.n
        self.x += found.x
        self.y += found.y
        self.xy += found.xy

    def __add__(self, other: Products) -> Products:
        return Products(self.n + other.n, self.x + other.x, self.y + other.y, self.xy + other.xy)

    def moved(self, x: np.ndarray, y: np.ndarray) -> Products:
        """The sums of what is counted after `x` (d,) is added to every x, and `y` (k,) to every y."""
        xy = self.xy + np.outer(x, self.y) + np.outer(self.x, y) + self.n * np.outer(x, y)
        return Products(self.n, self.x + self.n * x, self.y + self.n * y, xy)

    @property
    def covariance(self) -> np.ndarray:
        """Covariance of x and y, (d, k): the mean of (x − x̄)(y − ȳ)ᵀ."""
        return self.xy / self.n - np.outer(self.x / self.n, self.y / self.n)


@dataclass(frozen=True)
class Rows:
    """Rows whose products are to be summed.

    Attributes:
        near: the rows, (n, d) float32, with `far` taken off where they lie far from 0.
        far: see `far_off`.
        sum: of the near rows, (d,) float64.
    """

    near: np.ndarray
    far: np.ndarray | None
    sum: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray) -> Rows:
        """Rows x (n, d), float32."""
        far = far_off(x)
        near = x if far is None else x - far.astype(x.dtype)
        return cls(near, far, _sum(near))


def _sum(x: np.ndarray) -> np.ndarray:
    """The sum of rows (n, d), float64: of a few hundred at a time in their own precision, as fast as they are read."""
    parts = (x[low : low + SUMMED] for low in range(0, len(x), SUMMED))
    return np.asarray(
        sum((np.ones(len(part), x.dtype) @ part).astype(np.float64) for part in parts) + np.zeros(x.shape[1])
    )


def far_off(x: np.ndarray) -> np.ndarray | None:
    """The mean of rows (n, d) in those dimensions where it is far from 0 beside how they vary, 0 in others, (d,) float64; None if in none.

    Tokens of one position can lie so, where the mean that was subtracted from them is that of all.
    """
    if not len(x):
        return None
    total = _sum(x)
    square = _sum(np.square(x))
    far = (total != 0) & (total**2 / len(x) * (1 + FAR**-2) > square)
    if not far.any():
        return None
    return np.where(far, (total / len(x)).astype(x.dtype), 0).astype(np.float64)


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
