"""Telling the C library's allocator to keep little that nobody uses."""

from __future__ import annotations

import ctypes

M_ARENA_MAX = -8
ARENAS = 2


def few_arenas() -> None:
    """Have all threads share two arenas.

    By default glibc gives every thread one, and each keeps the most that its threads ever had: a process with a dozen threads that
    pass large arrays on grows by a tenth over an hour. Forward passes are as fast with two. Does nothing with another C library.
    """
    try:
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)
    except (AttributeError, OSError, TypeError):
        return
