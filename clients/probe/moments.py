"""Sums over tokens that least squares need, of every layer, in one pass and in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from actcache.clients.covariance import centres, far_off, one_pass
from actcache.clients.probe.examples import Examples
from actcache.clients.states import Piece

MOST_BYTES = 4 << 30
"""Sums that are held at once; more layers are read in turns, each of them once."""


@dataclass
class Moments:
    """Sums over tokens of one layer's states x, centred and divided by their spread, and of targets y. float64.

    Attributes:
        n: how many tokens.
        x: Σ x, (d,).
        xx: Σ x xᵀ, (d, d).
        y: Σ y of the labels and of each control, (answer, outputs).
        yy: Σ y² of each, (answer, outputs).
        xy: Σ y xᵀ of each, (answer, outputs, d).
    """

    n: int
    x: np.ndarray
    xx: np.ndarray
    y: np.ndarray
    yy: np.ndarray
    xy: np.ndarray

    @classmethod
    def empty(cls, d: int, answers: int, outputs: int) -> Moments:
        """Of no token."""
        y = np.zeros((answers, outputs))
        return cls(0, np.zeros(d), np.zeros((d, d)), y, y.copy(), np.zeros((answers, outputs, d)))

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.n + other.n,
            self.x + other.x,
            self.xx + other.xx,
            self.y + other.y,
            self.yy + other.yy,
            self.xy + other.xy,
        )

    def add(self, x: np.ndarray, answers: list[np.ndarray]) -> None:
        """Count rows x (n, d), float32, with their answers: class numbers (n,), or numbers (n, outputs)."""
        far = far_off(x)
        if far is not None:
            near = Moments.empty(len(self.x), *self.y.shape)
            near._count(x - far.astype(np.float32), answers)
            self._take(near, far)
        else:
            self._count(x, answers)

    def _count(self, x: np.ndarray, answers: list[np.ndarray]) -> None:
        self.n += len(x)
        self.x += x.sum(axis=0, dtype=np.float64)
        self.xx += x.T @ x
        for number, answer in enumerate(answers):
            if answer.ndim == 1:
                self._add_classes(number, x, answer)
            else:
                self.y[number] += answer.sum(axis=0)
                self.yy[number] += np.square(answer).sum(axis=0)
                self.xy[number] += answer.T.astype(np.float32) @ x

    def _take(self, near: Moments, by: np.ndarray) -> None:
        """Count the rows of other sums with `by` (d,) added to each."""
        shift = np.outer(near.x, by)
        self.n += near.n
        self.x += near.x + near.n * by
        self.xx += near.xx + shift + shift.T + near.n * np.outer(by, by)
        self.y += near.y
        self.yy += near.yy
        self.xy += near.xy + near.y[..., None] * by

    def _add_classes(self, number: int, x: np.ndarray, answer: np.ndarray) -> None:
        """Of classes: y is 1 for a token's own class, 0 for the others."""
        order = np.argsort(answer, kind="stable")
        kept, first, count = np.unique(answer[order], return_index=True, return_counts=True)
        self.y[number, kept] += count
        self.yy[number, kept] += count
        self.xy[number, kept] += np.add.reduceat(x[order], first, axis=0)


@dataclass(frozen=True)
class Scale:
    """What a layer's states are centred by and divided by before they are summed, (d,) float32."""

    centre: np.ndarray
    spread: np.ndarray


def scales(data: Examples) -> list[Scale]:
    """Mean and standard deviation of each layer over the whole dataset, as it stores them; 1 for a dimension that never changes."""
    statistics = data.read.ds.statistics
    spreads = (np.sqrt(statistics[site]["variance"]).astype(np.float32) for site in data.read.sites)
    return [
        Scale(centre, np.where(spread > 0, spread, np.float32(1)))
        for centre, spread in zip(centres(data.read), spreads, strict=True)
    ]


def moments(data: Examples, part: np.ndarray, outputs: int) -> Iterator[tuple[int, list[Moments]]]:
    """Each layer's number, and the sums of its tokens of part 0, 1, …; `part` is (token,), `outputs` the classes or numbers a token.

    A site is read once. Layers whose sums are more than 4 GiB together are read in turns.
    """
    read, spread = data.read, [scale.spread for scale in scales(data)]
    parts, d, answers = int(part.max()) + 1, read.width, len(data.answers)
    at_once = max(1, MOST_BYTES // (8 * parts * d * (d + answers * outputs)))
    for low in range(0, read.n_layers, at_once):
        sites = read.sites[low : low + at_once]
        found = [[Moments.empty(d, answers, outputs) for _ in range(parts)] for _ in sites]

        def count(layer: int, x: np.ndarray, piece: Piece, low: int = low, found: list[list[Moments]] = found) -> None:
            scaled = x / spread[low + layer]
            mine, chosen = part[piece.low : piece.high], [answer[piece.low : piece.high] for answer in data.answers]
            for number in np.unique(mine):
                rows = slice(None) if parts == 1 else mine == number
                found[layer][number].add(scaled[rows], [answer[rows] for answer in chosen])

        one_pass(read, count, sites)
        yield from ((low + layer, own) for layer, own in enumerate(found))
