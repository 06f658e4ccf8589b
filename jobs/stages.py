"""How busy each stage of a worker is, so that a user sees which resource is the limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Literal, ParamSpec, TypeVar

Stage = Literal["read", "forward", "copy", "encode", "upload"]
STAGES: dict[Stage, str] = {
    "read": "reading tokens and making batches",
    "forward": "the model's forward pass",
    "copy": "taking activations from the model to the host",
    "encode": "compressing, measuring and quantising",
    "upload": "hashing, and waiting for the store",
}

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Usage:
    """Seconds that workers were up, and for how many of them each stage was busy, of all that it can be."""

    seconds: float = 0.0
    busy: Mapping[Stage, float] = field(default_factory=dict)

    def __add__(self, other: Usage) -> Usage:
        busy = {stage: self.busy.get(stage, 0.0) + other.busy.get(stage, 0.0) for stage in STAGES}
        return Usage(self.seconds + other.seconds, busy)

    @property
    def shares(self) -> dict[Stage, float]:
        """The part of the time that each stage was busy: 1 is a stage that never rests."""
        return {stage: min(1.0, self.busy.get(stage, 0.0) / self.seconds) if self.seconds else 0.0 for stage in STAGES}

    @property
    def told(self) -> dict[Stage, float]:
        """The shares as a log tells them, to three digits."""
        return {stage: round(share, 3) for stage, share in self.shares.items()}

    @property
    def limit(self) -> Stage | None:
        """The busiest stage: what more of would make the build faster. None before anything ran."""
        shares = self.shares
        busiest = max(STAGES, key=shares.__getitem__)
        return busiest if shares[busiest] > 0 else None


class Meter:
    """Measures a process's stages. `at_once` is how many of a stage's tasks can run at a time, 1 where it is not said."""

    def __init__(self, **at_once: int) -> None:
        self._at_once = at_once
        self._lock = Lock()
        self._running: dict[Stage, int] = dict.fromkeys(STAGES, 0)
        self._busy: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)
        self._since = self._last = time.monotonic()

    @contextmanager
    def busy(self, stage: Stage) -> Iterator[None]:
        """Count the time inside the `with` to a stage."""
        self._change(stage, 1)
        try:
            yield
        finally:
            self._change(stage, -1)

    @contextmanager
    def paused(self, stage: Stage) -> Iterator[None]:
        """Do not count the time inside the `with`, which is inside a `busy` of the same stage."""
        self._change(stage, -1)
        try:
            yield
        finally:
            self._change(stage, 1)

    @staticmethod
    def clock() -> float:
        """Seconds, for `add`."""
        return time.monotonic()

    def add(self, stage: Stage, seconds: float) -> None:
        """Count some time to a stage."""
        with self._lock:
            self._busy[stage] += seconds

    def drain(self) -> Usage:
        """What was measured since the last call."""
        with self._lock:
            self._advance()
            usage = Usage(self._last - self._since, dict(self._busy))
            self._since, self._busy = self._last, dict.fromkeys(STAGES, 0.0)
            return usage

    def _change(self, stage: Stage, by: int) -> None:
        with self._lock:
            self._advance()
            self._running[stage] += by

    def _advance(self) -> None:
        now = time.monotonic()
        for stage, running in self._running.items():
            if running:
                most = self._at_once.get(stage, 1)
                self._busy[stage] += min(running, most) / most * (now - self._last)
        self._last = now


class MeteredPool(Executor):
    """Another pool whose tasks count to a stage."""

    def __init__(self, pool: Executor, meter: Meter, stage: Stage) -> None:
        self._pool = pool
        self._meter = meter
        self._stage: Stage = stage

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function on the pool."""
        return self._pool.submit(self._run, fn, *args, **kwargs)  # type: ignore[arg-type]

    def _run(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        with self._meter.busy(self._stage):
            return fn(*args, **kwargs)
