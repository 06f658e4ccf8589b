"""Running blocks on a Dask cluster: one of this machine's processes, or one that stands already.

A task is the number of a block. The rest travels once to each worker process, also to those that join later, as a plugin of
the worker; the model is loaded there when the first block comes.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import distributed
import torch

from actcache.cache.cores import available_cores
from actcache.jobs.engine import POLL_SECONDS, Event, Failed, is_final
from actcache.jobs.forecast import Sample
from actcache.jobs.local_cluster import local_cluster
from actcache.jobs.memory_plan import BLOCKS_AT_ONCE
from actcache.jobs.options import ClusterOptions
from actcache.jobs.progress import Reporter
from actcache.jobs.residence import Broken, Residence, Resting, perform, replay, sample
from actcache.jobs.worker import Done, Job
from actcache.schemas.errors import InvalidInput, StoreError
from actcache.schemas.root import ReplayResult

WINDOW = 2000
"""Blocks that the scheduler is given at once: enough for an adaptive cluster to see that it should grow."""
CONNECT_SECONDS = 30
LOST_SECONDS = 15.0
COUNT_SECONDS = 2.0
ALONE_SECONDS = 15.0
KILLED_ATTEMPTS = 2
"""A block whose workers died, several of them, is tried fewer times again: it may be what kills them."""
PREFIX = "actcache-"


class OnCluster:
    """Hands blocks to a Dask scheduler. `local` are the worker processes of this build alone, if it has some."""

    def __init__(
        self,
        client: distributed.Client,
        name: str,
        options: ClusterOptions,
        reporter: Reporter,
        local: distributed.SpecCluster | None = None,
    ) -> None:
        self.retries = options.retries
        self._local = local
        self._wanted = options.workers or 0
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
        self._workers: dict[str, Any] = {}
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
        future = self._task(perform, self._failed_at.get(block, set()), block)
        self._futures[block] = future
        future.add_done_callback(lambda done, block=block: self._finished.put((block, done)))

    def next(self) -> Event | None:
        """See `Engine`."""
        if not self._events:
            self._collect()
        return self._events.popleft() if self._events else None

    def replay(self) -> ReplayResult:
        """See `Engine`."""
        found: ReplayResult = self._call(replay)
        return found

    def sample(self, limit: int) -> Sample:
        """See `Engine`."""
        found: Sample = self._call(sample, limit)
        return found

    def cancel(self) -> None:
        """Have no more blocks begun."""
        with suppress(Exception):  # the scheduler may be gone, and then they are
            self._client.cancel(list(self._futures.values()), force=True)
        self._futures.clear()

    def _task(self, function: Callable[..., Any], not_at: set[str], *arguments: Any) -> distributed.Future:
        """Give something to the scheduler, to be done rather not where it failed before."""
        elsewhere = sorted(self._there().keys() - not_at) if not_at else []
        where = {"workers": elsewhere, "allow_other_workers": True} if elsewhere else {}
        key = f"{self._name}-{function.__name__}-{uuid.uuid4().hex}"
        return self._client.submit(
            function, self._name, *arguments, key=key, pure=False, resources=self._resources, **where
        )

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Have something done by one worker and wait for it; by another one if that may help."""
        not_at: set[str] = set()
        attempts = 0
        while True:
            future = self._task(function, not_at, *arguments)
            while not future.done():
                time.sleep(POLL_SECONDS)
                self._check_scheduler()
                self._check_workers()
            if future.status != "finished":
                raise _error(future)
            found = future.result()
            if not isinstance(found, Broken | Resting):
                return found
            not_at.add(found.address)
            if isinstance(found, Resting):
                continue
            attempts += 1
            if is_final(found.error, found.opening) or attempts > self.retries:
                raise found.error
            self._reporter.note(f"{found.address} failed, another worker is asked: {found.error}")

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
            found = self._gathered(list(fine.values())) if fine else []
        except StoreError:
            raise
        except Exception as error:  # a worker that died with its results: they are found stored
            self._events.extend(Failed(block, error) for block in fine)
            return
        self._events.extend(event for event in map(self._told, fine, found) if event is not None)

    def _gathered(self, futures: list[distributed.Future]) -> list[Done | Broken | Resting]:
        """The results. Those that died with their worker Dask has computed again, for which a worker must come back meanwhile."""
        results: SimpleQueue[list[Any] | Exception] = SimpleQueue()

        def gather() -> None:
            try:
                results.put(self._client.gather(futures))
            except (
                BaseException
            ) as error:  # it is raised in the thread that waits; asyncio's cancelling is no Exception
                results.put(error if isinstance(error, Exception) else ConnectionError(repr(error)))

        Thread(target=gather, name="actcache-gather", daemon=True).start()
        while True:
            with suppress(Empty):
                found = results.get(timeout=POLL_SECONDS)
                if isinstance(found, Exception):
                    raise found
                return found
            self._check_scheduler()
            self._there()

    def _told(self, block: int, found: Done | Broken | Resting) -> Event | None:
        """What a worker told of a block; None where it is given to another one."""
        self._served = time.monotonic()
        if isinstance(found, Done):
            return found
        self._failed_at.setdefault(block, set()).add(found.address)
        if isinstance(found, Resting):
            self.submit(block)
            return None
        return Failed(block, found.error, elsewhere=found.opening)

    def _there(self) -> dict[str, Any]:
        """The workers by their addresses, as the scheduler told a moment ago. Those of this build that are no more are replaced."""
        now = time.monotonic()
        if now - self._counted > COUNT_SECONDS:
            self._counted = now
            with suppress(Exception):  # the scheduler may be gone: `next` tells
                self._workers = self._client.scheduler_info(n_workers=-1)["workers"]
                if self._local is not None and len(self._workers) < self._wanted:
                    # Dask gives up a process that is not there 15 s after it, or one before it, died
                    self._local.scale(self._wanted)
        return self._workers

    def _check_workers(self) -> None:
        """Tell, once, that nobody is there to do anything."""
        if self._told_alone or time.monotonic() - self._served < ALONE_SECONDS:
            return
        need = (self._resources or {}).get("GPU", 0)
        if not any((worker.get("resources") or {}).get("GPU", 0) >= need for worker in self._there().values()):
            what = f"with --resources GPU={need * BLOCKS_AT_ONCE:g}" if need else "to this scheduler"
            way = f"add workers {what}" if self._local is None else "they are being started"
            self._reporter.note(f"no worker is there yet that can run blocks; the build waits: {way}")
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
        threads, cluster = None, None
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
        engine = OnCluster(client, name, options, reporter, cluster)
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
