"""Memory of arrays that is used again when nobody holds them any more: fresh memory costs more than what is copied into it."""

from __future__ import annotations

import math
import weakref

import numpy as np


class Recycled:
    """Gives out arrays, and keeps the memory of at most `most` that came back. Safe to use from several threads."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._free: dict[int, list[np.ndarray]] = {}

    def __reduce__(self) -> tuple[type[Recycled], tuple[int]]:
        return Recycled, (self._most,)  # memory does not travel

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of any content. Its memory comes back when neither it nor any view or tensor of it is left."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        if not size:
            return np.empty(shape, dtype)
        free = self._free.setdefault(size, [])
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(size, np.uint8)
        # Views of an array over a buffer have that array as their base, so that its end is the end of them all.
        owner = np.frombuffer(memory.data, np.uint8)
        weakref.finalize(owner, self._back, free, memory).atexit = False
        return owner.view(dtype).reshape(shape)

    def _back(self, free: list[np.ndarray], memory: np.ndarray) -> None:
        if len(free) < self._most:
            free.append(memory)
