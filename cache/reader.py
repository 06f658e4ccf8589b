"""Reading rows of a stored array: few ranges, decoded on threads into their place. A missing shard is an error, never zeros."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import numpy as np

from actcache.cache.rows import Rows, check_index
from actcache.cache.shards import ADVICE, chunk_span, decode_chunk, decode_index
from actcache.cache.store import Store
from actcache.cache.threads import ahead, spread
from actcache.schemas.array import ArrayLayout
from actcache.schemas.errors import Corrupt, NotFound

WHOLE_SHARD_FRACTION = 0.5
INDEX_BYTES_KEPT = 32 << 20
AHEAD_BYTES = 48 << 20
UNKNOWN_SIZE = 1 << 62


@dataclass(frozen=True)
class Want:
    """What is wanted of one chunk: which of its rows, and where they go in the array that is filled."""

    shard: int
    chunk: int
    rows: slice | np.ndarray
    at: slice | np.ndarray


@dataclass(frozen=True)
class Span:
    """A want, and where the bytes of its chunk lie in the shard."""

    want: Want
    offset: int
    length: int

    @property
    def end(self) -> int:
        """Where its bytes end."""
        return self.offset + self.length


@dataclass(frozen=True)
class Range:
    """Bytes of a shard from `start` on, the spans that lie in them, and the bytes themselves once they are there.

    `where` is what errors call the shard.
    """

    where: str
    key: str
    start: int
    spans: tuple[Span, ...]
    data: memoryview | None = None

    @property
    def length(self) -> int:
        """Bytes from the first span to the last."""
        return self.spans[-1].end - self.start


class ArrayReader(Rows):
    """Rows of one stored array.

    The index of a shard is read once and kept. Chunks that lie near each other are fetched as one range, in parts of the size that the
    store likes; several threads fetch ranges while those that are there are decoded.
    """

    def __init__(self, store: Store, layout: ArrayLayout) -> None:
        self.store = store
        self.layout = layout
        self.shape = layout.shape
        self.dtype = layout.numpy_dtype
        self._indexes: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, start: int = 0, stop: int | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        """See `Rows`."""
        stop = self.check_range(start, stop, self.layout.name)
        out = np.empty((stop - start, *self.layout.row_shape), dtype or self.dtype)
        self._fill(out, self._wants_of_range(start, stop))
        return out

    def scatter(self, index: np.ndarray, out: np.ndarray, at: np.ndarray) -> None:
        """See `Rows`."""
        index = np.asarray(index, np.int64)
        check_index(index, self.layout.rows, self.layout.name)
        self._fill(out, self._wants_of_rows(index, np.asarray(at, np.int64)))

    def _wants_of_range(self, start: int, stop: int) -> Iterator[Want]:
        step = self.layout.chunk_rows
        for low in range(start // step * step, stop, step):
            first, last = max(start, low), min(stop, low + step)
            shard, chunk = divmod(low // step, self.layout.chunks_per_shard)
            yield Want(shard, chunk, slice(first - low, last - low), slice(first - start, last - start))

    def _wants_of_rows(self, index: np.ndarray, at: np.ndarray) -> Iterator[Want]:
        if len(index) > 1 and (np.diff(index) < 0).any():
            order = np.argsort(index, kind="stable")
            index, at = index[order], at[order]
        numbers = index // self.layout.chunk_rows
        edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(index)] if len(index) else []
        for low, high in pairwise(edges):
            number = int(numbers[low])
            shard, chunk = divmod(number, self.layout.chunks_per_shard)
            rows = index[low:high] - number * self.layout.chunk_rows
            yield Want(shard, chunk, _run(rows), _run(at[low:high]))

    def _fill(self, out: np.ndarray, wants: Iterable[Want]) -> None:
        shards = ((shard, list(group)) for shard, group in groupby(wants, lambda want: want.shard))
        opened = ahead(lambda each: self._open(*each), shards, lambda each: self._first_bytes(*each), AHEAD_BYTES)
        ranges = (found for ranges in opened for found in ranges)
        for found in ahead(self._fetch, ranges, lambda found: found.length, AHEAD_BYTES):
            spread(lambda span, found=found: self._decode(found, span, out), found.spans)  # type: ignore[misc]

    def _is_whole(self, shard: int, wants: list[Want]) -> bool:
        low, high = self.layout.shard_range(shard)
        return len(wants) > WHOLE_SHARD_FRACTION * -(-(high - low) // self.layout.chunk_rows)

    def _first_bytes(self, shard: int, wants: list[Want]) -> int:
        """Bytes that opening a shard fetches at most."""
        if not self._is_whole(shard, wants):
            return self.layout.index_bytes
        return max(self.layout.index_bytes, self.store.part_bytes or self.layout.shard_rows * self.layout.row_bytes)

    def _open(self, shard: int, wants: list[Want]) -> list[Range]:
        """The ranges of a shard that have what is wanted. Where most of it is, those come with bytes that had to be read for the index."""
        key = self.layout.shard_key(shard)
        where = self._where(key)
        whole = self._is_whole(shard, wants)
        index, data, begin, size = self._index(shard), None, UNKNOWN_SIZE, UNKNOWN_SIZE
        try:
            if whole and self.store.part_bytes is None:
                data = self.store.get(key)
                size, begin = len(data), 0
            elif whole and index is None:
                data, size = self.store.get_tail(key, self._first_bytes(shard, wants))
                begin = size - len(data)
            elif index is None:
                data = self.store.get_end(key, self.layout.index_bytes)
        except NotFound:
            raise self._missing(key) from None
        if data is not None:
            index = decode_index(self.layout, data[-self.layout.index_bytes :], where)
            self._keep(shard, index)
        assert index is not None
        spans = [Span(want, *chunk_span(self.layout, index, want.chunk, size, where)) for want in wants]
        spans.sort(key=lambda span: span.offset)
        here = tuple(span for span in spans if span.offset >= begin)
        ranges = self._ranges(where, key, [span for span in spans if span.offset < begin])
        return [Range(where, key, begin, here, data), *ranges] if here else ranges

    def _ranges(self, where: str, key: str, spans: list[Span]) -> list[Range]:
        """Spans in ascending order as ranges: those near each other together, up to the size of a part."""
        groups: list[list[Span]] = []
        for span in spans:
            last = groups[-1] if groups else None
            near = last is not None and span.offset - last[-1].end <= self.store.gap_bytes
            if last is not None and near and span.end - last[0].offset <= (self.store.part_bytes or AHEAD_BYTES):
                last.append(span)
            else:
                groups.append([span])
        return [Range(where, key, group[0].offset, tuple(group)) for group in groups]

    def _fetch(self, wanted: Range) -> Range:
        if wanted.data is not None:
            return wanted
        try:
            data = self.store.get_range(wanted.key, wanted.start, wanted.length)
        except NotFound:
            raise self._missing(wanted.key) from None
        if len(data) != wanted.length:
            raise Corrupt(f"{wanted.where}: the object is shorter than its index says; {ADVICE}")
        return replace(wanted, data=data)

    def _decode(self, found: Range, span: Span, out: np.ndarray) -> None:
        """Decode a chunk into its place: at once where all of it is wanted as it is, else by way of this thread's own memory."""
        assert found.data is not None
        packed = found.data[span.offset - found.start : span.end - found.start]
        want = span.want
        is_run = isinstance(want.rows, slice) and isinstance(want.at, slice)
        if (
            is_run
            and want.rows == slice(0, self.layout.chunk_rows)
            and out.dtype == self.dtype
            and out.flags.c_contiguous
        ):
            decode_chunk(self.layout, packed, out[want.at], found.where)
            return
        whole = (
            _scratch(self.layout.chunk_bytes).view(self.dtype).reshape(self.layout.chunk_rows, *self.layout.row_shape)
        )
        decode_chunk(self.layout, packed, whole, found.where)
        out[want.at] = whole[want.rows]

    def _index(self, shard: int) -> np.ndarray | None:
        """A shard's index, if it is known."""
        with self._lock:
            if shard in self._indexes:
                self._indexes.move_to_end(shard)
            return self._indexes.get(shard)

    def _keep(self, shard: int, index: np.ndarray) -> None:
        with self._lock:
            self._indexes[shard] = index
            while len(self._indexes) * self.layout.index_bytes > INDEX_BYTES_KEPT and len(self._indexes) > 1:
                self._indexes.popitem(last=False)

    def _where(self, key: str) -> str:
        return str(self.store.location.child(key))

    def _missing(self, key: str) -> Corrupt:
        return Corrupt(f"{self._where(key)}: the shard is missing; copy it again from where the dataset came")


def _run(rows: np.ndarray) -> slice | np.ndarray:
    """Rows one after the other as a slice, which numpy copies without a detour; others as they are."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first == len(rows) - 1 and (np.diff(rows) == 1).all() else rows


_own = threading.local()


def _scratch(size: int) -> np.ndarray:
    """Bytes of this thread's own, for a chunk that is decoded and then copied: they stay in the core's cache."""
    memory: np.ndarray | None = getattr(_own, "memory", None)
    if memory is None or len(memory) < size:
        memory = _own.memory = np.empty(size, np.uint8)
    return memory[:size]
