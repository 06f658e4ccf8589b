"""Builds in child processes that can be killed at any moment.

A child is forked from a server process that has torch and the build imported already, so it starts at once. It is killed
by its parent after a time, or kills itself at a chosen operation of its store.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from actcache.cache import local_store
from actcache.cache.local_store import LocalStore
from actcache.cache.store import Store
from actcache.jobs.build import BuildResult
from actcache.schemas.spec import Spec
from tests import models

TIMEOUT = 60.0
PRELOAD = [
    "actcache.jobs.run",
    "actcache.cache.remote_store",
    "botocore.session",
    "s3fs",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.gpt2.tokenization_gpt2",
    "pytest",  # each child imports the parent's main module, which is pytest's
]
CONTEXT, BLOCK = 32, 160
_context = multiprocessing.get_context("forkserver")

When = Literal["before", "after", "staging", "linked", "flight"]


@dataclass(frozen=True)
class Fault:
    """The operation of its store at which a child kills itself. Operations count from 0.

    `before` and `after` are about the operation's effect. The others strike at the first object written from that
    operation on: `staging` (local) with half the bytes written, `linked` (local) when the object has its name but is not
    synced and its staging file is still there, `flight` while the PUT is under way, `delay` seconds after it was begun.
    With `key`, only operations on keys that begin with it count; with `writing`, only those that write.
    """

    when: When
    operation: int = 0
    key: str = ""
    delay: float = 0.0
    writing: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a child ended: with a result, with the error that the build raised, or killed."""

    result: BuildResult | None = None
    error: Exception | None = None
    operations: int = 0
    seconds: float = 0.0

    @property
    def killed(self) -> bool:
        return self.result is None and self.error is None


class Child:
    """A process that is ready to build and waits for `go`."""

    def __init__(self, spec: Spec, url: str, fault: Fault | None = None, add_sites: str | None = None) -> None:
        _context.set_forkserver_preload(PRELOAD)
        self._connection, theirs = _context.Pipe()
        # The environment is the parent's of now, not that of the server's start.
        arguments = (theirs, spec, url, dict(os.environ), fault, add_sites)
        self.process = _context.Process(target=_child, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self._receive(TIMEOUT)

    def go(self, delay: float = 0.0) -> Child:
        """Let it build, `delay` seconds from now."""
        self._connection.send(delay)
        return self

    def kill_after(self, seconds: float) -> Outcome:
        """Kill it after this time, unless it ends before."""
        if not self._connection.poll(seconds):
            self.process.kill()
        return self.wait()

    def wait(self, timeout: float = TIMEOUT) -> Outcome:
        """Wait for its end."""
        outcome = self._receive(timeout)
        self.process.join(TIMEOUT)
        code = self.process.exitcode
        assert code == (-signal.SIGKILL if outcome.killed else 0), f"the child ended with {code}"
        self.process.close()
        self._connection.close()
        return outcome

    def _receive(self, timeout: float) -> Outcome:
        if not self._connection.poll(timeout):
            self.process.kill()
            self.process.join(TIMEOUT)
            raise TimeoutError(f"nothing from the child after {timeout} s; killed")
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            return Outcome()


def small_spec(folder: Path) -> Spec:
    """A spec whose build takes well under a second on a local disk: 624 tokens in 4 blocks, 3 sites, 16 wide."""
    model = models.save_gpt2(folder / "model", layers=2, width=16, context=CONTEXT)
    corpus = models.write_corpus(folder / "corpus", documents=10)
    return Spec(model=str(model), corpus=(corpus,), context=CONTEXT, block_tokens=BLOCK)


def run(spec: Spec, url: str, fault: Fault | None = None, add_sites: str | None = None) -> Outcome:
    """Build in a child, to its end."""
    return Child(spec, url, fault, add_sites).go().wait()


def _child(
    connection: Connection,
    spec: Spec,
    url: str,
    environment: dict[str, str],
    fault: Fault | None,
    add_sites: str | None,
) -> None:
    import torch

    from actcache.jobs import build as module

    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    stores: list[FaultyStore] = []

    def open_store(*args: Any, **options: Any) -> Store:
        stores.append(FaultyStore(real(*args, **options), fault))
        return stores[-1]

    real, module.open_store = module.open_store, open_store
    connection.send(Outcome())  # ready
    time.sleep(connection.recv())
    began = time.monotonic()
    result, error = None, None
    try:
        result = module.build(spec, url, add_sites=add_sites)
    except Exception as problem:
        error = problem
    seconds = time.monotonic() - began
    connection.send(Outcome(result, error, sum(store.operations for store in stores), seconds))


class FaultyStore(Store):
    """Hands everything on to a store, counts the operations, and kills its process at one of them."""

    def __init__(self, store: Store, fault: Fault | None) -> None:
        self._store = store
        self._fault = fault
        self._counted = 0
        self._lock = threading.Lock()
        self.location = store.location
        self.operations = 0

    def get(self, key: str, limit: int | None = None) -> memoryview:
        return self._do(key, lambda: self._store.get(key, limit))

    def get_range(self, key: str, start: int, length: int) -> memoryview:
        return self._do(key, lambda: self._store.get_range(key, start, length))

    def get_end(self, key: str, length: int) -> memoryview:
        return self._do(key, lambda: self._store.get_end(key, length))

    def size(self, key: str) -> int:
        return self._do(key, lambda: self._store.size(key))

    def put_new(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        return self._do(key, lambda: self._store.put_new(key, data), creates=True)

    def replace(self, key: str, data: bytes) -> None:
        self._do(key, lambda: self._store.replace(key, data), creates=True)

    def delete(self, key: str) -> None:
        self._do(key, lambda: self._store.delete(key))

    def list(self, prefix: str = "") -> dict[str, int]:
        return self._do(prefix, lambda: self._store.list(prefix))

    def children(self, prefix: str) -> tuple[set[str], set[str]]:
        return self._do(prefix, lambda: self._store.children(prefix))

    def clean_staging(self) -> None:
        self._do("", self._store.clean_staging)

    def _do(self, key: str, operation: Callable[[], Any], creates: bool = False) -> Any:
        fault, number = self._fault, -1
        with self._lock:
            self.operations += 1
            if fault is not None and key.startswith(fault.key) and (creates or not fault.writing):
                number = self._counted
                self._counted += 1
        if fault is None or number < fault.operation:
            return operation()
        if fault.when in ("before", "after"):
            if fault.when == "after":
                operation()
            _die()
        elif creates:
            self._arm(fault)
        return operation()

    def _arm(self, fault: Fault) -> None:
        if fault.when == "flight":
            threading.Thread(target=lambda: (time.sleep(fault.delay), _die()), daemon=True).start()
            return
        assert isinstance(self._store, LocalStore)
        if fault.when == "linked":
            link = os.link
            local_store.os.link = lambda *names: (link(*names), _die())
            return
        stage = self._store._stage
        self._store._stage = lambda data: (stage(memoryview(data)[: len(data) // 2]), _die())


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
