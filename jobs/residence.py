"""A build's job on a Dask worker: what runs its blocks there, and how what fails is told."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock, Thread
from typing import Any, TypeVar

import distributed
import torch
from distributed.diagnostics.plugin import WorkerPlugin

from actcache.jobs.engine import is_final
from actcache.jobs.forecast import Sample
from actcache.jobs.memory_plan import BLOCKS_AT_ONCE
from actcache.jobs.worker import Done, Job, Stopped, Worker
from actcache.schemas.errors import InvalidInput
from actcache.schemas.root import ReplayResult

T = TypeVar("T")
FULL_SECONDS = 1.0
RESTING_SECONDS = 1.0
MOST_REST_SECONDS = 30.0


class Residence(WorkerPlugin):  # type: ignore[misc]  # distributed has no types
    """The job of a build on one worker process, and what runs its blocks there once the first has come."""

    def __init__(self, name: str, job: Job, threads: int | None, gpus: int) -> None:
        self.name = name
        self._job = job
        self._threads = threads
        self._gpus = gpus
        self._worker: Worker | None = None
        self._opening: Lock | None = None
        self._ended = False
        self._failures = 0
        self._rests_until = 0.0
        self._cores = 1

    def setup(self, worker: Any) -> None:
        """Called by Dask where the plugin arrives."""
        self._opening = Lock()  # a lock does not travel
        self._cores = self._threads or worker.state.nthreads

    def teardown(self, worker: Any) -> None:
        """Called by Dask when the build or the worker ends."""
        self._ended = True
        if self._worker is not None:
            self._worker.stop()
        Thread(target=self._close, name="actcache-close", daemon=True).start()  # this is the event loop's thread

    def worker(self) -> Worker:
        """What runs blocks here, its model loaded.

        Raises:
            InvalidInput: the model is not here, or fewer GPUs than each worker should have.
            Stopped: the build has ended.
        """
        assert self._opening is not None
        with self._opening:
            if self._worker is None:
                torch.set_num_threads(self._cores)  # Dask's own default is one
                if torch.cuda.device_count() < self._gpus:
                    raise InvalidInput(
                        f"--gpus-per-worker {self._gpus}: {platform.node()} shows this worker {torch.cuda.device_count()} GPUs"
                    )
                self._worker = Worker.of(self._job, max(BLOCKS_AT_ONCE, self._cores))
            if self._ended:
                self._worker.stop()
            worker = self._worker
        worker.prepare()
        return worker

    def failed(self) -> None:
        """Begin nothing for a while, longer each time, so that a worker that fails at once does not take every block."""
        self._failures += 1
        self._rests_until = time.monotonic() + min(2.0 ** (self._failures - 1), MOST_REST_SECONDS)

    @property
    def rests(self) -> float:
        """For how many seconds nothing is to be begun here."""
        return max(0.0, self._rests_until - time.monotonic())

    def well(self) -> None:
        """A block was stored here."""
        self._failures = 0

    def _close(self) -> None:
        assert self._opening is not None
        with self._opening:
            if self._worker is not None:
                self._worker.close()


@dataclass(frozen=True)
class Broken:
    """Something failed on a worker. `opening`: before the model was there, so that it may go well elsewhere."""

    error: Exception
    address: str
    opening: bool


@dataclass(frozen=True)
class Resting:
    """Nothing was begun, since something failed on this worker a moment ago. The scheduler would only give it back to it."""

    address: str


def perform(name: str, block: int) -> Done | Broken | Resting:
    """Run a block here."""
    return _on_worker(name, lambda worker: _perform_if_free(worker, block))


def _perform_if_free(worker: Worker, block: int) -> Done:
    if worker.is_full:
        time.sleep(FULL_SECONDS)
        raise distributed.Reschedule  # a worker of many threads must not keep blocks from others
    return worker.perform(block)


def replay(name: str) -> ReplayResult | Broken | Resting:
    """Replay a few stored sequences here."""
    return _on_worker(name, lambda worker: worker.replay())


def sample(name: str, limit: int) -> Sample | Broken | Resting:
    """Run about so many tokens here, and tell what that took."""
    return _on_worker(name, lambda worker: worker.sample(limit))


def _on_worker(name: str, work: Callable[[Worker], T]) -> T | Broken | Resting:
    """Have work done by what runs blocks here; what fails comes back as a value, since Dask would not say where it did."""
    here, opened = distributed.get_worker(), False
    residence: Residence = here.plugins[name]
    if residence.rests:
        time.sleep(min(residence.rests, RESTING_SECONDS))
        return Resting(here.address)
    try:
        worker = residence.worker()
        opened = True
        done = work(worker)
    except (Stopped, distributed.Reschedule):
        raise
    except Exception as error:
        if not is_final(error, not opened):
            residence.failed()
        return Broken(error, here.address, not opened)
    residence.well()
    return done
