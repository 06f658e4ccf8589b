"""Which tokens a measure looks at when it does not look at all, and tokens of other documents for its controls."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actcache.clients.selection import Selectable
from actcache.clients.states import PIECE_BYTES, States, seeded, states, whole_of
from actcache.schemas.errors import InvalidInput

MOST_OTHERS, FEWEST_OTHERS = 2048, 256
REDRAWS = 8


def spaced(ds: Selectable | States, max_tokens: int | None, offset: int = 0, quantised: str | None = None) -> States:
    """States of about `max_tokens` tokens: whole sequences, evenly spaced over the dataset or selection, so that many documents are seen.

    States are given back as they are.

    Raises: as `states`.
    """
    if isinstance(ds, States):
        return ds
    whole = whole_of(ds)
    if max_tokens is not None and max_tokens < 1:
        raise InvalidInput(f"max_tokens={max_tokens}: give at least 1")
    if max_tokens is None or len(ds.index) <= max_tokens:
        return states(ds, offset=offset, quantised=quantised)
    if ds is whole:
        lengths = np.diff(whole.sequence_start)
        chosen = _evenly(len(lengths), max_tokens / lengths.mean())
        runs = [np.arange(*whole.sequence_start[number : number + 2]) for number in chosen]
        return states(ds.at(np.concatenate(runs)), offset=offset, max_tokens=max_tokens, quantised=quantised)
    token = ds.index.tokens(0, len(ds.index))
    numbers, of = np.unique(np.searchsorted(whole.sequence_start, token, side="right"), return_inverse=True)
    chosen = _evenly(len(numbers), max_tokens * len(numbers) / len(token))
    return states(ds.at(np.flatnonzero(np.isin(of, chosen))), offset=offset, max_tokens=max_tokens, quantised=quantised)


@dataclass(frozen=True)
class Others:
    """Some tokens of all documents, drawn at random and held at once, for controls that pair a token with another one.

    Attributes:
        read: the tokens, at most 2,048.
        states: their states, (layer, token, d) float32.
        final: the states that their prediction is made of, (token, d) float32.
        document: the document of each, as `groups` of the tokens they were drawn from numbers them.
    """

    read: States
    states: np.ndarray
    final: np.ndarray
    document: np.ndarray

    @classmethod
    def of(cls, read: States, seed: int) -> Others:
        """Of those tokens. Together their states take at most 32 MiB, unless 256 tokens take more."""
        most = int(np.clip(PIECE_BYTES // (4 * read.width * read.n_layers), FEWEST_OTHERS, MOST_OTHERS))
        places = np.random.default_rng([seeded(seed), 1]).permutation(len(read))[:most]
        places.sort()
        few = read.only(places)
        held = np.empty((read.n_layers, len(few), read.width), np.float32)
        final = np.empty((len(few), read.width), np.float32)
        for piece in few.pieces():
            for layer, state in enumerate(piece.states):
                held[layer, piece.low : piece.high] = state
            final[piece.low : piece.high] = piece.final
        return cls(few, held, final, read.groups.of[places])

    def draw(self, document: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """For tokens of these documents, (n,), which of the others to pair each with, (n,): of another document wherever there is one."""
        drawn = generator.integers(len(self.document), size=len(document))
        for _ in range(REDRAWS):
            same = np.flatnonzero(self.document[drawn] == document)
            drawn[same] = generator.integers(len(self.document), size=len(same))
        same = np.flatnonzero(self.document[drawn] == document)
        if len(same):  # most of the others are of one document: the rest is drawn from what is left of them
            order = np.argsort(self.document, kind="stable")
            low, high = (np.searchsorted(self.document[order], document[same], side=side) for side in ("left", "right"))
            left = len(order) - (high - low)
            there = left > 0
            place = generator.integers(np.maximum(left, 1))
            place += np.where(place >= low, high - low, 0)
            drawn[same[there]] = order[place[there]]
        return drawn


def _evenly(count: int, wanted: float) -> np.ndarray:
    """About so many of `count` numbers, evenly spaced; the places between, so that neither end is favoured."""
    number = int(np.clip(np.ceil(wanted), 1, count))
    return ((np.arange(number) + 0.5) * count / number).astype(np.int64)
