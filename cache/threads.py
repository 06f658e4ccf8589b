"""The threads of the read path: some that wait for bytes, and as many as there are cores that decode. One set a process."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from threading import Lock
from typing import TypeVar

from actcache.cache.cores import available_cores

T = TypeVar("T")
R = TypeVar("R")

FETCHERS = 32


class _Threads:
    """What a process has. A forked child has none of its parent's threads, and makes its own."""

    def __init__(self) -> None:
        self.cores = available_cores()
        self.fetchers = ThreadPoolExecutor(FETCHERS, thread_name_prefix="actcache-fetch")
        self.decoders = ThreadPoolExecutor(self.cores, thread_name_prefix="actcache-decode")
        self.decoding = 0
        self.lock = Lock()

    def enter(self, most_helpers: int) -> int:
        """Count the caller as decoding; how many others may help it without there being more of them than cores."""
        with self.lock:
            helpers = max(0, min(most_helpers, self.cores - 1 - self.decoding))
            self.decoding += 1 + helpers
            return helpers

    def leave(self) -> None:
        """Count one out."""
        with self.lock:
            self.decoding -= 1

    @property
    def crowded(self) -> bool:
        """Whether more threads decode than there are cores: then who only helps had better stop."""
        return self.decoding > self.cores


_threads: _Threads | None = None
_making = Lock()


def _all() -> _Threads:
    global _threads
    with _making:
        if _threads is None:
            _threads = _Threads()
        return _threads


def _forget() -> None:
    global _threads, _making
    _threads, _making = None, Lock()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_forget)


def ahead(make: Callable[[T], R], items: Iterable[T], weigh: Callable[[T], int], most: int) -> Iterator[R]:
    """`make` of every item, in their order, run by fetching threads before they are asked for.

    Those under way, and those made and not yet taken, weigh at most `most` together, or are one. `make` must not wait for another item.
    """
    items = iter(items)
    first = list(islice(items, 2))
    if len(first) < 2:
        yield from map(make, first)  # nothing to be ahead of
        return
    pool = _all().fetchers
    under_way: deque[tuple[int, Future[R]]] = deque()
    weight = 0
    try:
        for item in chain(first, items):
            own = weigh(item)
            while under_way and (weight + own > most or len(under_way) >= FETCHERS):
                weight -= under_way[0][0]
                yield under_way.popleft()[1].result()
            under_way.append((own, pool.submit(make, item)))
            weight += own
        while under_way:
            yield under_way.popleft()[1].result()
    finally:
        for _, future in under_way:
            future.cancel()


def spread(work: Callable[[T], object], items: Sequence[T]) -> None:
    """Call `work` on every item, here and on threads that have nothing else to decode.

    What it raises first is raised, when nothing of it runs any more.
    """
    threads = _all()
    todo = iter(items)
    lock = Lock()

    def do_next() -> bool:
        with lock:
            item = next(todo, _END)
        if item is _END:
            return False
        try:
            work(item)  # type: ignore[arg-type]
        except BaseException:
            with lock:
                for _ in todo:
                    pass
            raise
        return True

    def help_out() -> None:
        try:
            while not threads.crowded and do_next():
                pass
        finally:
            threads.leave()

    futures = [threads.decoders.submit(help_out) for _ in range(threads.enter(len(items) - 1))]
    failed: list[BaseException] = []
    try:
        while do_next():
            pass
    finally:
        threads.leave()
        for future in futures:
            if future.cancel():
                threads.leave()
            elif (error := future.exception()) is not None:
                failed.append(error)
    if failed:
        raise failed[0]


_END = object()
