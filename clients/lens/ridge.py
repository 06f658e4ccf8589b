"""The lens in closed form: least squares from each state to the last one, from one pass of Gram matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actcache.clients.covariance import Products, Rows, centres, one_pass
from actcache.clients.lens.translators import Lens, identity
from actcache.clients.states import Piece, States

PENALTIES = 10.0 ** np.arange(-8, 2)
"""Ridge penalties that are tried, as parts of the mean eigenvalue of the covariance."""


@dataclass(frozen=True)
class Gram:
    """What a translator is fitted from.

    Attributes:
        mean: of the states that it reads, (d,) float64.
        final: mean of the final states that they belong to, (d,) float64.
        covariance: of the states, (d, d) float64.
        cross: covariance of the states (rows) and of what is to be added to them (columns), final − state, (d, d) float64.
        penalty: the ridge penalty that predicts other documents best, as a part of the mean eigenvalue.
    """

    mean: np.ndarray
    final: np.ndarray
    covariance: np.ndarray
    cross: np.ndarray
    penalty: float

    def translator(self) -> tuple[np.ndarray, np.ndarray]:
        """W (d, d) and b (d,), float64: argmin E|h + W h + b − final|² + λ|W|², with λ = penalty · tr(covariance) / d."""
        weight = _solve(self.covariance, self.cross, np.array([self.penalty]))[0]
        return weight, self.final - self.mean - weight @ self.mean


def grams(read: States, shared: bool = False) -> list[Gram]:
    """The Gram matrices of every translator, in one pass; each penalty is chosen on a tenth of the documents."""
    layers = identity(read).sites[: None if read.offset else -1]
    final = centres(read, read.sites[-1:])[0].astype(np.float64)
    shift = [each.astype(np.float64) for each in centres(read, layers)]
    validated = _validation(read)
    width = read.width
    inside = [_Sums.empty(width) for _ in layers]
    outside = [_Sums.empty(width) for _ in layers]

    def add(layer: int, x: np.ndarray, piece: Piece) -> None:
        y = piece.final - final.astype(np.float32)
        held = validated[piece.low : piece.high]
        for sums, rows in ((inside[layer], ~held), (outside[layer], held)):
            if rows.all():
                sums.add(x, y)
            elif rows.any():
                sums.add(x[rows], y[rows])

    one_pass(read, add, layers)
    if shared:  # the states of all layers as one, about one mean
        middle = np.mean(shift, axis=0)
        inside, outside = (
            [_Sums.total([own.moved(at - middle) for own, at in zip(sums, shift, strict=True)])]
            for sums in (inside, outside)
        )
        shift = [middle]
    return [_gram(*each, final) for each in zip(inside, outside, shift, strict=True)]


def ridge(read: States, shared: bool = False, found: Sequence[Gram] | None = None) -> Lens:
    """A lens whose translators are ridge regressions from each state to the final one: see `Gram.translator`.

    `found` are the Gram matrices, if they are there already.

    Raises: as reading rows.
    """
    pairs = [each.translator() for each in (found or grams(read, shared))]
    weight, bias = (np.stack(each).astype(np.float32) for each in zip(*pairs, strict=True))
    return Lens("ridge", read.sites, weight, bias, shared, read.offset, read.ds.model_key)


@dataclass
class _Sums:
    """Sums over tokens of x xᵀ and x yᵀ, with those of x and y."""

    xx: Products
    xy: Products

    @classmethod
    def empty(cls, width: int) -> _Sums:
        return cls(Products.empty(width, width), Products.empty(width, width))

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        rows = Rows.of(x)
        self.xx.count(rows, rows)
        self.xy.count(rows, Rows.of(y))

    def moved(self, by: np.ndarray) -> _Sums:
        """The sums of x + by instead of x."""
        none = np.zeros_like(by)
        return _Sums(self.xx.moved(by, by), self.xy.moved(by, none))

    @classmethod
    def total(cls, parts: Sequence[_Sums]) -> _Sums:
        found = cls.empty(len(parts[0].xx.x))
        for part in parts:
            found = cls(found.xx + part.xx, found.xy + part.xy)
        return found


def _validation(read: States) -> np.ndarray:
    """Which tokens the penalty is chosen on: those of every tenth document, at least of one where there are two."""
    groups = read.groups
    if groups.count < 2:
        return np.zeros(len(read), bool)
    return np.asarray(groups.of % min(10, groups.count) == 1)


def _gram(inside: _Sums, outside: _Sums, shift: np.ndarray, final: np.ndarray) -> Gram:
    """A Gram of all tokens, with the penalty that predicts those outside best from those inside."""
    penalty = PENALTIES[0]
    if outside.xx.n and inside.xx.n:
        covariance, cross = inside.xx.covariance, inside.xy.covariance - inside.xx.covariance
        weights = _solve(covariance, cross, PENALTIES)
        x, y = inside.xx.x / inside.xx.n, inside.xy.y / inside.xx.n
        second, between = outside.xx.moved(-x, -x).xy, outside.xy.moved(-x, -y).xy
        error = [np.sum((w @ second) * w) - 2 * np.sum(w * (between - second).T) for w in weights]
        penalty = PENALTIES[int(np.argmin(error))]
    every = _Sums.total([inside, outside])
    n = every.xx.n
    covariance = every.xx.covariance
    return Gram(every.xx.x / n + shift, every.xy.y / n + final, covariance, every.xy.covariance - covariance, penalty)


def _solve(covariance: np.ndarray, cross: np.ndarray, penalties: np.ndarray) -> np.ndarray:
    """The ridge solution W for each penalty, (penalty, d, d), by one eigendecomposition."""
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values, 0)
    scale = values.mean() or 1.0
    turned = vectors.T @ cross
    return np.stack([((vectors / (values + penalty * scale)) @ turned).T for penalty in penalties])
