"""A random order of documents, and a sample of them: both from one number a document, whatever else is in the corpus.

The rank of a document is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) of the seed, the index of its source and the
index of its row in turn. A shuffled corpus is sorted by rank; a sample of N are the N lowest ranks. So every document is
as likely as any other to be anywhere, the corpus need be read but once and in order, and no row changes another's rank.
"""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1
LEAST_KEPT = 1024


def rank(seed: int, source: int, row: int) -> int:
    """The rank of a document."""
    return _mixed(_mixed(_mixed(seed) ^ source) ^ row)


def ranks(seed: int, source: np.ndarray, row: np.ndarray) -> np.ndarray:
    """The rank of each document, uint64."""
    first = np.uint64(_mixed(seed))
    return _mixed_all(_mixed_all(first ^ source.astype(np.uint64)) ^ row.astype(np.uint64))


def _mixed(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _mixed_all(value: np.ndarray) -> np.ndarray:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(value ^ (value >> np.uint64(31)))


class Lowest:
    """Which ranks may still be among the wanted ones, while documents come in any order.

    Wanted are the lowest ranks: `documents` of them, or as many as have `tokens` tokens together, whichever are fewer.
    A document that is not admitted is not wanted, whatever follows; one that is admitted may turn out not to be.
    """

    def __init__(self, documents: int | None, tokens: int | None) -> None:
        self._documents, self._tokens = documents, tokens
        self._fresh: list[tuple[int, int]] = []
        self._kept = np.empty((0, 2), np.uint64)
        self._highest = _MASK
        self._full_at = LEAST_KEPT

    def admits(self, rank: int) -> bool:
        """Whether a document of this rank may be wanted."""
        return rank <= self._highest

    def add(self, rank: int, tokens: int) -> None:
        """A document of this rank has so many tokens."""
        if self._documents is None and self._tokens is None:
            return
        self._fresh.append((rank, tokens))
        if len(self._fresh) >= self._full_at:
            self._settle()

    def _settle(self) -> None:
        """Keep the lowest alone. Twice as many must come before it is done again, so that it costs little."""
        both = np.concatenate([self._kept, np.array(self._fresh, np.uint64)])
        both = both[np.argsort(both[:, 0], kind="stable")]
        enough = len(both)
        if self._documents is not None:
            enough = min(enough, self._documents)
        if self._tokens is not None:
            enough = min(enough, int(np.searchsorted(np.cumsum(both[:, 1].astype(np.int64)), self._tokens)) + 1)
        if enough < len(both) or enough == self._documents:
            both = both[:enough]
            self._highest = int(both[-1, 0])
        self._kept, self._fresh, self._full_at = both, [], max(LEAST_KEPT, len(both))
