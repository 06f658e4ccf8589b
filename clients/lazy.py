"""Rows of a view as lazy Dask arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.clients.sources import Source, cuts, equal_parts, read
from actcache.clients.token_index import Span, TokenIndex
from actcache.schemas.errors import InvalidInput

if TYPE_CHECKING:
    import dask.array as da

FEWEST_PARTS = 4
"""A chunk of selected tokens grows until it has at least a quarter as many rows as an object of the store."""


class LazyRows:
    """What a Dask graph holds of an array: where it comes from, which of its rows, and the dtype to make of it."""

    def __init__(self, source: Source, index: TokenIndex, dtype: np.dtype) -> None:
        self.source = source
        self.index = index
        self.dtype = dtype
        self.shape = (len(index), *source.shape[1:])
        self.ndim = len(self.shape)

    def __getitem__(self, key: Any) -> Any:
        """Rows by a slice, an integer or a list, then whatever numpy makes of the rest of the key."""
        key = key if isinstance(key, tuple) else (key,)
        rows, rest = key[0], key[1:]
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.shape[0])
            if abs(step) > 1:
                return self[(np.arange(start, stop, step), *rest)]
            low, high = (start, stop) if step > 0 else (stop + 1, start + 1)
            found = self._read(low, max(low, high))[::step]
        elif isinstance(rows, int | np.integer):
            row = int(rows) + (self.shape[0] if rows < 0 else 0)
            return self._read(row, row + 1)[0][rest]
        else:
            wanted = np.asarray(rows)
            wanted = np.flatnonzero(wanted) if wanted.dtype == bool else wanted
            wanted = np.where(wanted < 0, wanted + self.shape[0], wanted)
            found = self.source.open().take(self.index.at(wanted), self.dtype)
        return found[(slice(None), *rest)]

    def _read(self, low: int, high: int) -> np.ndarray:
        return read(self.source, self.index, low, high, self.dtype)

    def __dask_tokenize__(self) -> tuple[object, ...]:
        whole = isinstance(self.index, Span) and len(self.index) == self.source.shape[0]
        return (*self.source.key, self.dtype.name, *(() if whole else self.index.key))


class LazyStack:
    """What a Dask graph holds of several arrays of equal shape, one above the other: (array, row, …)."""

    def __init__(self, parts: Sequence[LazyRows]) -> None:
        self.parts = tuple(parts)
        self.dtype = parts[0].dtype
        self.shape = (len(parts), *parts[0].shape)
        self.ndim = len(self.shape)

    def __getitem__(self, key: Any) -> Any:
        """Arrays by a slice, an integer or a list, then the rest of the key of each."""
        key = key if isinstance(key, tuple) else (key,)
        wanted, rest = np.arange(len(self.parts))[key[0]], key[1:] or (slice(None),)
        if wanted.ndim == 0:
            return self.parts[int(wanted)][rest]
        if not len(wanted):
            return np.empty((0, *np.broadcast_to(np.empty((), self.dtype), self.shape[1:])[rest].shape), self.dtype)
        return np.stack([self.parts[number][rest] for number in wanted.tolist()])

    def __dask_tokenize__(self) -> tuple[object, ...]:
        return tuple(part.__dask_tokenize__() for part in self.parts)


def lazy_stack(name: str, sources: Sequence[Source], index: TokenIndex, dtype: np.dtype) -> da.Array:
    """The rows of a view of several arrays as one Dask array (array, row, …), chunked as `lazy` does each. Reads nothing."""
    stored = LazyStack([LazyRows(source, index, dtype) for source in sources])
    return _array(name, stored, ((1,) * len(sources), _rows(sources[0], index, None)), isinstance(index, Span))


def lazy(source: Source, index: TokenIndex, dtype: np.dtype, chunks: int | None = None) -> da.Array:
    """The rows of a view as a Dask array. Reads nothing.

    A Dask chunk is what the view has of one object of the store, or `chunks` rows. Where a mask keeps few tokens of each object,
    neighbours share a chunk.
    """
    stored = LazyRows(source, index, dtype)
    return _array(source.name, stored, (_rows(source, index, chunks),), isinstance(index, Span))


def _array(name: str, stored: LazyRows | LazyStack, chunks: tuple[tuple[int, ...], ...], inline: bool) -> da.Array:
    """A Dask array of what is stored, whole along the axes that `chunks` does not name.

    A mask is not in line: it is sent to a worker once, and not with every task.
    """
    import dask.array as da
    from dask.base import tokenize

    array: da.Array = da.from_array(  # type: ignore[no-untyped-call]
        stored,
        chunks=(*chunks, *((size,) for size in stored.shape[len(chunks) :])),
        name=f"{name}-{tokenize(stored)}",
        lock=False,
        meta=np.empty((0,) * stored.ndim, stored.dtype),
        inline_array=inline,
    )
    return array


def _rows(source: Source, index: TokenIndex, chunks: int | None) -> tuple[int, ...]:
    """Rows of each Dask chunk."""
    if chunks is not None:
        if type(chunks) is not int or chunks < 1:
            raise InvalidInput(f"chunks={chunks!r}: give the number of tokens of a Dask chunk, at least 1")
        return equal_parts(len(index), chunks)
    if isinstance(index, Span) and len(index) == source.shape[0]:
        return source.chunks
    most = max(source.chunks)
    if not index.ascending:
        return equal_parts(len(index), most)
    found: list[int] = []
    for count in index.counts(cuts(source)).tolist():
        if found and found[-1] * FEWEST_PARTS < most and found[-1] + count <= most:
            found[-1] += count
        elif count:
            found.append(count)
    return tuple(found) or (0,)
