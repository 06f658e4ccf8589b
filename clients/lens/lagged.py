"""Updates of blocks beside states and prediction errors of earlier tokens of the same sequence, some thousand tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from actcache.clients.covariance import centres
from actcache.clients.evaluation import Prediction, by_block
from actcache.clients.lens.gradient import through
from actcache.clients.lens.sampling import Others
from actcache.clients.lens.translators import Lens
from actcache.clients.states import States

EARLIER, CAME, CURRENT, ERROR, EXPECTED, TOLD, SHUFFLED = range(7)
"""Which d columns of the predictors are what: states at t - k, t - k + 1 and t; at t - k the error, and the parts of it that are the
prediction alone and what came alone; the error at a random token."""
PREDICTORS = 7


@dataclass(frozen=True)
class Rows:
    """Predictors x (n, 7 d) and updates y (n, d), float32, and the tokens' documents (n,)."""

    x: np.ndarray
    y: np.ndarray
    document: np.ndarray


def reaches(read: States, lag: int) -> np.ndarray:
    """Whether the token so much earlier is there too, in the same sequence, (token,)."""
    sequence = np.searchsorted(read.ds.sequence_start, read.token, side="right")
    found = np.zeros(len(read), bool)
    before = len(read) - lag
    if before > 0:
        found[lag:] = (read.token[lag:] - read.token[:before] == lag) & (sequence[lag:] == sequence[:before])
    return found


class Window:
    """Some tokens in order, with as many before them as the longest lag asks for, of some blocks.

    Attributes:
        low, high: which of the tokens.
    """

    def __init__(
        self,
        low: int,
        high: int,
        document: np.ndarray,
        there: dict[int, np.ndarray],
        held: dict[int, tuple[np.ndarray, ...]],
        drawn: dict[int, np.ndarray],
    ) -> None:
        self.low, self.high = low, high
        self._document, self._there, self._held, self._drawn = document, there, held, drawn

    def rows(self, block: int, lag: int) -> Rows:
        """Of all tokens that have one so much earlier."""
        h, error, expected, update = self._held[block]
        others = self._drawn[block]
        at = np.flatnonzero(self._there[lag])
        before = at + len(h) - (self.high - self.low) - lag
        parts = [h[before], h[before + 1], h[before + lag], error[before], expected[before]]
        parts += [expected[before] - error[before], others[at]]
        return Rows(np.concatenate(parts, axis=1), update[at], self._document[at])


def windows(lens: Lens, read: States, blocks: Sequence[int], lags: Sequence[int], seed: int) -> Iterator[Window]:
    """All tokens, piece by piece. States and updates are centred by the stored means."""
    reach = max(lags)
    layers = sorted({layer for block in blocks for layer in (block, block + 1)})
    sites = [read.sites[layer] for layer in layers]
    shift = dict(zip(layers, centres(read, sites), strict=True))
    others = Others.of(read, seed)
    random = {b: _errors(lens, others.read, {b: others.states[b]}, others.read.target)[b][0] for b in blocks}
    there = {lag: reaches(read, lag) for lag in lags}
    tails: dict[int, tuple[np.ndarray, ...]] = {block: (np.empty((0, read.width), np.float32),) * 3 for block in blocks}
    for piece in read.pieces(sites):
        here = slice(piece.low, piece.high)
        state = dict(zip(layers, piece.states, strict=True))
        errors = _errors(lens, read, {block: state[block] for block in blocks}, read.target[here])
        document = read.groups.of[here]
        drawn = others.draw(document, np.random.default_rng([seed, 2, piece.low]))
        held: dict[int, tuple[np.ndarray, ...]] = {}
        for block in blocks:
            h = state[block] - shift[block]
            update = (state[block + 1] - shift[block + 1]) - h
            kept = tuple(np.concatenate(pair) for pair in zip(tails[block], (h, *errors[block]), strict=True))
            held[block] = (*kept, update)
            tails[block] = tuple(each[-reach:].copy() for each in kept)
        yield Window(
            piece.low,
            piece.high,
            document,
            {lag: found[here] for lag, found in there.items()},
            held,
            {block: found[drawn] for block, found in random.items()},
        )


def _errors(
    lens: Lens, read: States, states: dict[int, np.ndarray], target: np.ndarray
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """By layer, of states (n, d) with the lens's prediction q: J^T (q - onehot(target)), the gradient of the loss, and J^T q, (n, d)."""
    out = {layer: (np.empty(h.shape, np.float32), np.empty(h.shape, np.float32)) for layer, h in states.items()}

    def measure(rows: slice) -> None:
        for layer, h in states.items():
            logits, pullback = through(lens, read.head, layer, h[rows])
            wrong = Prediction.of(logits).probability
            out[layer][1][rows] = pullback(wrong)
            wrong[np.arange(len(wrong)), target[rows]] -= 1
            out[layer][0][rows] = pullback(wrong)

    by_block(len(target), read.vocabulary, measure)
    return out
