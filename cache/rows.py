"""What can be read row by row: a stored array, the values of a quantised one, several of them end to end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

ROWS_AT_ONCE = 1 << 18
"""Rows of all columns that are read to have one of them."""


class Rows(ABC):
    """Rows of one array. Safe to use from several threads.

    Attributes:
        shape: (row, …).
        dtype: of the values.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @abstractmethod
    def scatter(self, index: np.ndarray, out: np.ndarray, at: np.ndarray) -> None:
        """Read rows `index` (n,), in any order, repeated or not, into `out[at]`, converted to the dtype of `out`.

        Raises:
            IndexError: a row is not within the array.
            Corrupt: a shard is missing or is not what was written.
            StoreError: the store failed.
        """

    @abstractmethod
    def read(self, start: int = 0, stop: int | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        """Rows [start, stop), shape (stop - start, …), as `dtype` or as they are.

        Raises:
            IndexError: the range is not within the array.
            Corrupt: a shard is missing or is not what was written.
            StoreError: the store failed.
        """

    def take(self, index: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
        """Rows `index` (n,), in any order, repeated or not, shape (n, …). Rows that lie together are read together.

        Raises: as `scatter`.
        """
        out = np.empty((len(index), *self.shape[1:]), dtype or self.dtype)
        self.scatter(index, out, np.arange(len(index)))
        return out

    def check_range(self, start: int, stop: int | None, name: str) -> int:
        """The end of a range of rows; refuses one that is not within the array."""
        stop = self.shape[0] if stop is None else stop
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"{name}: rows {start}:{stop} of {self.shape[0]}")
        return stop


class JoinedRows(Rows):
    """Arrays of equal rows, one after the other. `parts` open each when it is asked for; `lengths` says how many rows each has."""

    def __init__(
        self, parts: Sequence[Callable[[], Rows]], lengths: Sequence[int], row_shape: tuple[int, ...], dtype: np.dtype
    ) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *lengths])
        self.shape = (int(self._starts[-1]), *row_shape)
        self.dtype = dtype

    def scatter(self, index: np.ndarray, out: np.ndarray, at: np.ndarray) -> None:
        """See `Rows`."""
        index = np.asarray(index, np.int64)
        check_index(index, self.shape[0], "rows")
        owner = np.searchsorted(self._starts, index, side="right") - 1
        for number in np.unique(owner).tolist():
            mine = np.flatnonzero(owner == number)
            self._parts[number]().scatter(index[mine] - self._starts[number], out, at[mine])

    def read(self, start: int = 0, stop: int | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        """See `Rows`."""
        stop = self.check_range(start, stop, "rows")
        out = np.empty((stop - start, *self.shape[1:]), dtype or self.dtype)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        for number in range(first, int(np.searchsorted(self._starts, stop, side="left"))):
            own, end = self._starts[number : number + 2].tolist()
            low, high = max(start, own), min(stop, end)
            if low < high:
                out[low - start : high - start] = self._parts[number]().read(low - own, high - own, out.dtype)
        return out


class LaterRows(Rows):
    """Rows of an array, each in the place of the one `by` before it."""

    def __init__(self, base: Rows, by: int) -> None:
        self._base = base
        self._by = by
        self.shape, self.dtype = base.shape, base.dtype

    def scatter(self, index: np.ndarray, out: np.ndarray, at: np.ndarray) -> None:
        """See `Rows`."""
        self._base.scatter(np.asarray(index, np.int64) + self._by, out, at)

    def read(self, start: int = 0, stop: int | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        """See `Rows`."""
        stop = self.check_range(start, stop, "rows")
        return self._base.read(start + self._by, stop + self._by, dtype)


class ShiftedRows(Rows):
    """Whole numbers with another added to each."""

    def __init__(self, base: Rows, by: int) -> None:
        self._base = base
        self._by = by
        self.shape, self.dtype = base.shape, base.dtype

    def scatter(self, index: np.ndarray, out: np.ndarray, at: np.ndarray) -> None:
        """See `Rows`."""
        out[at] = self._base.take(index) + self._by

    def read(self, start: int = 0, stop: int | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        """See `Rows`."""
        return (self._base.read(start, stop) + self._by).astype(dtype or self.dtype, copy=False)


class ColumnRows(Rows):
    """One column of rows."""

    def __init__(self, base: Rows, column: int) -> None:
        self._base = base
        self._column = column
        self.shape, self.dtype = base.shape[:1], base.dtype

    def scatter(self, index: np.ndarray, out: np.ndarray, at: np.ndarray) -> None:
        """See `Rows`."""
        out[at] = self._base.take(index)[:, self._column]

    def read(self, start: int = 0, stop: int | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        """See `Rows`."""
        stop = self.check_range(start, stop, "rows")
        out = np.empty(stop - start, dtype or self.dtype)
        for low in range(start, stop, ROWS_AT_ONCE):
            high = min(low + ROWS_AT_ONCE, stop)
            out[low - start : high - start] = self._base.read(low, high)[:, self._column]
        return out


def check_index(index: np.ndarray, rows: int, name: str) -> None:
    """Refuse an index that is not a list of rows of the array."""
    if index.ndim != 1:
        raise IndexError(f"{name}: an index of {index.ndim} dimensions; one is asked for")
    if len(index) and not (int(index.min()) >= 0 and int(index.max()) < rows):
        raise IndexError(f"{name}: rows {int(index.min())} to {int(index.max())} of {rows}")
