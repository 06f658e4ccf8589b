"""Mean and variance per dimension, merged exactly.

Chan, Golub & LeVeque (1979), "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances": for parts of n_a and
n_b values, with δ = mean_b - mean_a and n = n_a + n_b, mean = mean_a + δ n_b / n and M2 = M2_a + M2_b + δ² n_a n_b / n,
where M2 is the sum of squared deviations. All in float64, always in the same order, so that equal input gives equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np


@dataclass(frozen=True)
class Moments:
    """Count, mean (d,) and sum of squared deviations (d,) of some vectors."""

    count: int
    mean: np.ndarray
    m2: np.ndarray

    @classmethod
    def empty(cls, width: int) -> Self:
        """The moments of nothing."""
        return cls(0, np.zeros(width), np.zeros(width))

    def merge(self, other: Moments) -> Moments:
        """The moments of both parts together."""
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta * delta * (self.count * other.count / count)
        return Moments(count, mean, m2)

    @property
    def variance(self) -> np.ndarray:
        """Population variance per dimension, (d,)."""
        return self.m2 / max(self.count, 1)


def measure(rows: np.ndarray) -> tuple[Moments, np.ndarray]:
    """Moments of rows (n, d) and the L2 norm of each (n,), float32, of the values as stored.

    A value that is not finite makes the means of its dimension not finite.
    """
    wide = rows.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        norms = np.sqrt(np.einsum("ij,ij->i", wide, wide)).astype(np.float32)
        mean = wide.sum(axis=0) / max(len(rows), 1)
        wide -= mean
        m2 = np.einsum("ij,ij->j", wide, wide)
    return Moments(len(rows), mean, m2), norms


def pack(parts: list[Moments]) -> bytes:
    """A block's statistics object: for each site its means, then its sums of squared deviations, little-endian float64."""
    return b"".join(part.mean.astype("<f8").tobytes() + part.m2.astype("<f8").tobytes() for part in parts)


def unpack(data: bytes | memoryview, widths: list[int], count: int) -> list[Moments]:
    """Read a block's statistics object of `count` tokens.

    Raises:
        ValueError: it has another length than the sites' widths ask for.
    """
    values = np.frombuffer(data, "<f8")
    if len(values) != 2 * sum(widths):
        raise ValueError(f"{len(values)} values, not {2 * sum(widths)}")
    parts, at = [], 0
    for width in widths:
        parts.append(Moments(count, values[at : at + width], values[at + width : at + 2 * width]))
        at += 2 * width
    return parts
