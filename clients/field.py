"""One array of a batch: where its rows come from, and what is made of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actcache.clients.normalise import Normaliser
from actcache.clients.sources import Source

PIECE_BYTES = 256 << 10
"""Rows are converted in pieces that stay in a core's cache."""


@dataclass(frozen=True)
class Field:
    """An array of a batch.

    Attributes:
        name: its name in the batch.
        source: where its rows come from.
        dtype: of the batch.
        normaliser: what is done to rows, float32, or None.
    """

    name: str
    source: Source
    dtype: np.dtype
    normaliser: Normaliser | None = None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self.source.shape[1:]

    @property
    def values(self) -> int:
        """Values of one row."""
        return int(np.prod(self.row_shape, dtype=np.int64))

    def gather(self, rows: np.ndarray, at: np.ndarray, out: np.ndarray) -> None:
        """Rows `at` (n,) of those read, in the source's dtype, into `out` (n, …). Other threads run meanwhile."""
        if rows.dtype == self.dtype and self.normaliser is None:
            np.take(rows, at, axis=0, out=out, mode="clip")  # any other mode makes a copy first
            return
        step = max(1, PIECE_BYTES // max(1, self.values * rows.dtype.itemsize))
        stored = np.empty((min(step, len(at)), *self.row_shape), rows.dtype)
        for low in range(0, len(at), step):
            piece = out[low : low + step]
            if rows.dtype == self.dtype:
                np.take(rows, at[low : low + step], axis=0, out=piece, mode="clip")
            else:
                np.take(rows, at[low : low + step], axis=0, out=stored[: len(piece)], mode="clip")
                piece[...] = stored[: len(piece)]
            if self.normaliser is not None:
                self.normaliser.apply(piece)
