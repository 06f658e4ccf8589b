"""Encoding a shard on threads, from rows that come in any portions and any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field

import numpy as np

from actcache.cache.shards import Piece, assemble, encode_chunk
from actcache.schemas.array import ArrayLayout

Ready = Callable[[], object]
"""Waits until an array holds its values: of one that a device is still copying into."""

Where = slice | np.ndarray


@dataclass(frozen=True)
class Part:
    """Which of some rows go into a chunk, and where in it."""

    chunk: int
    rows: Where
    offsets: Where
    count: int
    end: int


class Placement:
    """Where some rows go in shards, however these are cut: row i becomes the shard's row `at[i]`, each once.

    Raises:
        ValueError: two rows have one place, or one is before the beginning.
    """

    def __init__(self, at: np.ndarray | range) -> None:
        if not isinstance(at, range) and len(at):
            ordered = np.sort(at)
            if ordered[0] < 0 or (np.diff(ordered) == 0).any():
                raise ValueError("rows come twice, or before the beginning of their shard")
        self._at = at
        self._parts: dict[int, list[Part]] = {}

    def __len__(self) -> int:
        return len(self._at)

    def parts(self, chunk_rows: int) -> list[Part]:
        """The chunks that the rows go into, and what of them."""
        if chunk_rows not in self._parts:
            at = self._at
            found = _parts_of_run(at, chunk_rows) if isinstance(at, range) else _parts(at, chunk_rows)
            self._parts[chunk_rows] = list(found)
        return self._parts[chunk_rows]


class ShardEncoder:
    """Encodes one shard, compressing on a pool while more rows are on their way.

    Holds no chunk once it is compressed, and of the chunks that are begun as much as a whole shard where rows come in an
    order that ends all of them late. The pool must begin what it is given in that order.
    """

    def __init__(self, layout: ArrayLayout, pool: Executor) -> None:
        self._layout = layout
        self._pool = pool
        self._pieces: dict[int, Future[Piece]] = {}
        self._begun: dict[int, _Begun] = {}
        self._end = 0

    def append(self, rows: np.ndarray) -> None:
        """Add rows, shape (n, *row_shape), of the layout's dtype, behind those added before. See `place`."""
        at = range(self._end, self._end + len(rows))
        self._end = at.stop
        self.place(Placement(at), rows)

    def place(
        self, placement: Placement, rows: np.ndarray, ready: Ready | None = None
    ) -> list[Future[Piece] | Future[None]]:
        """Add rows, shape (n, *row_shape), of the layout's dtype, where they belong.

        They must not change before the futures that are returned are done. `ready` is called on the pool before they are looked at.

        Raises:
            ValueError: wrong dtype or shape, rows beyond the shard's end, or some that were there before.
        """
        layout = self._layout
        shape = (len(placement), *layout.row_shape)
        if rows.dtype != layout.numpy_dtype or rows.shape != shape:
            raise ValueError(f"{layout.name}: rows of {rows.dtype} {rows.shape}, not {layout.dtype} {shape}")
        reading: list[Future[Piece] | Future[None]] = []
        copies: list[tuple[_Begun, Part]] = []
        for part in placement.parts(layout.chunk_rows):
            self._check(part)
            if part.count == layout.chunk_rows and isinstance(part.rows, slice) and isinstance(part.offsets, slice):
                piece = self._pieces[part.chunk] = self._pool.submit(_encode_when, layout, rows[part.rows], ready)
                reading.append(piece)
            else:
                copies.append((self._count(part), part))
        if copies:
            reading.append(self._copy(copies, rows, ready))
        return reading

    def finish(self) -> memoryview:
        """The shard's bytes.

        Raises:
            ValueError: rows before the last one are missing.
        """
        last = max([*self._begun, *self._pieces], default=0)
        for number, begun in sorted(self._begun.items()):
            if begun.rows != (begun.end if number == last else self._layout.chunk_rows):
                raise ValueError(f"{self._layout.name}: rows of chunk {number} are missing")
            self._pieces[number] = self._pool.submit(_encode_begun, self._layout, begun)
        self._begun.clear()
        if sorted(self._pieces) != list(range(len(self._pieces))):
            raise ValueError(f"{self._layout.name}: whole chunks are missing")
        return assemble(self._layout, [self._pieces.pop(number).result() for number in range(len(self._pieces))])

    def _check(self, part: Part) -> None:
        name, layout = self._layout.name, self._layout
        if part.chunk * layout.chunk_rows + part.end > layout.shard_rows:
            raise ValueError(f"{name}: more rows than the {layout.shard_rows} of a shard")
        begun = self._begun.get(part.chunk)
        if part.chunk in self._pieces or (begun is not None and begun.there[part.offsets].any()):
            raise ValueError(f"{name}: rows of chunk {part.chunk} came twice")

    def _count(self, part: Part) -> _Begun:
        layout = self._layout
        if part.chunk not in self._begun:
            empty = np.empty((layout.chunk_rows, *layout.row_shape), layout.numpy_dtype)
            self._begun[part.chunk] = _Begun(empty, np.zeros(layout.chunk_rows, bool))
        begun = self._begun[part.chunk]
        begun.there[part.offsets] = True
        begun.rows += part.count
        begun.end = max(begun.end, part.end)
        return begun

    def _copy(self, copies: list[tuple[_Begun, Part]], rows: np.ndarray, ready: Ready | None) -> Future[None]:
        """Copy parts of chunks into place, and have those compressed that are whole then."""
        copy = self._pool.submit(_copy_when, copies, rows, ready)
        for begun, part in copies:
            begun.copies.append(copy)
            if begun.rows == self._layout.chunk_rows:
                del self._begun[part.chunk]
                self._pieces[part.chunk] = self._pool.submit(_encode_begun, self._layout, begun)
        return copy


@dataclass(eq=False)
class _Begun:
    """A chunk some of whose rows are there: which, how many, and the end of the last of them."""

    chunk: np.ndarray
    there: np.ndarray
    copies: list[Future[None]] = field(default_factory=list)
    rows: int = 0
    end: int = 0


def encode_shard(layout: ArrayLayout, rows: np.ndarray, pool: Executor) -> memoryview:
    """The bytes of a shard that holds `rows`, shape (n, *row_shape) with n at most the shard's rows."""
    encoder = ShardEncoder(layout, pool)
    encoder.append(rows)
    return encoder.finish()


def _parts(at: np.ndarray, chunk_rows: int) -> Iterator[Part]:
    chunk_of = at // chunk_rows
    order = np.argsort(chunk_of, kind="stable")
    borders = np.flatnonzero(np.diff(chunk_of[order])) + 1
    for rows in np.split(order, borders) if len(at) else ():
        chunk = int(chunk_of[rows[0]])
        offsets = at[rows] - chunk * chunk_rows
        yield Part(chunk, _as_slice(rows), _as_slice(offsets), len(rows), int(offsets.max()) + 1)


def _parts_of_run(at: range, chunk_rows: int) -> Iterator[Part]:
    row = 0
    while row < len(at):
        chunk, offset = divmod(at[row], chunk_rows)
        taken = min(len(at) - row, chunk_rows - offset)
        yield Part(chunk, slice(row, row + taken), slice(offset, offset + taken), taken, offset + taken)
        row += taken


def _as_slice(index: np.ndarray) -> Where:
    first = int(index[0])
    return slice(first, first + len(index)) if (np.diff(index) == 1).all() else index


def _copy_when(copies: list[tuple[_Begun, Part]], rows: np.ndarray, ready: Ready | None) -> None:
    if ready is not None:
        ready()
    for begun, part in copies:
        begun.chunk[part.offsets] = rows[part.rows]


def _encode_when(layout: ArrayLayout, rows: np.ndarray, ready: Ready | None) -> Piece:
    if ready is not None:
        ready()
    return encode_chunk(layout, np.ascontiguousarray(rows))


def _encode_begun(layout: ArrayLayout, begun: _Begun) -> Piece:
    for copy in begun.copies:
        copy.result()
    begun.chunk[begun.end :] = 0
    return encode_chunk(layout, begun.chunk)
