"""A Dask cluster of this machine's processes, for one build."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import distributed

from actcache.jobs.memory_plan import BLOCKS_AT_ONCE
from actcache.schemas.errors import InvalidInput, StoreError

NO_GUARD = (
    "a script that builds with workers must do so below 'if __name__ == \"__main__\":', since each of them imports it"
)


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
