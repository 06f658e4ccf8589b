"""A lease: a hint that somebody is at work, so that others wait instead of doing the same. Correctness never rests on it."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from threading import Event, Thread
from types import TracebackType
from typing import Self

from actcache.cache.local_store import process_lives
from actcache.cache.publish import publish
from actcache.cache.store import Store
from actcache.schemas.canonical import canonical
from actcache.schemas.errors import ActcacheError

LEASES = ".actcache/leases/"
EXPIRY_SECONDS = 10.0
RENEWAL_SECONDS = 3.0


class Lease:
    """Held while inside the `with`, renewed by a thread, and given back at its end."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._key = f"{LEASES}{name}.json"
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "nonce": uuid.uuid4().hex}
        self._beat = 0
        self._ended = Event()
        self._renewal = Thread(target=self._renew, name=f"actcache-lease-{name}", daemon=True)

    def acquire(self) -> bool:
        """Try once to take the lease; False if another holds it."""
        return publish(self._store, self._key, self._bytes()).other is None

    def wait(self, done: Event | None = None, poll_seconds: float = 0.5) -> None:
        """Wait until the holder gives the lease back, dies, or has not renewed it for 10 s by this process's own clock.

        An expired lease is removed, so that the next `acquire` can succeed.
        """
        seen: bytes | None = None
        since = time.monotonic()
        while done is None or not done.is_set():
            held = self._store.get_or_none(self._key)
            if held is None:
                return
            if bytes(held) != seen:
                seen, since = bytes(held), time.monotonic()
            if time.monotonic() - since > EXPIRY_SECONDS or _is_dead(seen):
                self._store.delete(self._key)
                return
            time.sleep(poll_seconds)

    def __enter__(self) -> Self:
        self._renewal.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._renewal.join()
        try:
            self._store.delete(self._key)
        except ActcacheError:
            if kind is None:
                raise

    def _renew(self) -> None:
        while not self._ended.wait(RENEWAL_SECONDS):
            self._beat += 1
            try:
                self._store.replace(self._key, self._bytes())
            except ActcacheError:
                continue  # a lease that expires early costs double work, nothing more

    def _bytes(self) -> bytes:
        return canonical({**self._owner, "beat": self._beat})


def _is_dead(lease: bytes) -> bool:
    try:
        owner = json.loads(lease)
        return owner["host"] == socket.gethostname() and not process_lives(int(owner["pid"]))
    except (ValueError, KeyError, TypeError):
        return False
