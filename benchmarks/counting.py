"""Counting what a store is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any
from unittest.mock import patch

from actcache.cache.local_store import LocalStore
from actcache.cache.remote_store import GAP_BYTES, PART_BYTES, RemoteStore

READS = ("get", "get_range", "get_end", "get_tail")


@dataclass
class Count:
    """Keys that were asked for, and how many bytes came, a pair a request."""

    requests: list[tuple[str, int]] = field(default_factory=list)
    _lock: Any = field(default_factory=Lock)

    def add(self, key: str, size: int) -> None:
        """Count a request."""
        with self._lock:
            self.requests.append((key, size))

    def bytes_below(self, *prefixes: str) -> int:
        """Bytes of the keys that begin so."""
        return sum(size for key, size in self.requests if key.startswith(prefixes))


@contextmanager
def counting() -> Iterator[Count]:
    """Count every reading request to any store of this process."""
    count = Count()
    with ExitStack() as patches:
        for kind in (LocalStore, RemoteStore):
            for name in READS:
                if name in vars(kind):
                    patches.enter_context(patch.object(kind, name, _counted(vars(kind)[name], count)))
        yield count


@contextmanager
def as_if_remote() -> Iterator[None]:
    """Read files by the ranges that an object store would be asked for."""
    with patch.multiple(LocalStore, part_bytes=PART_BYTES, gap_bytes=GAP_BYTES):
        yield


def _counted(method: Callable[..., Any], count: Count) -> Callable[..., Any]:
    def call(self: Any, key: str, *args: Any) -> Any:
        found = method(self, key, *args)
        count.add(key, len(found[0] if isinstance(found, tuple) else found))
        return found

    return call
