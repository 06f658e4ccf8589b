"""Which tokens of a dataset a view has, and in which order: a range, those that a mask keeps, or a list."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from hashlib import sha256

import numpy as np

PAGE = 1 << 16
_PAGE_BYTES = PAGE // 8
SPARSE = 8
"""Bytes of bits a token from which on listing tokens is cheaper than masking them."""


class TokenIndex(ABC):
    """The tokens of a view, by their places on the token axis. Positions count the view's tokens; both are int64.

    `ascending` says whether the tokens come in the order of the axis, none twice.
    """

    ascending = True

    @abstractmethod
    def __len__(self) -> int:
        """How many tokens."""

    @abstractmethod
    def tokens(self, low: int, high: int) -> np.ndarray:
        """The tokens at positions [low, high), in the view's order."""

    @abstractmethod
    def at(self, positions: np.ndarray) -> np.ndarray:
        """The tokens at some positions, in any order, (n,)."""

    @abstractmethod
    def within(self, start: int, stop: int) -> np.ndarray:
        """The view's tokens in [start, stop) of the token axis, ascending, as often as the view has them."""

    @abstractmethod
    def counts(self, cuts: np.ndarray) -> np.ndarray:
        """How many tokens the view has between each cut of the token axis and the next, (len(cuts) - 1,)."""

    @property
    @abstractmethod
    def end(self) -> int:
        """A place on the token axis beyond all of them."""

    @property
    @abstractmethod
    def key(self) -> tuple[object, ...]:
        """What tells it from others."""


class Span(TokenIndex):
    """The tokens [start, stop)."""

    def __init__(self, start: int, stop: int) -> None:
        self.start = start
        self.stop = stop

    def __len__(self) -> int:
        return self.stop - self.start

    def tokens(self, low: int, high: int) -> np.ndarray:
        """See `TokenIndex`."""
        return np.arange(self.start + low, self.start + high)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """See `TokenIndex`."""
        return positions + self.start

    def within(self, start: int, stop: int) -> np.ndarray:
        """See `TokenIndex`."""
        return np.arange(max(start, self.start), max(start, self.start, min(stop, self.stop)))

    def counts(self, cuts: np.ndarray) -> np.ndarray:
        """See `TokenIndex`."""
        return np.diff(np.clip(cuts, self.start, self.stop))

    @property
    def end(self) -> int:
        """See `TokenIndex`."""
        return self.stop

    @property
    def key(self) -> tuple[object, ...]:
        """See `TokenIndex`."""
        return ("span", self.start, self.stop)


class Masked(TokenIndex):
    """The tokens whose bit is set, ascending. A token takes one bit of memory."""

    def __init__(self, bits: np.ndarray) -> None:
        self._bits = bits
        pages = np.bitwise_count(bits).reshape(-1, _PAGE_BYTES).sum(axis=1, dtype=np.int64)
        self._before = np.concatenate([[0], np.cumsum(pages)])

    @classmethod
    def empty(cls, n_tokens: int) -> np.ndarray:
        """Bits for so many tokens, none of them set."""
        return np.zeros(-(-n_tokens // PAGE) * _PAGE_BYTES, np.uint8)

    @staticmethod
    def mark(bits: np.ndarray, tokens: np.ndarray) -> None:
        """Set the bits of some tokens, ascending, none twice."""
        if not len(tokens):
            return
        first, last = int(tokens[0]) // 8, int(tokens[-1]) // 8 + 1
        if last - first > SPARSE * len(tokens):
            np.bitwise_or.at(bits, tokens >> 3, (128 >> (tokens & 7)).astype(np.uint8))
            return
        kept = np.zeros((last - first) * 8, bool)
        kept[tokens - first * 8] = True
        bits[first:last] |= np.packbits(kept)

    def __len__(self) -> int:
        return int(self._before[-1])

    def tokens(self, low: int, high: int) -> np.ndarray:
        """See `TokenIndex`."""
        if low >= high:
            return np.empty(0, np.int64)
        first = int(np.searchsorted(self._before, low, side="right")) - 1
        last = int(np.searchsorted(self._before, high, side="left"))
        found = np.flatnonzero(np.unpackbits(self._bits[first * _PAGE_BYTES : last * _PAGE_BYTES])) + first * PAGE
        skipped = low - int(self._before[first])
        return found[skipped : skipped + high - low]

    def at(self, positions: np.ndarray) -> np.ndarray:
        """See `TokenIndex`."""
        order = np.argsort(positions, kind="stable")
        pages = np.searchsorted(self._before, positions[order], side="right") - 1
        found = np.empty(len(positions), np.int64)
        for mine in np.split(order, np.flatnonzero(np.diff(pages)) + 1) if len(order) else []:
            page = int(np.searchsorted(self._before, positions[mine[0]], side="right")) - 1
            before = int(self._before[page])
            found[mine] = self.tokens(before, int(self._before[page + 1]))[positions[mine] - before]
        return found

    def within(self, start: int, stop: int) -> np.ndarray:
        """See `TokenIndex`."""
        low, high = (min(max(edge, 0), 8 * len(self._bits)) for edge in (start, stop))
        byte = low // 8
        found = np.flatnonzero(np.unpackbits(self._bits[byte : -(-high // 8)])) + byte * 8
        return found[np.searchsorted(found, start) : np.searchsorted(found, stop)]

    def counts(self, cuts: np.ndarray) -> np.ndarray:
        """See `TokenIndex`."""
        cuts = np.minimum(cuts, self.end)  # the bits may end before the axis does
        before = []
        for cut in cuts.tolist():
            page, byte = cut // PAGE, cut // 8
            whole = np.bitwise_count(self._bits[page * _PAGE_BYTES : byte]).sum()
            rest = (int(self._bits[byte]) >> (8 - cut % 8)).bit_count() if cut % 8 else 0
            before.append(int(self._before[page]) + int(whole) + rest)
        return np.diff(np.array(before, np.int64))

    @property
    def end(self) -> int:
        """See `TokenIndex`."""
        return 8 * len(self._bits)

    @cached_property
    def key(self) -> tuple[object, ...]:
        """See `TokenIndex`."""
        return ("masked", sha256(self._bits.data).hexdigest())


class Listed(TokenIndex):
    """Tokens in the order of a list, which may name one more than once."""

    ascending = False

    def __init__(self, listed: np.ndarray) -> None:
        self._listed = listed

    def __len__(self) -> int:
        return len(self._listed)

    def tokens(self, low: int, high: int) -> np.ndarray:
        """See `TokenIndex`."""
        return self._listed[low:high]

    @cached_property
    def _sorted(self) -> np.ndarray:
        return np.sort(self._listed)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """See `TokenIndex`."""
        return np.asarray(self._listed[positions])

    def within(self, start: int, stop: int) -> np.ndarray:
        """See `TokenIndex`."""
        return self._sorted[np.searchsorted(self._sorted, start) : np.searchsorted(self._sorted, stop)]

    def counts(self, cuts: np.ndarray) -> np.ndarray:
        """See `TokenIndex`."""
        return np.diff(np.searchsorted(self._sorted, cuts))

    @property
    def end(self) -> int:
        """See `TokenIndex`."""
        return int(self._listed.max(initial=-1)) + 1

    @cached_property
    def key(self) -> tuple[object, ...]:
        """See `TokenIndex`."""
        return ("listed", sha256(np.ascontiguousarray(self._listed).data).hexdigest())
