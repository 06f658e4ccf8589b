"""The engine of the batch loader: a buffer of rows that is filled at random places while batches are taken out of it.

A window's tokens lie anywhere in the buffer. When a batch has been copied out, the places of its tokens are free for those of the next
window, which is read meanwhile; so one buffer is enough, and reading never waits for a window to end. The plan alone decides the order
of what is given out, and threads only when it is there.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from traceback import clear_frames
from typing import Protocol

import numpy as np

from actcache.cache.rows import Rows
from actcache.clients.field import TOKEN, Field
from actcache.clients.shuffle import Plan
from actcache.schemas.errors import StoreError

READERS = 2
"""Units that are read at once; each is decoded by as many threads as there are cores."""
GATHERERS = 2
THREADS = "actcache-batch"
PLACE_BYTES = 32
"""What a place of the buffer takes besides its rows: its token, its turn, and whether it is free."""

Batch = dict[str, np.ndarray]


class Memory(Protocol):
    """Where the arrays of batches come from."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A contiguous array of any content."""


class _Window:
    """The places of a window's tokens: first in the order of reading, when all are there in the order of giving out."""

    def __init__(self, low: int, high: int) -> None:
        self.low = low
        self.missing = high - low
        self.places = np.empty(high - low, np.int32)
        self.order: np.ndarray | None = None
        self.ready = False


class _Making:
    """A batch that is not complete."""

    def __init__(self, arrays: Batch, n: int) -> None:
        self.arrays = arrays
        self.missing = n


class Buffered:
    """The batches of a plan from number `first` on. Used once, by one thread.

    Args:
        plan: what to give out.
        fields: the arrays of a batch; it has also `token`, (n,) int64, their places on the token axis.
        prefetch: batches that are made before they are asked for; at least one is.
        first: the batch to begin with. Of what comes before, the rest of its window is read again.
        memory: where batches lie.
    """

    def __init__(self, plan: Plan, fields: Sequence[Field], prefetch: int, first: int, memory: Memory) -> None:
        self._plan = plan
        self._fields = fields
        self._prefetch = max(1, prefetch)
        self._given = first
        self._memory = memory
        self._begin = min(plan.start + first * plan.size, plan.stop)
        self._window = plan.window_at(self._begin)
        self._at = int(plan.windows[self._window]) if self._begin < plan.stop else plan.stop
        self._unit = int(np.searchsorted(plan.units, self._at))
        self._reading = self._gathering = 0
        self._windows: dict[int, _Window] = {}
        self._making: dict[int, _Making] = {}
        self._ready: dict[int, Batch] = {}
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()

    def __iter__(self) -> Iterator[Batch]:
        """The batches in their order.

        Raises:
            Corrupt, StoreError, IndexError: as `Rows.scatter`, of what could not be read.
        """
        if self._given >= self._plan.n_batches:
            return
        self._rows: list[Rows] = [field.source.open() for field in self._fields]
        places = buffer_places(self._plan)
        self._buffers = [np.empty((places, *field.row_shape), field.source.dtype) for field in self._fields]
        self._tokens = np.empty(places, np.int64)
        self._free = np.arange(places, dtype=np.int32)  # a ring
        self._first_free, self._n_free = 0, places
        self._pool = ThreadPoolExecutor(READERS + GATHERERS, thread_name_prefix=THREADS)
        _running.add(self)
        try:
            with self._changed:
                self._schedule()
            while self._given < self._plan.n_batches:
                yield self._next()
        finally:
            self._close()

    def _next(self) -> Batch:
        with self._changed:
            self._changed.wait_for(lambda: self._given in self._ready or self._error is not None)
            if self._given not in self._ready:
                assert self._error is not None
                raise self._error
            batch = self._ready.pop(self._given)
            self._given += 1
            self._schedule()
            return batch

    def _close(self) -> None:
        if self._closed:
            return
        with self._changed:
            self._closed = True
        # A collection of garbage may have come upon us on one of our own threads, which cannot wait for itself.
        own = threading.current_thread().name.startswith(THREADS)
        self._pool.shutdown(wait=not own, cancel_futures=True)
        self._buffers.clear()

    def _schedule(self) -> None:
        """Begin whatever can be begun. The caller holds the lock."""
        plan = self._plan
        while not self._stopped and self._reading < READERS and self._unit < len(plan.window_of):
            count = int(plan.units[self._unit + 1] - plan.units[self._unit])
            if count > self._n_free:
                break
            number = int(plan.window_of[self._unit])
            if number not in self._windows:
                self._windows[number] = _Window(int(plan.windows[number]), int(plan.windows[number + 1]))
            self._reading += 1
            self._submit(self._read, self._unit, self._windows[number], self._take(count))
            self._unit += 1
        while not self._stopped and self._gathering < GATHERERS and self._at < plan.stop:
            window = self._windows.get(self._window)
            number = (self._at - plan.start) // plan.size
            if window is None or not window.ready or (number >= self._given + self._prefetch):
                break
            low, self._at = self._at, self._end(number)
            self._gathering += 1
            self._submit(self._gather, number, window, low, self._at)
            if self._at == int(plan.windows[self._window + 1]):
                del self._windows[self._window]
                self._window += 1

    def _end(self, number: int) -> int:
        """Where what is gathered next ends: with the batch, with the window, or where the first batch begins."""
        plan = self._plan
        if self._at < self._begin:
            return self._begin
        return min(plan.start + (number + 1) * plan.size, int(plan.windows[self._window + 1]))

    @property
    def _stopped(self) -> bool:
        return self._closed or self._error is not None

    def _submit(self, work: Callable[..., None], *arguments: object) -> None:
        self._pool.submit(self._run, work, *arguments)

    def _run(self, work: Callable[..., None], *arguments: object) -> None:
        try:
            work(*arguments)
            with self._changed:
                self._schedule()
                self._changed.notify()
        except BaseException as error:
            clear_frames(error.__traceback__)  # whoever keeps the error shall not keep the buffer
            with self._changed:
                self._error = self._error or error
                self._changed.notify()

    def _read(self, unit: int, window: _Window, places: np.ndarray) -> None:
        low, high = int(self._plan.units[unit]), int(self._plan.units[unit + 1])
        if low == window.low:
            window.order = self._plan.order(int(self._plan.window_of[unit]))
        places.sort()  # neighbours are written to ascending places
        tokens = self._plan.tokens(unit)
        self._tokens[places] = tokens
        for rows, buffer in zip(self._rows, self._buffers, strict=True):
            rows.scatter(tokens, buffer, places)
        window.places[low - window.low : high - window.low] = places
        with self._changed:
            self._reading -= 1
            window.missing -= high - low
            if window.missing:
                return
        assert window.order is not None
        window.places = window.places[window.order]
        window.order = None
        window.ready = True

    def _gather(self, number: int, window: _Window, low: int, high: int) -> None:
        places = window.places[low - window.low : high - window.low]
        if low >= self._begin:
            self._copy(number, places, low - self._plan.start - number * self._plan.size)
        with self._changed:
            self._gathering -= 1
            self._give_back(places)

    def _copy(self, number: int, places: np.ndarray, start: int) -> None:
        with self._changed:
            if number not in self._making:
                n = min(self._plan.size, self._plan.stop - self._plan.start - number * self._plan.size)
                arrays = {field.name: self._memory.empty((n, *field.row_shape), field.dtype) for field in self._fields}
                arrays[TOKEN] = self._memory.empty((n,), self._tokens.dtype)
                self._making[number] = _Making(arrays, n)
            making = self._making[number]
        stop = start + len(places)
        np.take(self._tokens, places, out=making.arrays[TOKEN][start:stop], mode="clip")
        for field, buffer in zip(self._fields, self._buffers, strict=True):
            field.gather(buffer, places, making.arrays[field.name][start:stop])
        with self._changed:
            making.missing -= len(places)
            if not making.missing:
                self._ready[number] = self._making.pop(number).arrays

    def _take(self, count: int) -> np.ndarray:
        """Free places, which are not free any more. The caller holds the lock."""
        at = np.arange(self._first_free, self._first_free + count)
        self._first_free = (self._first_free + count) % len(self._free)
        self._n_free -= count
        return np.take(self._free, at, mode="wrap")

    def _give_back(self, places: np.ndarray) -> None:
        """Places that are free again. The caller holds the lock."""
        at = self._first_free + self._n_free + np.arange(len(places))
        self._free[at % len(self._free)] = places
        self._n_free += len(places)


_running: weakref.WeakSet[Buffered] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Close what an exiting program left open, while everything that closing needs is still there."""
    for engine in list(_running):
        engine._close()


def _forked() -> None:
    """In a forked child: the threads of what its parent iterates are not there, and its lock may be held for ever."""
    for engine in list(_running):
        engine._changed = threading.Condition()
        engine._closed = True
        engine._error = StoreError("these batches were begun before this process was forked; iterate anew here")


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_forked)


def buffer_places(plan: Plan) -> int:
    """Rows that the buffer holds: a window, and what is read of the next while the first batches of a window are copied out."""
    window, unit = plan.largest
    return min(plan.stop - plan.start, window + READERS * unit)
