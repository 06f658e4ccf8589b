"""Running blocks on a Dask cluster: one of this machine's processes, or one that stands already.

A task is the number of a block. The rest travels once to each worker process, also to those that join later, as a plugin of
the worker; the model is loaded there when the first block comes.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import platform
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar

import distributed
import torch
from distributed.diagnostics.plugin import WorkerPlugin

from actcache.jobs.cores import available_cores
from actcache.jobs.engine import POLL_SECONDS, Event, Failed
from actcache.jobs.forecast import Sample
from actcache.jobs.memory_plan import BLOCKS_AT_ONCE
from actcache.jobs.options import ClusterOptions
from actcache.jobs.progress import Reporter
from actcache.jobs.worker import Done, Job, Stopped, Worker
from actcache.schemas.errors import InvalidInput, StoreError
from actcache.schemas.root import ReplayResult

T = TypeVar("T")
WINDOW = 2000
"""Blocks that the scheduler is given at once: enough for an adaptive cluster to see that it should grow."""
CONNECT_SECONDS = 30
LOST_SECONDS = 15.0
COUNT_SECONDS = 2.0
FULL_SECONDS = 1.0
ALONE_SECONDS = 15.0
MOST_REST_SECONDS = 30.0
KILLED_ATTEMPTS = 2
"""A block whose workers died, several of them, is tried fewer times again: it may be what kills them."""
PREFIX = "actcache-"
NO_GUARD = (
    "a script that builds with workers must do so below 'if __name__ == \"__main__\":', since each of them imports it"
)


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

    def rest(self) -> None:
        """Wait after a failure, longer each time, so that a worker that fails at once does not take every block."""
        self._failures += 1
        time.sleep(min(2.0 ** (self._failures - 1), MOST_REST_SECONDS))

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

    @property
    def is_final(self) -> bool:
        """Whether trying again, elsewhere, is of no use."""
        return Failed(-1, self.error, self.opening).is_final


def _perform(name: str, block: int) -> Done | Broken:
    return _on_worker(name, lambda worker: _perform_if_free(worker, block))


def _perform_if_free(worker: Worker, block: int) -> Done:
    if worker.is_full:
        time.sleep(FULL_SECONDS)
        raise distributed.Reschedule  # a worker of many threads must not keep blocks from others
    return worker.perform(block)


def _replay(name: str) -> ReplayResult | Broken:
    return _on_worker(name, lambda worker: worker.replay())


def _sample(name: str, limit: int) -> Sample | Broken:
    return _on_worker(name, lambda worker: worker.sample(limit))


def _on_worker(name: str, work: Callable[[Worker], T]) -> T | Broken:
    """Have work done by what runs blocks here; what fails comes back as a value, since Dask would not say where it did."""
    here, opened = distributed.get_worker(), False
    residence: Residence = here.plugins[name]
    try:
        worker = residence.worker()
        opened = True
        done = work(worker)
    except (Stopped, distributed.Reschedule):
        raise
    except Exception as error:
        residence.rest()
        return Broken(error, here.address, not opened)
    residence.well()
    return done


class OnCluster:
    """Hands blocks to a Dask scheduler."""

    def __init__(self, client: distributed.Client, name: str, options: ClusterOptions, reporter: Reporter) -> None:
        self.retries = options.retries
        self._client = client
        self._name = name
        self._reporter = reporter
        # of a worker's GPUs each of its blocks takes a part, so that two are under way there as well
        gpus = options.gpus_per_worker
        self._resources = {"GPU": gpus / BLOCKS_AT_ONCE} if gpus else None
        self._finished: SimpleQueue[tuple[int, distributed.Future]] = SimpleQueue()
        self._futures: dict[int, distributed.Future] = {}
        self._failed_at: dict[int, set[str]] = {}
        self._events: deque[Event] = deque()
        self._heard = self._served = time.monotonic()
        self._counted = -COUNT_SECONDS
        self._addresses: set[str] = set()
        self._told_alone = False

    @property
    def window(self) -> int:
        """See `Engine`. Tasks that ask for a resource do not wait at the scheduler but on a worker, where they are lost with it."""
        return WINDOW if self._resources is None else 2 * BLOCKS_AT_ONCE * max(1, self.workers)

    @property
    def workers(self) -> int:
        """See `Engine`."""
        return len(self._there())

    def submit(self, block: int) -> None:
        """See `Engine`."""
        future = self._task(_perform, self._failed_at.get(block, set()), block)
        self._futures[block] = future
        future.add_done_callback(lambda done, block=block: self._finished.put((block, done)))

    def next(self) -> Event | None:
        """See `Engine`."""
        if not self._events:
            self._collect()
        return self._events.popleft() if self._events else None

    def replay(self) -> ReplayResult:
        """See `Engine`."""
        found: ReplayResult = self._call(_replay)
        return found

    def sample(self, limit: int) -> Sample:
        """See `Engine`."""
        found: Sample = self._call(_sample, limit)
        return found

    def cancel(self) -> None:
        """Have no more blocks begun."""
        with suppress(Exception):  # the scheduler may be gone, and then they are
            self._client.cancel(list(self._futures.values()), force=True)
        self._futures.clear()

    def _task(self, function: Callable[..., Any], not_at: set[str], *arguments: Any) -> distributed.Future:
        """Give something to the scheduler, to be done rather not where it failed before."""
        elsewhere = sorted(self._there() - not_at) if not_at else []
        where = {"workers": elsewhere, "allow_other_workers": True} if elsewhere else {}
        key = f"{self._name}-{function.__name__}-{uuid.uuid4().hex}"
        return self._client.submit(
            function, self._name, *arguments, key=key, pure=False, resources=self._resources, **where
        )

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Have something done by one worker and wait for it; by another one if that may help."""
        not_at: set[str] = set()
        for attempt in range(self.retries + 1):
            future = self._task(function, not_at, *arguments)
            while not future.done():
                time.sleep(POLL_SECONDS)
                self._check_scheduler()
                self._check_workers()
            if future.status != "finished":
                raise _error(future)
            found = future.result()
            if not isinstance(found, Broken):
                return found
            not_at.add(found.address)
            if found.is_final or attempt == self.retries:
                raise found.error
            self._reporter.note(f"{found.address} failed, another worker is asked: {found.error}")
        raise AssertionError

    def _collect(self) -> None:
        """Wait a little for blocks that ended, and fetch what became of all of them at once."""
        ended: dict[int, distributed.Future] = {}
        with suppress(Empty):
            block, future = self._finished.get(timeout=POLL_SECONDS)
            ended[block] = future
            while True:
                block, future = self._finished.get_nowait()
                ended[block] = future
        self._check_scheduler()
        if not ended:
            self._check_workers()
            return
        ended = {block: future for block, future in ended.items() if self._futures.get(block) is future}
        fine = {block: future for block, future in ended.items() if future.status == "finished"}
        for block, future in ended.items():
            del self._futures[block]
            if block not in fine:
                killed = future.status == "error" and isinstance(future.exception(), distributed.KilledWorker)
                self._events.append(Failed(block, _error(future), attempts=KILLED_ATTEMPTS if killed else 1))
        try:
            found = self._client.gather(list(fine.values())) if fine else []
            self._events.extend(map(self._told, fine, found))
        except Exception as error:  # a worker that died with its results: they are found stored
            self._events.extend(Failed(block, error) for block in fine)

    def _told(self, block: int, found: Done | Broken) -> Event:
        self._served = time.monotonic()
        if isinstance(found, Done):
            return found
        self._failed_at.setdefault(block, set()).add(found.address)
        return Failed(block, found.error, elsewhere=found.opening)

    def _there(self) -> set[str]:
        now = time.monotonic()
        if now - self._counted > COUNT_SECONDS:
            self._counted = now
            with suppress(Exception):  # the scheduler may be gone: `next` tells
                self._addresses = set(self._client.scheduler_info(n_workers=-1)["workers"])
        return self._addresses

    def _check_workers(self) -> None:
        """Tell, once, that nobody is there to do anything."""
        if self._told_alone or time.monotonic() - self._served < ALONE_SECONDS:
            return
        offered = self._client.scheduler_info(n_workers=-1)["workers"].values()
        need = (self._resources or {}).get("GPU", 0)
        if not any((worker.get("resources") or {}).get("GPU", 0) >= need for worker in offered):
            what = f"with --resources GPU={need * BLOCKS_AT_ONCE:g}" if need else "to this scheduler"
            self._reporter.note(f"no worker is there yet that can run blocks; the build waits: add workers {what}")
            self._told_alone = True

    def _check_scheduler(self) -> None:
        now = time.monotonic()
        comm = self._client.scheduler_comm
        if self._client.status == "running" and comm is not None and not comm.closed():
            self._heard = now
        elif now - self._heard > LOST_SECONDS or self._client.status == "closed":
            raise StoreError(
                "the Dask scheduler is gone; what is stored is safe: run the same command again, with a scheduler that stands"
            )


def _error(future: distributed.Future) -> Exception:
    if future.status != "error":
        return ConnectionError(f"the task was {future.status}")
    error = future.exception()
    if isinstance(error, distributed.KilledWorker):
        return StoreError(
            "every worker that was given it died, most likely for want of memory: 'actcache plan' tells how much a worker takes, "
            "smaller --block-tokens or --batch-tokens take less"
        )
    return error if isinstance(error, Exception) else RuntimeError(str(error))


def _forget_dead_builds(client: distributed.Client) -> None:
    """Remove from all workers the jobs of builds whose process is no more."""

    def names(dask_scheduler: Any) -> list[str]:
        there = set(dask_scheduler.clients)
        found = [name for name in dask_scheduler.worker_plugins if str(name).startswith(PREFIX)]
        return [name for name in found if not any(client_id in name for client_id in there)]

    for name in client.run_on_scheduler(names):
        client.unregister_worker_plugin(name)


@contextmanager
def on_cluster(job: Job, options: ClusterOptions, reporter: Reporter) -> Iterator[OnCluster]:
    """An engine on the cluster that the options name. A local cluster ends with the `with`, another one stays as it is.

    Raises:
        InvalidInput: there is no scheduler where the options say.
    """
    with ExitStack() as stack:
        threads = None
        if options.workers is not None:
            threads = max(1, available_cores() // options.workers)
            gpus = options.gpus_per_worker
            if gpus is None and 0 < options.workers <= torch.cuda.device_count():
                gpus = 1
            cluster = stack.enter_context(local_cluster(options.workers, threads, gpus))
            options = replace(options, gpus_per_worker=gpus)
            client = stack.enter_context(distributed.Client(cluster, set_as_default=False))
        else:
            client = stack.enter_context(_connected(options))
        if find_spec("bokeh") is not None:
            reporter.note(f"Dask dashboard: {client.dashboard_link}")
        _forget_dead_builds(client)
        name = f"{PREFIX}{job.grid.plan.key[:12]}-{client.id}"
        client.register_plugin(Residence(name, job, threads, options.gpus_per_worker or 0))
        engine = OnCluster(client, name, options, reporter)
        try:
            yield engine
        finally:
            engine.cancel()
            with suppress(Exception):  # a scheduler that is gone has no plugins
                client.unregister_worker_plugin(name)


@contextmanager
def _connected(options: ClusterOptions) -> Iterator[distributed.Client]:
    file = options.scheduler_file
    where = options.scheduler or str(file)
    if file is not None and not Path(file).is_file():
        raise InvalidInput(f"{file}: no such scheduler file; 'dask scheduler --scheduler-file {file}' writes one")
    try:
        client = distributed.Client(
            options.scheduler,
            scheduler_file=None if file is None else str(file),
            timeout=CONNECT_SECONDS,
            set_as_default=False,
        )
    except (OSError, ValueError, TimeoutError) as error:
        raise InvalidInput(f"{where}: no Dask scheduler answers there: {error}") from None
    with client:
        yield client


@contextmanager
def local_cluster(workers: int, threads: int, gpus: int | None) -> Iterator[distributed.SpecCluster]:
    """Worker processes of this machine, each with its share of the cores, and with GPUs of its own where that is asked."""
    dashboard = "127.0.0.1:0" if find_spec("bokeh") is not None else None
    environment = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    spec = {
        number: {
            "cls": distributed.Nanny,
            "options": {
                "nthreads": BLOCKS_AT_ONCE,
                "memory_limit": 0,  # the build bounds its own memory
                "host": "127.0.0.1",
                "dashboard": False,
                "silence_logs": logging.CRITICAL,
                "preload": ["actcache.jobs.interrupts"],
                "resources": {"GPU": gpus} if gpus else {},
                "env": environment | _devices(number, gpus),
            },
        }
        for number in range(workers)
    }
    scheduler = {
        "cls": distributed.Scheduler,
        "options": {"host": "127.0.0.1", "port": 0, "dashboard": dashboard is not None, "dashboard_address": dashboard},
    }
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise InvalidInput(NO_GUARD)  # this is a worker process that imports the script again
    before = dict(os.environ)  # Dask sets what its workers are to find in this process too
    try:
        with _started(spec, scheduler) as cluster:
            yield cluster
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def _started(spec: dict[int, Any], scheduler: dict[str, Any]) -> distributed.SpecCluster:
    try:
        return distributed.SpecCluster(spec, scheduler, silence_logs=logging.CRITICAL)
    except RuntimeError as error:
        if "Nanny failed to start" in str(error):
            raise StoreError(f"the worker processes do not start: {NO_GUARD}") from None
        raise


def _devices(number: int, gpus: int | None) -> dict[str, str]:
    """Which GPUs a worker of this number sees, of those that this process does."""
    if gpus is None:
        return {}
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if given is None else [name.strip() for name in given.split(",") if name.strip()]
    own = range(number * gpus, (number + 1) * gpus)
    if names is not None and own.stop > len(names):
        raise InvalidInput(
            f"worker {number + 1} of {gpus} GPUs each: only {len(names)} are visible; give fewer --workers"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[i] if names is not None else str(i) for i in own)}
