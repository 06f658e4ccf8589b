"""Lazy Dask arrays over stored ones."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.cache.location import Location
from actcache.cache.reader import ArrayReader
from actcache.cache.store import open_store
from actcache.schemas.array import ArrayLayout
from actcache.schemas.canonical import digest

if TYPE_CHECKING:
    import dask.array as da


class StoredArray:
    """What a Dask graph holds of a stored array: where it is and how it is cut. Travels without credentials."""

    def __init__(self, location: Location, manifest: str, layout: ArrayLayout, dtype: np.dtype) -> None:
        self.location = location
        self.manifest = manifest
        self.layout = layout
        self.dtype = dtype
        self.shape = layout.shape
        self.ndim = len(layout.shape)

    def __getitem__(self, index: Any) -> Any:
        """Rows by one slice of the first axis, then whatever numpy makes of the rest of the index."""
        index = index if isinstance(index, tuple) else (index,)
        rows, rest = index[0], index[1:]
        reader = self.reader()
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.shape[0])
            if step > 0:
                stop = max(start, stop)
                found = reader.read(start, stop)[:: step if step > 1 else None]
            else:
                low, high = min(stop + 1, start + 1), start + 1
                found = reader.read(low, high)[::-1][::-step]
        elif isinstance(rows, int | np.integer):
            row = int(rows) + (self.shape[0] if rows < 0 else 0)
            found = reader.read(row, row + 1)[0]
            return found[rest].astype(self.dtype, copy=False)
        else:
            wanted = np.asarray(rows)
            wanted = np.flatnonzero(wanted) if wanted.dtype == bool else wanted
            low = int(wanted.min()) if len(wanted) else 0
            found = reader.read(low, int(wanted.max()) + 1 if len(wanted) else 0)[wanted - low]
        return found[(slice(None), *rest)].astype(self.dtype, copy=False)

    def reader(self) -> Any:
        """What reads rows of it."""
        return reader_of(self.location, self.manifest, self.layout)

    def __dask_tokenize__(self) -> tuple[str, ...]:
        layout = digest([self.layout.document(), self.dtype.name])
        return ("actcache", self.location.url, self.manifest, self.layout.name, layout)


@lru_cache(maxsize=512)
def reader_of(location: Location, manifest: str, layout: ArrayLayout) -> ArrayReader:
    """One reader, and so one connection pool and one set of shard indexes, for each array in a process.

    The manifest stands in the key so that a dataset made anew at the same URL is not read with old indexes.
    """
    return ArrayReader(_store(location), layout)


@lru_cache(maxsize=64)
def _store(location: Location) -> Any:
    return open_store(location)


def lazy_array(location: Location, manifest: str, layout: ArrayLayout, dtype: np.dtype | None) -> da.Array:
    """A stored array as a Dask array, one Dask chunk a shard, of `dtype` or as stored. Reads nothing."""
    return lazy(StoredArray(location, manifest, layout, dtype or layout.numpy_dtype))


def lazy(stored: StoredArray) -> da.Array:
    """A Dask array of a stored one, one Dask chunk a shard."""
    import dask.array as da
    from dask.base import tokenize

    layout = stored.layout
    chunks = (layout.shard_rows, *layout.row_shape)
    array: da.Array = da.from_array(  # type: ignore[no-untyped-call]
        stored,
        chunks=chunks,
        name=f"{layout.name}-{tokenize(stored)}",
        lock=False,
        meta=np.empty((0,) * stored.ndim, stored.dtype),
        inline_array=True,
    )
    return array
