"""The room for activations that are computed and not yet encoded: a number of bytes, however many sites there are."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import Future
from itertools import count
from threading import Condition
from typing import Any

POLL_SECONDS = 0.2


class Staging:
    """Bytes that may be held at once. Who wants more waits until the encoding has given some back."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._held = 0
        self._changed = Condition()

    def take(self, size: int, check: Callable[[], None]) -> None:
        """Wait for room for `size` bytes; more than the whole budget when nothing else is held.

        `check` is called now and then while it waits: what it raises ends the waiting.
        """
        with self._changed:
            while self._held and self._held + size > self._budget:
                self._changed.wait(POLL_SECONDS)
                check()
            self._held += size

    def give_back_after(self, size: int, readers: Collection[Future[Any]]) -> None:
        """Give room back once all of these are done, well or not."""
        if not readers:
            self._give_back(size)
        left = count(len(readers) - 1, -1)

        def done(_: Future[Any]) -> None:
            if next(left) == 0:
                self._give_back(size)

        for reader in readers:
            reader.add_done_callback(done)

    def _give_back(self, size: int) -> None:
        with self._changed:
            self._held -= size
            self._changed.notify_all()
