"""Running blocks on a Dask cluster: one of this machine's processes, or one that stands already.

A task is the number of a block. The rest travels once to each worker process, also to those that join later, as a plugin of
the worker; the model is loaded there when the first block comes.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any

import distributed
from distributed.diagnostics.plugin import WorkerPlugin

from actcache.jobs.cores import available_cores
from actcache.jobs.engine import POLL_SECONDS, Event, Failed
from actcache.jobs.forecast import Sample
from actcache.jobs.memory_plan import BLOCKS_AT_ONCE
from actcache.jobs.options import ClusterOptions
from actcache.jobs.progress import Reporter
from actcache.jobs.worker import Job, Worker
from actcache.schemas.errors import InvalidInput, StoreError
from actcache.schemas.root import ReplayResult

WINDOW = 2000
"""Blocks that the scheduler is given at once: enough for an adaptive cluster to see that it should grow."""
CONNECT_SECONDS = 30
LOST_SECONDS = 15.0
COUNT_SECONDS = 2.0


class Residence(WorkerPlugin):  # type: ignore[misc]  # distributed has no types
    """The job of a build on one worker process, and what runs its blocks there once the first has come."""

    def __init__(self, name: str, job: Job, threads: int | None) -> None:
        self.name = name
        self._job = job
        self._threads = threads
        self._worker: Worker | None = None
        self._opening: Lock | None = None
        self._cores = 1

    def setup(self, worker: Any) -> None:
        """Called by Dask where the plugin arrives."""
        self._opening = Lock()  # a lock does not travel
        self._cores = self._threads or worker.state.nthreads

    def teardown(self, worker: Any) -> None:
        """Called by Dask when the build or the worker ends."""
        if self._worker is not None:
            self._worker.stop()
            Thread(target=self._worker.close, name="actcache-close").start()  # this is the event loop's thread
            self._worker = None

    def worker(self) -> Worker:
        """What runs blocks here."""
        assert self._opening is not None
        with self._opening:
            if self._worker is None:
                import torch

                torch.set_num_threads(self._cores)  # Dask's own default is one
                self._worker = Worker.of(self._job, self._cores)
            return self._worker


def _here(name: str) -> Worker:
    residence: Residence = distributed.get_worker().plugins[name]
    return residence.worker()


def _run_block(name: str, block: int) -> Any:
    return _here(name).perform(block)


def _replay(name: str) -> ReplayResult:
    return _here(name).replay()


def _sample(name: str, limit: int) -> Sample:
    return _here(name).sample(limit)


class OnCluster:
    """Hands blocks to a Dask scheduler."""

    window = WINDOW

    def __init__(self, client: distributed.Client, name: str, options: ClusterOptions) -> None:
        self.retries = options.retries
        self._client = client
        self._name = name
        self._resources = {"GPU": options.gpus_per_worker} if options.gpus_per_worker else None
        self._finished: SimpleQueue[tuple[int, distributed.Future]] = SimpleQueue()
        self._futures: dict[int, distributed.Future] = {}
        self._events: deque[Event] = deque()
        self._heard = time.monotonic()
        self._counted = -COUNT_SECONDS
        self._workers = 0

    @property
    def workers(self) -> int:
        """See `Engine`."""
        now = time.monotonic()
        if now - self._counted > COUNT_SECONDS:
            self._counted = now
            with suppress(Exception):  # the scheduler may be gone: `next` tells
                self._workers = len(self._client.scheduler_info(n_workers=-1)["workers"])
        return self._workers

    def submit(self, block: int) -> None:
        """See `Engine`."""
        future = self._client.submit(
            _run_block,
            self._name,
            block,
            key=f"{self._name}-{block}-{uuid.uuid4().hex[:8]}",
            pure=False,
            resources=self._resources,
        )
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

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run something on one worker and wait for it."""
        future = self._client.submit(
            function, self._name, *arguments, pure=False, retries=self.retries, resources=self._resources
        )
        while not future.done():
            time.sleep(POLL_SECONDS)
            self._check_scheduler()
        if future.status != "finished":
            raise _error(future)
        return future.result()

    def cancel(self) -> None:
        """Have no more blocks begun."""
        with suppress(Exception):  # the scheduler may be gone, and then they are
            self._client.cancel(list(self._futures.values()), force=True)
        self._futures.clear()

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
        ended = {block: future for block, future in ended.items() if self._futures.get(block) is future}
        fine = {block: future for block, future in ended.items() if future.status == "finished"}
        for block, future in ended.items():
            del self._futures[block]
            if block not in fine:
                self._events.append(Failed(block, _error(future)))
        try:
            self._events.extend(self._client.gather(list(fine.values())) if fine else ())
        except Exception as error:  # a worker that died with its results: they are found stored
            self._events.extend(Failed(block, error) for block in fine)

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
    if future.status == "error":
        error = future.exception()
        return error if isinstance(error, Exception) else RuntimeError(str(error))
    return ConnectionError(f"the task was {future.status}")


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
            cluster = stack.enter_context(local_cluster(options.workers, threads, options.gpus_per_worker))
            client = stack.enter_context(distributed.Client(cluster, set_as_default=False))
        else:
            client = stack.enter_context(_connected(options))
        if find_spec("bokeh") is not None:
            reporter.note(f"Dask dashboard: {client.dashboard_link}")
        name = f"actcache-{job.grid.plan.key[:12]}-{uuid.uuid4().hex[:8]}"
        client.register_plugin(Residence(name, job, threads))
        engine = OnCluster(client, name, options)
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
    before = dict(os.environ)  # Dask sets what its workers are to find in this process too
    try:
        with distributed.SpecCluster(spec, scheduler, silence_logs=logging.CRITICAL) as cluster:
            yield cluster
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def _devices(number: int, gpus: int | None) -> dict[str, str]:
    """Which GPUs a worker of this number sees, of those that this process does."""
    if gpus is None:
        return {}
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in given.split(",")] if given else None
    own = range(number * gpus, (number + 1) * gpus)
    if names is not None and own.stop > len(names):
        raise InvalidInput(
            f"worker {number + 1} of {gpus} GPUs each: only {len(names)} are visible; give fewer --workers"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[i] if names is not None else str(i) for i in own)}
