"""Reading rows of an array: whole shards with one GET, a few chunks with ranges. A missing shard is an error, never zeros."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

import numpy as np

from actcache.cache.shards import chunk_span, decode_chunk, decode_index, decode_shard
from actcache.cache.store import Store
from actcache.schemas.array import ArrayLayout
from actcache.schemas.errors import Corrupt, NotFound

WHOLE_SHARD_FRACTION = 0.5
INDEXES_KEPT = 256
GAP_BYTES = 256 << 10


class ArrayReader:
    """Rows of one stored array, by row range. Safe to use from several threads."""

    def __init__(self, store: Store, layout: ArrayLayout) -> None:
        self.store = store
        self.layout = layout
        self._indexes: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = Lock()

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop), shape (stop - start, *row_shape), in the stored dtype.

        Raises:
            IndexError: the range is not within the array.
            Corrupt: a shard is missing or is not what was written.
            StoreError: the store failed.
        """
        layout = self.layout
        stop = layout.rows if stop is None else stop
        if not 0 <= start <= stop <= layout.rows:
            raise IndexError(f"{layout.name}: rows {start}:{stop} of {layout.rows}")
        first, last = start // layout.shard_rows, max(stop - 1, start) // layout.shard_rows
        if first == last:
            return self._read_shard(first, start, stop)
        out = np.empty((stop - start, *layout.row_shape), layout.numpy_dtype)
        for shard in range(first, last + 1):
            low, high = layout.shard_range(shard)
            low, high = max(low, start), min(high, stop)
            out[low - start : high - start] = self._read_shard(shard, low, high)
        return out

    def _read_shard(self, shard: int, start: int, stop: int) -> np.ndarray:
        layout = self.layout
        low, high = layout.shard_range(shard)
        if start >= stop:
            return np.empty((0, *layout.row_shape), layout.numpy_dtype)
        first, last = (start - low) // layout.chunk_rows, (stop - 1 - low) // layout.chunk_rows
        stored = -(-(high - low) // layout.chunk_rows)
        if last - first + 1 > WHOLE_SHARD_FRACTION * stored:
            key = layout.shard_key(shard)
            try:
                data = self.store.get(key)
            except NotFound:
                raise self._missing(key) from None
            rows = decode_shard(layout, data, high - low, self._where(key))
            return rows[start - low : stop - low]
        return self._read_chunks(shard, first, last)[start - low - first * layout.chunk_rows :][: stop - start]

    def _read_chunks(self, shard: int, first: int, last: int) -> np.ndarray:
        """Chunks first … last of a shard, which lie side by side: one range read."""
        layout = self.layout
        key = layout.shard_key(shard)
        where = self._where(key)
        index = self._index(shard, key)
        spans = [chunk_span(layout, index, chunk, 1 << 62, where) for chunk in range(first, last + 1)]
        begin, end = min(offset for offset, _ in spans), max(offset + length for offset, length in spans)
        wanted = sum(length for _, length in spans)
        if end - begin > wanted + GAP_BYTES * len(spans):
            raise Corrupt(f"{where}: chunks {first} to {last} do not lie side by side")
        data = self.store.get_range(key, begin, end - begin)
        if len(data) != end - begin:
            raise Corrupt(f"{where}: the object is shorter than its index says")
        rows = np.empty(((last - first + 1) * layout.chunk_rows, *layout.row_shape), layout.numpy_dtype)
        for number, (offset, length) in enumerate(spans):
            out = rows[number * layout.chunk_rows : (number + 1) * layout.chunk_rows]
            decode_chunk(layout, data[offset - begin : offset - begin + length], out, where)
        return rows

    def _index(self, shard: int, key: str) -> np.ndarray:
        with self._lock:
            if shard in self._indexes:
                self._indexes.move_to_end(shard)
                return self._indexes[shard]
        try:
            tail = self.store.get_end(key, self.layout.index_bytes)
        except NotFound:
            raise self._missing(key) from None
        index = decode_index(self.layout, tail, self._where(key))
        with self._lock:
            self._indexes[shard] = index
            while len(self._indexes) > INDEXES_KEPT:
                self._indexes.popitem(last=False)
        return index

    def _where(self, key: str) -> str:
        return str(self.store.location.child(key))

    def _missing(self, key: str) -> Corrupt:
        return Corrupt(f"{self._where(key)}: the shard is missing; copy it again from where the dataset came")
