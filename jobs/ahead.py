"""Making the next things while the last ones are used."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")
POLL_SECONDS = 0.1


@contextmanager
def ahead(items: Iterable[T], name: str, depth: int = 2) -> Iterator[Iterator[T]]:
    """The same items in the same order, made by a thread, at most `depth` of them before they are asked for.

    What making them raises is raised where the next item would have come. The thread has ended when the `with` has.
    """
    made: Queue[tuple[bool, T | BaseException | None]] = Queue(depth)
    unwanted = Event()

    def put(entry: tuple[bool, T | BaseException | None]) -> None:
        while not unwanted.is_set():
            try:
                made.put(entry, timeout=POLL_SECONDS)
                return
            except Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put((True, item))
                if unwanted.is_set():
                    return
            put((False, None))
        except BaseException as error:  # whatever it is, it belongs to who asks for the items
            put((False, error))
        finally:
            if isinstance(items, Generator):
                items.close()

    def taken() -> Iterator[T]:
        while True:
            there, item = made.get()
            if not there:
                if item is not None:
                    raise item  # type: ignore[misc]
                return
            yield item  # type: ignore[misc]

    thread = Thread(target=make, name=f"actcache-{name}", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        unwanted.set()
        while thread.is_alive():
            try:
                made.get_nowait()
            except Empty:
                thread.join(POLL_SECONDS)
