"""The processor cores: how many there are to use, and who has the first claim to them."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

NICENESS = 10


def available_cores() -> int:
    """Processor cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def step_back() -> None:
    """Let the threads of this process that compute go before this one, where the system knows priorities of threads (Linux).

    A forward pass splits its work evenly among its threads and waits for the slowest: one that shares its core with an encoder
    holds up all.
    """
    with suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
