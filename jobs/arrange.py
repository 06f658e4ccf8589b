"""From documents to sequences: where on the token axis each piece of a document stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from actcache.jobs.spool import Spool
from actcache.schemas.corpora import Long

DOCUMENTS_AT_ONCE = 1 << 13
INSERTED = -1


@dataclass(frozen=True)
class Rules:
    """How documents become sequences of at most `context` tokens; `bos` puts one before each of them."""

    context: int
    bos: bool = False
    long: Long = "split"
    stride: int | None = None
    pack: bool = False
    max_tokens: int | None = None

    @property
    def room(self) -> int:
        """Tokens of documents in a sequence."""
        return self.context - self.bos

    @property
    def step(self) -> int:
        """Tokens from one window's beginning to the next one's."""
        return self.stride if self.long == "stride" and self.stride is not None else self.room

    def windows(self, length: np.ndarray) -> np.ndarray:
        """How many sequences a document of so many tokens becomes, where documents are not packed."""
        if self.long == "truncate":
            return np.asarray(np.minimum(length, 1))
        more = -(-np.maximum(length - self.room, 0) // self.step)
        return np.asarray(np.where(length > 0, 1 + more, 0))

    def tokens(self, length: int) -> int:
        """How many tokens on the axis a document of so many tokens, or a stream of packed ones, becomes."""
        if self.pack:
            return length + self.bos * -(-length // self.room)
        if length == 0:
            return 0
        if self.long == "truncate":
            return min(length, self.room) + self.bos
        more = -(-max(length - self.room, 0) // self.step)
        return length + more * (self.room - self.step) + (more + 1) * self.bos


@dataclass(frozen=True)
class Arranged:
    """The token axis as runs of neighbouring tokens of one document.

    `runs` is sorted, a row each: the first token on the axis, the document, the index of that token in the document and
    among the collected tokens; both indices are -1 at a beginning-of-sequence token that was put there.
    """

    n_tokens: int
    n_documents: int
    runs: Spool
    sequence_start: Spool


def arrange(lengths: Iterator[tuple[np.ndarray, np.ndarray]], rules: Rules, runs: Spool, starts: Spool) -> Arranged:
    """Lay documents out on the token axis, filling two empty spools.

    `lengths` gives portions of documents in their order: where each begins among the collected tokens, and how many
    tokens it has, at least one. Stops at `max_tokens`, in the midst of a document if need be.
    """
    portions = _packed(lengths, rules) if rules.pack else _separate(lengths, rules)
    total = documents = 0
    for run, sequence, end in portions:
        total = end if rules.max_tokens is None else min(end, rules.max_tokens)
        run = run[run[:, 0] < total]
        runs.append(run)
        starts.append(sequence[sequence < total])
        documents = max(documents, int(run[:, 1].max()) + 1) if len(run) else documents
        if total < end or total == rules.max_tokens:
            break
    starts.append(np.array([total]))
    return Arranged(total, documents, runs, starts)


_Portion = tuple[np.ndarray, np.ndarray, int]
"""Runs, beginnings of sequences, and the end of the axis so far."""


def _separate(lengths: Iterator[tuple[np.ndarray, np.ndarray]], rules: Rules) -> Iterator[_Portion]:
    """A sequence holds tokens of one document alone."""
    total = number = 0
    for offset, length in lengths:
        count = rules.windows(length)
        document = np.repeat(np.arange(len(length)), count)
        window = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
        position = window * rules.step
        size = np.minimum(rules.room, length[document] - position) + rules.bos
        sequence = total + np.cumsum(size) - size
        run = np.stack([sequence + rules.bos, document + number, position, offset[document] + position], 1)
        if rules.bos:
            run = _with_bos(run, sequence, document + number)
        elif rules.long == "split":
            run = run[window == 0]  # windows that follow on each other are one run
        total += int(size.sum())
        number += len(length)
        yield run, sequence, total


def _packed(lengths: Iterator[tuple[np.ndarray, np.ndarray]], rules: Rules) -> Iterator[_Portion]:
    """Documents follow on each other in one stream, which is cut every `room` tokens."""
    stream = number = 0
    for offset, length in lengths:
        begin = stream + np.cumsum(length) - length
        end = stream + int(length.sum())
        cut = np.arange(-(-stream // rules.room) * rules.room, end, rules.room)
        first = np.union1d(begin, cut) if rules.bos else begin
        owner = np.searchsorted(begin, first, side="right") - 1
        position = first - begin[owner]
        axis = first + rules.bos * (first // rules.room + 1)
        run = np.stack([axis, owner + number, position, offset[owner] + position], 1)
        sequence = cut // rules.room * rules.context
        if rules.bos:
            run = _with_bos(run, sequence, np.searchsorted(begin, cut, side="right") - 1 + number)
        stream, number = end, number + len(length)
        yield run, sequence, rules.tokens(stream)


def _with_bos(run: np.ndarray, sequence: np.ndarray, document: np.ndarray) -> np.ndarray:
    """Runs with one more of a single token at the beginning of each sequence."""
    inserted = np.full(len(sequence), INSERTED)
    both = np.concatenate([run, np.stack([sequence, document, inserted, inserted], 1)])
    return both[np.argsort(both[:, 0], kind="stable")]
