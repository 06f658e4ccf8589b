"""Centred, standardised or scaled activations: what is done to the float32 rows of a site, from its stored statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from actcache.schemas.errors import InvalidInput

How = Literal["standard", "center", "scale"]


@dataclass(frozen=True)
class Normaliser:
    """What is subtracted from rows, then what they are multiplied by: (d,) or () float32, or None for nothing."""

    shift: np.ndarray | None
    factor: np.ndarray | None

    @classmethod
    def of(cls, how: How, mean: np.ndarray, variance: np.ndarray, name: str) -> Normaliser:
        """From mean and variance per dimension, (d,) float64.

        `center` is x - mean. `standard` is (x - mean) / sqrt(variance); a dimension that does not vary is centred alone. `scale` is
        x · sqrt(d / E|x|²), where E|x|² is the sum of mean² + variance: vectors then have the expected squared norm d, as sparse
        autoencoders are trained on (Anthropic, "Circuits Updates", April 2024); a site of zeros stays as it is.

        Raises:
            InvalidInput: no such way, or the statistics are not finite.
        """
        if how not in get_args(How):
            raise InvalidInput(f"normalise={how!r}: there is None, {', '.join(map(repr, get_args(How)))}")
        mean, variance = np.asarray(mean, np.float64), np.asarray(variance, np.float64)
        if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
            raise InvalidInput(f"{name}: its mean or variance is not finite, so that it cannot be normalised")
        if how == "scale":
            square = float((mean**2 + variance).sum())
            return cls(None, _finite(mean.size, np.array(square)))
        shift = mean.astype(np.float32)
        return cls(shift, None if how == "center" else _finite(1, variance))

    def apply(self, rows: np.ndarray) -> None:
        """Change rows (n, d), float32, in place."""
        if self.shift is not None:
            np.subtract(rows, self.shift, out=rows)
        if self.factor is not None:
            np.multiply(rows, self.factor, out=rows)


def _finite(above: int, below: np.ndarray) -> np.ndarray:
    """sqrt(above / below) as float32, and 1 where that is infinite."""
    with np.errstate(divide="ignore", over="ignore"):
        factor = np.sqrt(above / below).astype(np.float32)
    return np.asarray(np.where(np.isfinite(factor), factor, np.float32(1)))
