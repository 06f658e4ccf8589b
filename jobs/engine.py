"""What hands blocks to workers and tells what became of them: in this process, or on a Dask cluster (`jobs/cluster.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

from actcache.jobs.forecast import Sample
from actcache.jobs.memory_plan import BLOCKS_AT_ONCE
from actcache.jobs.worker import Done, Worker
from actcache.schemas.errors import ActcacheError, InvalidInput, StoreError
from actcache.schemas.root import ReplayResult

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Ticked:
    """Some tokens of a block were run; it is not stored yet."""

    block: int
    tokens: int


@dataclass(frozen=True)
class Failed:
    """A block ended with an error; nothing of it is lost that was stored.

    `elsewhere`: it may go well on another worker. `attempts`: as how many it counts.
    """

    block: int
    error: Exception
    elsewhere: bool = False
    attempts: int = 1


Event = Done | Failed | Ticked


def is_final(error: Exception, elsewhere: bool) -> bool:
    """Whether trying again is of no use: the same would happen, and not only on this worker (`elsewhere`)."""
    again = not isinstance(error, ActcacheError) or isinstance(error, StoreError)
    return not again and not (elsewhere and isinstance(error, InvalidInput))


class Engine(Protocol):
    """Runs blocks somewhere. `retries` says how often a block may fail."""

    retries: int

    @property
    def window(self) -> int:
        """How many blocks it should be given at once."""
        ...

    @property
    def workers(self) -> int:
        """How many processes there are to run blocks now."""
        ...

    def submit(self, block: int) -> None:
        """Have a block run."""
        ...

    def next(self) -> Event | None:
        """What happened; None when nothing did for a while.

        Raises:
            StoreError: the cluster is gone.
        """
        ...

    def replay(self) -> ReplayResult:
        """Replay a few stored sequences where a model is."""
        ...

    def sample(self, limit: int) -> Sample:
        """Run about so many tokens where a model is, and tell what that took."""
        ...


class InProcess:
    """Runs blocks on threads of this process."""

    window = BLOCKS_AT_ONCE
    retries = 0
    workers = 1

    def __init__(self, worker: Worker, threads: ThreadPoolExecutor) -> None:
        self._worker = worker
        self._threads = threads
        self._events: SimpleQueue[Event] = SimpleQueue()

    def submit(self, block: int) -> None:
        """See `Engine`."""
        self._threads.submit(self._perform, block)

    def next(self) -> Event | None:
        """See `Engine`."""
        try:
            return self._events.get(timeout=POLL_SECONDS)
        except Empty:
            return None

    def replay(self) -> ReplayResult:
        """See `Engine`."""
        return self._worker.replay()

    def sample(self, limit: int) -> Sample:
        """See `Engine`."""
        return self._worker.sample(limit)

    def _perform(self, block: int) -> None:
        try:
            self._events.put(self._worker.perform(block, lambda tokens: self._events.put(Ticked(block, tokens))))
        except Exception as error:  # it is told where the blocks are handed out
            self._events.put(Failed(block, error))


@contextmanager
def in_process(make: Callable[[], Worker]) -> Iterator[InProcess]:
    """An engine on this process. When the `with` ends early, blocks under way end at their next batch."""
    worker = make()
    try:
        with ThreadPoolExecutor(BLOCKS_AT_ONCE, "actcache-block") as threads:
            try:
                yield InProcess(worker, threads)
            except BaseException:
                worker.stop()
                threads.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        worker.close()
