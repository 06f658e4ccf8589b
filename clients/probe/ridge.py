"""Ridge regression of one layer in closed form, along the whole path of penalties (Hoerl & Kennard 1970).

It minimises ‖Y − X W − b‖² + α ‖W‖² with X the states, each dimension divided by its standard deviation over the tokens that are
fitted: scikit-learn's `make_pipeline(StandardScaler(), Ridge(alpha))`. Classes are 1 and −1, as `RidgeClassifier` has them; two
classes are one output.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actcache.clients.probe.moments import Moments, Scale


@dataclass(frozen=True)
class Affine:
    """f(x) = W x + b of states as the dataset has them: W (outputs, d), b (outputs,), float64."""

    weight: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class Normal:
    """The normal equations of one layer, in standardised dimensions.

    Attributes:
        n: how many tokens.
        mean, spread: what a state is centred by and divided by, (d,); in the units of the sums.
        xx: X Xᵀ, (d, d).
        y: mean of each output, (answer, outputs).
        xy: of the centred targets, (answer, outputs, d).
    """

    n: int
    mean: np.ndarray
    spread: np.ndarray
    xx: np.ndarray
    y: np.ndarray
    xy: np.ndarray

    @classmethod
    def of(cls, sums: Moments) -> Normal:
        """Of the sums over some tokens."""
        mean = sums.x / sums.n
        xx = sums.xx - sums.n * np.outer(mean, mean)
        variance = np.maximum(np.diag(xx) / sums.n, 0)
        spread = np.sqrt(np.where(variance > VARIANCE_OF_NOTHING, variance, 1))
        y = sums.y / sums.n
        xy = (sums.xy - sums.y[..., None] * mean) / spread
        return cls(sums.n, mean, spread, xx / np.outer(spread, spread), y, xy)

    def affine(self, weight: np.ndarray, bias: np.ndarray, scale: Scale) -> Affine:
        """What weights (outputs, d) and biases (outputs,) of standardised dimensions are for states as the dataset has them."""
        of_sums = weight / self.spread
        of_states = of_sums / scale.spread
        return Affine(of_states, bias - of_sums @ self.mean - of_states @ scale.centre)


VARIANCE_OF_NOTHING = 1e-10
"""Of the dataset's own variance: a dimension that varies less among the tokens is left as it is."""


def solve(normal: Normal, answer: int, alpha: float) -> np.ndarray:
    """W (outputs, d) of standardised dimensions; their b is the mean of each output."""
    return np.asarray(np.linalg.solve(normal.xx + alpha * np.eye(len(normal.xx)), normal.xy[answer].T).T)


def path_scores(fitted: Normal, held: Moments, alphas: np.ndarray) -> np.ndarray:
    """R² of each penalty on tokens that were not fitted, all outputs together, (answer, alpha): from their sums alone.

    One eigendecomposition gives the weights of the whole path.
    """
    values, vectors = np.linalg.eigh(fitted.xx)
    shift = np.outer(held.x, fitted.mean)
    xx = held.xx - shift - shift.T + held.n * np.outer(fitted.mean, fitted.mean)
    rotated = vectors.T @ (xx / np.outer(fitted.spread, fitted.spread)) @ vectors
    scores = np.empty((len(fitted.y), len(alphas)))
    for answer, mean in enumerate(fitted.y):
        # sums of y − ȳ, ȳ the mean of the fitted tokens, and of its products with the centred states
        y = held.y[answer] - held.n * mean
        yy = held.yy[answer] - 2 * mean * held.y[answer] + held.n * mean**2
        xy = held.xy[answer] - held.y[answer][:, None] * fitted.mean - np.outer(mean, held.x - held.n * fitted.mean)
        target = (xy / fitted.spread) @ vectors
        fit = fitted.xy[answer] @ vectors
        total = (yy - y**2 / held.n).sum()
        for number, alpha in enumerate(alphas):
            weight = fit / (np.maximum(values, 0) + alpha)
            error = yy.sum() - 2 * (weight * target).sum() + ((weight @ rotated) * weight).sum()
            scores[answer, number] = 1 - error / total if total > 0 else np.nan
    return scores
