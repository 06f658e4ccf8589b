"""The token axis before it is stored: every array of it, a portion of rows at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actcache.jobs.arrange import INSERTED, Arranged
from actcache.jobs.spool import Spool
from actcache.schemas.grid import BOS_FLAG, EOS_FLAG


@dataclass(frozen=True)
class Axis:
    """The collected tokens, how they are arranged, and the row of each document, (source, row)."""

    collected: Spool
    arranged: Arranged
    document_row: Spool
    bos: int | None
    eos: int | None

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a token array, in its stored dtype."""
        if name == "sequence_start":
            return self.arranged.sequence_start.rows(start, stop)
        if name == "document_row":
            return self.document_row.rows(start, stop)
        if name == "token_id":
            return self._ids(start, stop)
        if name == "special":
            return self._special(start, stop)
        if name in ("document", "document_position"):
            return self._document(start, stop, name == "document_position")
        first, begin, length = self._owners(self.arranged.sequence_start, start, stop)
        if name == "sequence":
            return np.repeat(np.arange(first, first + len(length)), length)
        return np.asarray(np.arange(start, stop) - np.repeat(begin, length), np.int32)

    def _document(self, start: int, stop: int, positions: bool) -> np.ndarray:
        first, begin, length = self._owners(self.arranged.runs, start, stop)
        runs = self.arranged.runs.rows(first, first + len(length))
        if not positions:
            return np.repeat(runs[:, 1], length)
        within = np.arange(start, stop) - np.repeat(begin, length)
        return np.asarray(
            np.repeat(runs[:, 2], length) + within
        )  # an inserted token is a run of its own, at position -1

    def _ids(self, start: int, stop: int) -> np.ndarray:
        """Token ids: whatever is neighbours among the collected tokens is read at once."""
        first, begin, length = self._owners(self.arranged.runs, start, stop)
        offset = self.arranged.runs.rows(first, first + len(length))[:, 3]
        inserted = offset == INSERTED
        low = (offset + np.maximum(start - begin, 0))[~inserted]
        size = length[~inserted]
        ids = np.full(stop - start, self.bos if self.bos is not None else 0, np.int32)
        if len(low):
            edges = np.flatnonzero(low[1:] != low[:-1] + size[:-1]) + 1
            lows, highs = low[np.append(0, edges)], (low + size)[np.append(edges, len(low)) - 1]
            read = [self.collected.rows(a, b) for a, b in zip(lows.tolist(), highs.tolist(), strict=True)]
            ids[~np.repeat(inserted, length)] = np.concatenate(read)
        return ids

    def _special(self, start: int, stop: int) -> np.ndarray:
        ids = self._ids(start, stop)
        flags = np.zeros(len(ids), np.uint8)
        for special, flag in ((self.bos, BOS_FLAG), (self.eos, EOS_FLAG)):
            if special is not None:
                flags |= np.where(ids == special, flag, 0).astype(np.uint8)
        return flags

    def _owners(self, table: Spool, start: int, stop: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The first row of a table that owns tokens of [start, stop), where each begins, and how many of them it owns."""
        if stop <= start:
            return 0, np.empty(0, np.int64), np.empty(0, np.int64)
        first, last = table.last_at_most(start), table.last_at_most(stop - 1)
        rows = table.rows(first, last + 1)
        begin = rows if rows.ndim == 1 else rows[:, 0]
        edges = np.append(np.maximum(begin, start), stop)
        return first, begin, np.diff(edges)
