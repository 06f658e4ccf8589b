"""What layers share by the documents that their tokens are of: sums by document, in one pass, whatever their number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Runs:
    """Sums over the tokens of one layer that follow each other and are of one document.

    Attributes:
        owner: the document of each run, (run,).
        n: its tokens, (run,) float64.
        x: Σ x, (run, d) float64.
        square: Σ ‖x‖², (run,) float64.
    """

    owner: np.ndarray
    n: np.ndarray
    x: np.ndarray
    square: np.ndarray

    @classmethod
    def of(cls, owner: np.ndarray, x: np.ndarray) -> Runs:
        """Of rows x (n, d), whose documents are `owner` (n,)."""
        starts = np.concatenate([[0], np.flatnonzero(np.diff(owner)) + 1])
        square = np.einsum("ij,ij->i", x, x)
        return cls(
            owner[starts],
            np.diff(np.append(starts, len(owner))).astype(np.float64),
            np.add.reduceat(x, starts, axis=0, dtype=np.float64),
            np.add.reduceat(square, starts, dtype=np.float64),
        )

    def cut(self, before: Runs | None, last: bool) -> tuple[Runs, Runs | None]:
        """The runs that are whole, and the last, which may go on; `before` is the one that did."""
        runs = self
        if before is not None:
            if before.owner[0] == self.owner[0]:
                runs = Runs(self.owner, self.n.copy(), self.x.copy(), self.square.copy())
                runs.n[0] += before.n[0]
                runs.x[0] += before.x[0]
                runs.square[0] += before.square[0]
            else:
                runs = before._and(self)
        return (runs, None) if last else (runs._part(slice(None, -1)), runs._part(slice(-1, None)))

    def _part(self, which: slice) -> Runs:
        return Runs(self.owner[which], self.n[which], self.x[which], self.square[which])

    def _and(self, other: Runs) -> Runs:
        return Runs(
            np.concatenate([self.owner, other.owner]),
            np.concatenate([self.n, other.n]),
            np.concatenate([self.x, other.x]),
            np.concatenate([self.square, other.square]),
        )

    @property
    def scatter(self) -> np.ndarray:
        """Σ ‖x − x̄‖² within each run, x̄ its own mean, (run,)."""
        return np.asarray(np.maximum(self.square - np.square(self.x).sum(axis=1) / self.n, 0))


@dataclass
class Between:
    """What is left of the sum of products of two layers when the tokens of each document are paired at random.

    Attributes:
        xy: Σ over documents of n x̄ ȳᵀ, (d, k) float64.
        chance: Σ of the products of both scatters over n − 1: the mean squared norm of what random pairing adds.
    """

    xy: np.ndarray
    chance: float = 0.0

    def add(self, x: Runs, y: Runs) -> None:
        """Count whole runs of the same tokens."""
        self.xy += (x.x / x.n[:, None]).T @ y.x
        several = x.n > 1
        self.chance += float((x.scatter[several] * y.scatter[several] / (x.n[several] - 1)).sum())
