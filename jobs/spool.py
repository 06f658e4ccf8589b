"""Rows of numbers that grow on disk, not in memory, until their count is known."""

from __future__ import annotations

import os
import tempfile
from types import TracebackType
from typing import Self

import numpy as np

from actcache.schemas.errors import StoreError

BUFFER = 1 << 20


class Spool:
    """An append-only table in a temporary file that has no name and goes when it is closed.

    Rows are numbers of one dtype: shape (n,) for `width` 1, else (n, width). Reading moves bytes, it maps none, so that
    memory stays bounded.
    """

    def __init__(self, dtype: str, width: int = 1) -> None:
        self._dtype = np.dtype(dtype)
        self._width = width
        self._row = self._dtype.itemsize * width
        self._file = tempfile.TemporaryFile(prefix="actcache-tokens-", buffering=0)  # noqa: SIM115  (closed by close)
        self._written = 0
        self._buffer = bytearray()

    def __len__(self) -> int:
        return self._written + len(self._buffer) // self._row

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back."""
        self._file.close()

    def append(self, rows: np.ndarray) -> None:
        """Add rows at the end.

        Raises:
            StoreError: the disk is full.
        """
        self._buffer += np.ascontiguousarray(rows, self._dtype).reshape(-1).data.cast("B")
        if len(self._buffer) >= BUFFER:
            self._flush()

    def truncate(self, length: int) -> None:
        """Forget every row from `length` on."""
        if length >= self._written:
            del self._buffer[(length - self._written) * self._row :]
            return
        self._flush()
        self._file.truncate(length * self._row)
        self._written = length

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop)."""
        self._flush()
        stop = min(stop, self._written)
        found = np.empty(max(0, stop - start) * self._width, self._dtype)
        view, offset = found.data.cast("B") if len(found) else memoryview(b""), start * self._row
        while view:
            size = os.preadv(self._file.fileno(), [view], offset)
            if size == 0:
                raise StoreError(f"{tempfile.gettempdir()}: a temporary file lost its end; run the same command again")
            view, offset = view[size:], offset + size
        return found if self._width == 1 else found.reshape(-1, self._width)

    def take(self, indices: np.ndarray) -> np.ndarray:
        """These rows, in this order."""
        self._flush()
        if not self._written:
            return self.rows(0, 0)
        shape = (self._written,) if self._width == 1 else (self._written, self._width)
        return np.asarray(np.memmap(self._file, self._dtype, "r", shape=shape)[indices])

    def last_at_most(self, value: int) -> int:
        """The last row whose first number is at most `value`, in a table sorted by it; -1 if there is none."""
        low, high = -1, len(self) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if int(self.rows(middle, middle + 1).flat[0]) <= value:
                low = middle
            else:
                high = middle - 1
        return low

    def _flush(self) -> None:
        left = memoryview(bytes(self._buffer))
        self._buffer.clear()
        offset = self._written * self._row
        self._written += len(left) // self._row
        try:
            while left:  # unbuffered: closing a file whose last bytes did not fit would raise once more
                size = os.pwrite(self._file.fileno(), left, offset)
                left, offset = left[size:], offset + size
        except OSError as error:
            folder = tempfile.gettempdir()
            raise StoreError(
                f"{folder}: tokens are kept here while they are counted: {error.strerror}; set TMPDIR"
            ) from None
