"""An array in memory as a source of rows, with whatever trouble a test asks for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from actcache.cache.rows import Rows, check_index
from actcache.clients.sources import Source


class ArraySource(Source):
    """Rows of a numpy array, in objects of the given sizes.

    Attributes:
        read: how many tokens each call of `scatter` asked for.
        delay: seconds to sleep before each call, by its number.
        failure: raised instead of reading the row `fails_at`.
    """

    def __init__(self, name: str, values: np.ndarray, chunks: tuple[int, ...]) -> None:
        assert sum(chunks) == len(values)
        self.name, self.values, self._chunks = name, values, chunks
        self.shape, self.dtype = values.shape, values.dtype
        self.read: list[int] = []
        self.delay: Callable[[int], float] | None = None
        self.failure: Exception | None = None
        self.fails_at = 0

    @property
    def chunks(self) -> tuple[int, ...]:
        return self._chunks

    @property
    def places(self) -> tuple[str, ...]:
        return ()

    @property
    def content(self) -> tuple[object, ...]:
        return (self.name, *self.shape, str(self.dtype))

    def open(self) -> Rows:
        return ArrayRows(self)


class ArrayRows(Rows):
    """What reads it."""

    def __init__(self, source: ArraySource) -> None:
        self.source = source
        self.shape, self.dtype = source.shape, source.dtype
        self._lock = threading.Lock()

    @property
    def cuts(self) -> np.ndarray:
        return np.cumsum([0, *self.source.chunks])

    def scatter(self, index: np.ndarray, out: np.ndarray, at: np.ndarray) -> None:
        check_index(index, self.shape[0], "rows")
        with self._lock:
            self.source.read.append(len(index))
            number = len(self.source.read)
        if self.source.delay is not None:
            time.sleep(self.source.delay(number))
        if self.source.failure is not None and (index == self.source.fails_at).any():
            raise self.source.failure
        out[at] = self.source.values[index]

    def read(self, start: int = 0, stop: int | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        return self.source.values[start:stop].astype(dtype or self.dtype)


def numbered(n: int, width: int, chunks: tuple[int, ...], dtype: str = "float32", name: str = "x") -> ArraySource:
    """Rows of which each value tells its row and its column: 100 · row + column."""
    values = 100.0 * np.arange(n)[:, None] + np.arange(width)
    return ArraySource(name, values.astype(np.dtype(dtype)), chunks)


def cut(n: int, size: int) -> tuple[int, ...]:
    """Objects of equal size, the last one perhaps shorter."""
    edges = [*range(0, n, size), n]
    return tuple(high - low for low, high in pairwise(edges)) or (0,)
