"""Where the rows of an array come from, without any connection: what travels to other processes and is opened there."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np

from actcache.cache.location import Location
from actcache.cache.quantise import QuantisedReader
from actcache.cache.reader import ArrayReader
from actcache.cache.rows import ColumnRows, JoinedRows, LaterRows, Rows, ShiftedRows
from actcache.cache.store import Store, open_store
from actcache.clients.token_index import Span, TokenIndex
from actcache.schemas.array import ArrayLayout
from actcache.schemas.canonical import digest
from actcache.schemas.dtypes import numpy_dtype
from actcache.schemas.quantised import Kind


class Source(ABC):
    """An array of a dataset. It can be pickled, and holds no credentials.

    Attributes:
        name: the array's.
        shape: (row, …).
        dtype: of its values.
        axes: names of its axes, the first of which is `token` for what there is of every token.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    @abstractmethod
    def chunks(self) -> tuple[int, ...]:
        """Rows of each object that it is stored as."""

    @abstractmethod
    def open(self) -> Rows:
        """What reads it. Opened twice in a process, it has one set of connections and indexes."""

    @property
    @abstractmethod
    def places(self) -> tuple[str, ...]:
        """The URLs that it is read from."""

    @property
    @abstractmethod
    def content(self) -> tuple[object, ...]:
        """What tells its content from that of others, wherever it lies: a copy of it has the same."""

    @property
    def key(self) -> tuple[object, ...]:
        """What tells it from others, copies of it too."""
        return ("actcache", self.places, self.content)

    def __dask_tokenize__(self) -> tuple[object, ...]:
        return self.key


class StoredSource(Source):
    """An array as it is stored."""

    def __init__(self, location: Location, manifest: str, layout: ArrayLayout) -> None:
        self._location = location
        self._manifest = manifest
        self._layout = layout
        self.name = layout.name
        self.axes = layout.dimensions
        self.shape = layout.shape
        self.dtype = layout.numpy_dtype

    @property
    def chunks(self) -> tuple[int, ...]:
        """See `Source`."""
        return equal_parts(self._layout.rows, self._layout.shard_rows)

    def open(self) -> Rows:
        """See `Source`."""
        return _reader(self._location, self._manifest, self._layout)

    @property
    def places(self) -> tuple[str, ...]:
        """See `Source`."""
        return (self._location.url,)

    @property
    def content(self) -> tuple[object, ...]:
        """See `Source`."""
        return (self._manifest, self.name, digest(self._layout.document()))


class Derived(Source):
    """What is made of another array row by row: in objects of as many rows, and read from where that one is."""

    def __init__(self, base: Source) -> None:
        self.base = base
        self.name, self.axes, self.shape, self.dtype = base.name, base.axes, base.shape, base.dtype

    @property
    def chunks(self) -> tuple[int, ...]:
        """See `Source`."""
        return self.base.chunks

    @property
    def places(self) -> tuple[str, ...]:
        """See `Source`."""
        return self.base.places


class Shifted(Derived):
    """An array of whole numbers with another added to each: what counts from 0 in each of several datasets."""

    def __init__(self, base: Source, by: int) -> None:
        super().__init__(base)
        self._by = by

    def open(self) -> Rows:
        """See `Source`."""
        return ShiftedRows(self.base.open(), self._by)

    @property
    def content(self) -> tuple[object, ...]:
        """See `Source`."""
        return ("shifted", self.base.content, self._by)


class Column(Derived):
    """One column of an array (row, column)."""

    def __init__(self, base: Source, column: int) -> None:
        super().__init__(base)
        self.column = column
        self.axes, self.shape = base.axes[:1], base.shape[:1]

    def open(self) -> Rows:
        """See `Source`."""
        return ColumnRows(self.base.open(), self.column)

    @property
    def content(self) -> tuple[object, ...]:
        """See `Source`."""
        return ("column", self.base.content, self.column)


class Later(Derived):
    """An array in which each row is the one that comes `by` rows later. The last rows are not there to be read."""

    def __init__(self, base: Source, by: int) -> None:
        super().__init__(base)
        self._by = by

    def open(self) -> Rows:
        """See `Source`."""
        return LaterRows(self.base.open(), self._by)

    @property
    def content(self) -> tuple[object, ...]:
        """See `Source`."""
        return ("later", self.base.content, self._by)


class QuantisedSource(Derived):
    """The values, float32, that a quantised site stands for."""

    def __init__(self, codes: Source, scales: Source, kind: Kind, group: int) -> None:
        super().__init__(codes)
        self._scales = scales
        self._kind = kind
        self._group = group
        self.dtype = numpy_dtype("float32")

    def open(self) -> Rows:
        """See `Source`."""
        return QuantisedReader(self.base.open(), self._scales.open(), self._kind, self._group)

    @property
    def places(self) -> tuple[str, ...]:
        """See `Source`."""
        return (*self.base.places, *self._scales.places)

    @property
    def content(self) -> tuple[object, ...]:
        """See `Source`."""
        return ("quantised", self.base.content, self._scales.content, self._kind, self._group)


class JoinedSource(Source):
    """The same array of several datasets, one after the other."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self._parts = tuple(parts)
        self.name = parts[0].name
        self.axes = parts[0].axes
        self.shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        self.dtype = parts[0].dtype

    @property
    def chunks(self) -> tuple[int, ...]:
        """See `Source`."""
        return tuple(size for part in self._parts for size in part.chunks if size)

    def open(self) -> Rows:
        """See `Source`."""
        lengths = [part.shape[0] for part in self._parts]
        return JoinedRows([part.open for part in self._parts], lengths, self.shape[1:], self.dtype)

    @property
    def places(self) -> tuple[str, ...]:
        """See `Source`."""
        return tuple(place for part in self._parts for place in part.places)

    @property
    def content(self) -> tuple[object, ...]:
        """See `Source`."""
        return ("joined", *(part.content for part in self._parts))


def equal_parts(rows: int, most: int) -> tuple[int, ...]:
    """So many rows in parts of equal size, the last one perhaps smaller; one part of none where there are no rows."""
    whole, rest = divmod(rows, most)
    return (*((most,) * whole), *((rest,) if rest or not whole else ()))


def cuts(source: Source) -> np.ndarray:
    """Row splits of the objects that a source is stored as, (object + 1,), int64."""
    return np.array([0, *accumulate(source.chunks)], np.int64)


def read(source: Source, index: TokenIndex, low: int, high: int, dtype: np.dtype | None = None) -> np.ndarray:
    """The rows of the tokens at positions [low, high) of an index, shape (high - low, …), as `dtype` or as they are.

    Raises:
        Corrupt: a shard is missing or is not what was written.
        StoreError: the store failed.
    """
    if isinstance(index, Span):
        return source.open().read(index.start + low, index.start + high, dtype)
    return source.open().take(index.tokens(low, high), dtype)


@lru_cache(maxsize=512)
def _reader(location: Location, manifest: str, layout: ArrayLayout) -> ArrayReader:
    """One reader, and so one set of shard indexes, for each array in a process.

    The manifest stands in the key so that a dataset made anew at the same URL is not read with old indexes.
    """
    return ArrayReader(_store(location), layout)


@lru_cache(maxsize=64)
def _store(location: Location) -> Store:
    return open_store(location)


def _forget() -> None:
    """In a forked child: what its parent opened is of no use, and a lock of it may be held for ever."""
    _reader.cache_clear()
    _store.cache_clear()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_forget)
