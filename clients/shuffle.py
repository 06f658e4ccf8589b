"""Which tokens an epoch gives out, in which order, and what is read for it. A pure function of its arguments; reads nothing.

The tokens of a view lie in blocks, the objects of the store. Blocks, long ones in parts, follow each other in a random order; that
sequence is cut into windows of equal size, and the tokens of each window are permuted. Without a seed, the order is the view's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np

from actcache.clients.token_index import TokenIndex
from actcache.schemas.errors import InvalidInput

MOST_BUFFER = 1 << 29
"""Places are counted in 32 bits, and a window has fewer than twice as many."""
PARTS = 16
"""A window holds at least so many parts of blocks, where there are as many: a block never fills a window alone."""
TINY = 4
"""Neighbours in the order are read together until they are a quarter as large as the largest part."""
LISTED_PARTS = 4
"""Listed tokens that are read together in their own order: a quarter of the buffer, since each may lie in another chunk."""


@dataclass(frozen=True)
class Share:
    """Which part of an epoch: of a rank among `world_size`, and of a worker among the `workers` of that rank."""

    rank: int = 0
    world_size: int = 1
    worker: int = 0
    workers: int = 1

    def span(self, n_tokens: int, size: int, drop_last: bool) -> tuple[int, int]:
        """Start and end in the epoch's sequence of blocks.

        Those of ranks differ by at most one token; those of a rank's workers by at most one batch, and none but the last has a short one.
        """
        low, high = (n_tokens * rank // self.world_size for rank in (self.rank, self.rank + 1))
        batches = n_tokens // self.world_size // size if drop_last else -(-(high - low) // size)
        first, last = (batches * worker // self.workers for worker in (self.worker, self.worker + 1))
        return min(low + first * size, high), min(low + last * size, high)


class Plan:
    """The order of one share of one epoch.

    Positions count the epoch's sequence of blocks; those of this share are [start, stop).

    Attributes:
        start, stop: the positions of this share.
        windows: position splits of the windows, (window + 1,), int64; each has at least `buffer` tokens, and fewer than twice as many.
        units: position splits of what is read at once, (unit + 1,), int64; none crosses a window.
        window_of: the window of each unit, (unit,).

    Raises:
        InvalidInput: the index has tokens that are not between the first cut and the last.
    """

    def __init__(
        self,
        index: TokenIndex,
        cuts: np.ndarray,
        *,
        size: int,
        shuffle: int | None,
        epoch: int,
        buffer: int,
        share: Share,
        drop_last: bool,
    ) -> None:
        buffer = min(buffer, MOST_BUFFER)
        self._index = index
        self._cuts = cuts
        self._key = None if shuffle is None else (shuffle, epoch)
        self.size = size
        self.start, self.stop = share.span(len(index), size, drop_last)
        most = max(1, buffer // PARTS)
        if self._key is None and not index.ascending:
            most = max(1, buffer // LISTED_PARTS)
            self._parts = np.append(np.arange(0, len(index), most), len(index))
        else:
            counts = index.counts(cuts)
            if int(counts.sum()) != len(index):
                raise InvalidInput(
                    f"{len(index) - int(counts.sum()):,} tokens of the view are not among the {int(cuts[-1]):,} that there are"
                )
            self._parts = self._parts_of_blocks(counts, most)
        inside = self._parts[(self._parts > self.start) & (self._parts < self.stop)]
        inside = np.concatenate([[self.start], inside, [self.stop]])
        least = max(1, most // TINY)
        kept = inside[1:-1][np.diff(inside[:-1] // least) > 0]
        units = np.concatenate([[self.start], kept, [self.stop]])
        tokens = self.stop - self.start
        if self._key is not None:
            count = max(1, tokens // buffer) if tokens else 0
            self.windows = self.start + np.arange(count + 1) * tokens // max(1, count)
            units = np.union1d(units, self.windows)
        self.units = np.unique(units) if tokens else np.array([self.start])
        if self._key is None:
            self.windows = self.units
        self.window_of = np.searchsorted(self.windows, self.units[:-1], side="right") - 1

    def _parts_of_blocks(self, counts: np.ndarray, most: int) -> np.ndarray:
        """Position splits of the parts, in their order; a block of more than `most` tokens is several parts of equal size."""
        pieces = -(-counts // most)
        blocks = np.repeat(np.arange(len(counts)), pieces)
        number = np.arange(len(blocks)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        first = counts[blocks] * number // pieces[blocks]
        sizes = counts[blocks] * (number + 1) // pieces[blocks] - first
        if self._key is not None:
            order = permutation(len(blocks), *self._key, "blocks")
            blocks, first, sizes = blocks[order], first[order], sizes[order]
        self._blocks, self._first = blocks, first
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    @cached_property
    def n_batches(self) -> int:
        """Batches of this share."""
        return -(-(self.stop - self.start) // self.size)

    def tokens(self, unit: int) -> np.ndarray:
        """The tokens of a unit, by their places on the token axis, (n,), int64."""
        low, high = int(self.units[unit]), int(self.units[unit + 1])
        if self._key is None:
            return self._index.tokens(low, high)
        found = []
        part = int(np.searchsorted(self._parts, low, side="right")) - 1
        while part < len(self._blocks) and self._parts[part] < high:
            block, start = int(self._blocks[part]), int(self._parts[part])
            stop = int(self._parts[part + 1])
            skipped = int(self._first[part]) - start
            here = self._index.within(int(self._cuts[block]), int(self._cuts[block + 1]))
            found.append(here[max(low, start) + skipped : min(high, stop) + skipped])
            part += 1
        return found[0] if len(found) == 1 else np.concatenate(found)

    def order(self, window: int) -> np.ndarray:
        """In which order the tokens of a window are given out: (n,), int32, of their places in its units."""
        low, high = int(self.windows[window]), int(self.windows[window + 1])
        if self._key is None:
            return np.arange(high - low, dtype=np.int32)
        return permutation(high - low, *self._key, "window", low)

    def window_at(self, position: int) -> int:
        """The window that has a position."""
        return int(np.searchsorted(self.windows, position, side="right")) - 1

    @property
    def largest(self) -> tuple[int, int]:
        """Tokens of the largest window, and of the largest unit."""
        return int(np.diff(self.windows).max(initial=0)), int(np.diff(self.units).max(initial=0))


def permutation(n: int, *key: object) -> np.ndarray:
    """A uniform permutation of n places, (n,), int32, that a key decides.

    The places are sorted by the raw output of a bit generator, which numpy promises never to change; what its `Generator` makes of
    that may.
    """
    bits = max(1, (n - 1).bit_length())
    seed = int.from_bytes(sha256(repr(key).encode()).digest(), "little")
    keys = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(n)
    keys >>= np.uint64(bits)
    keys <<= np.uint64(bits)
    keys |= np.arange(n, dtype=np.uint64)  # no two are equal, so that every way to sort gives the same
    keys.sort()
    keys &= np.uint64((1 << bits) - 1)
    return keys.astype(np.int32)
