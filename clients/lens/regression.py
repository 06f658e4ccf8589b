"""Ridge regressions of the same rows on several sets of predictors, from sums of products; rows are not kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actcache.clients.covariance import Products

PENALTIES = np.logspace(-8, 2, 41)
"""Ridge penalties, in units of the variance of a standardised predictor."""


@dataclass
class Moments:
    """Sums of products of predictors x (n, p) and responses y (n, k), piece by piece."""

    xx: Products
    xy: Products
    yy: float = 0.0

    @classmethod
    def empty(cls, p: int, k: int) -> Moments:
        """Of no row."""
        return cls(Products.empty(p, p), Products.empty(p, k))

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Count rows x (n, p) and y (n, k), float32."""
        self.xx.add(x, x)
        self.xy.add(x, y)
        self.yy += float(np.square(y, dtype=np.float64).sum())


@dataclass(frozen=True)
class Fit:
    """y ≈ mean + (x[:, columns] - centre) @ weight.

    Attributes:
        columns: the predictors that it uses, (q,).
        weight: (q, k) float32.
        centre: means of the predictors, (q,) float32.
        mean: of the responses, (k,) float32.
        penalty: the ridge penalty chosen, in units of a standardised predictor's variance.
    """

    columns: np.ndarray
    weight: np.ndarray
    centre: np.ndarray
    mean: np.ndarray
    penalty: float

    def predict(self, x: np.ndarray) -> np.ndarray:
        """The prediction (n, k) of rows x (n, p)."""
        return np.asarray(self.mean + (x[:, self.columns] - self.centre) @ self.weight)


def ridge(moments: Moments, columns: np.ndarray) -> Fit:
    """Ridge regression (Hoerl & Kennard 1970) on some of the predictors, each standardised.

    The penalty, of 41 from 1e-8 to 100, is the one with the least generalised cross-validation error (Golub, Heath & Wahba 1979), the
    same for all responses. A predictor that does not vary has weight 0.
    """
    n = moments.xx.n
    centre, mean = moments.xx.x[columns] / n, moments.xy.y / n
    covariance = moments.xx.xy[np.ix_(columns, columns)] / n - np.outer(centre, centre)
    cross = moments.xy.xy[columns] / n - np.outer(centre, mean)
    variance = max(moments.yy / n - float(mean @ mean), 0.0)
    deviation = np.sqrt(np.maximum(np.diag(covariance), 0))
    inverse = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 0)
    values, vectors = np.linalg.eigh(covariance * np.outer(inverse, inverse))
    values = np.maximum(values, 0)
    along = vectors.T @ (cross * inverse[:, None])
    square = np.square(along).sum(axis=1)
    shrunk = values + PENALTIES[:, None]
    residual = variance - (square * (values + 2 * PENALTIES[:, None]) / shrunk**2).sum(axis=1)
    freedom = np.minimum((values / shrunk).sum(axis=1) / n, 1 - 1e-9)
    best = int(np.argmin(np.maximum(residual, 0) / (1 - freedom) ** 2))
    weight = inverse[:, None] * (vectors @ (along / shrunk[best][:, None]))
    return Fit(
        columns, weight.astype(np.float32), centre.astype(np.float32), mean.astype(np.float32), float(PENALTIES[best])
    )
