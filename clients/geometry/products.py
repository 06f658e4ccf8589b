"""Sums of products of every pair of layers, and what each document adds to what is made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from threadpoolctl import threadpool_limits

from actcache.cache.threads import spread
from actcache.clients.bootstrap import Groups
from actcache.clients.covariance import Products, centres, far_off
from actcache.clients.geometry.documents import Between, Runs
from actcache.clients.geometry.reading import by_group, only_sites
from actcache.clients.states import States

Pair = tuple[int, int]


@dataclass
class PairSums(Products):
    """Sums over tokens of a pair of layers, x (n, d) and y (n, k), both less a fixed vector.

    Attributes:
        x_square, y_square: Σ ‖x‖², Σ ‖y‖².
        both: Σ ‖x‖² ‖y‖².
        x_by_y: Σ x ‖y‖², (d,) float64.
        y_by_x: Σ y ‖x‖², (k,) float64.
        between: what documents share.
    """

    x_square: float = 0.0
    y_square: float = 0.0
    both: float = 0.0
    x_by_y: np.ndarray = field(default_factory=lambda: np.zeros(1))
    y_by_x: np.ndarray = field(default_factory=lambda: np.zeros(1))
    between: Between = field(default_factory=lambda: Between(np.zeros((1, 1))))

    @classmethod
    def empty(cls, d: int, k: int) -> PairSums:
        """Of no token."""
        return cls(0.0, np.zeros(d), np.zeros(k), np.zeros((d, k)), between=Between(np.zeros((d, k))))

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Count rows x (n, d) and y (n, k), float32."""
        super().add(x, y)
        of_x = np.einsum("ij,ij->i", x, x).astype(np.float64)
        of_y = of_x if x is y else np.einsum("ij,ij->i", y, y).astype(np.float64)
        self.x_square += float(of_x.sum())
        self.y_square += float(of_y.sum())
        self.both += float(of_x @ of_y)
        self.x_by_y = self.x_by_y + (of_y.astype(np.float32) @ x)
        self.y_by_x = self.y_by_x + (of_x.astype(np.float32) @ y)

    @property
    def centred(self) -> np.ndarray:
        """Σ (x − x̄)(y − ȳ)ᵀ, (d, k)."""
        return self.xy - np.outer(self.x, self.y) / self.n

    @property
    def shuffled_in_documents(self) -> float:
        """The mean of ‖Σ (x − x̄)(y − ȳ)ᵀ‖² over all ways to pair the x of each document with its y: exact."""
        kept = self.between.xy - np.outer(self.x, self.y) / self.n
        return float(np.square(kept).sum()) + self.between.chance

    @property
    def hsic(self) -> float:
        """The unbiased estimate of HSIC for linear kernels (Song et al. 2012, JMLR 13:1393), from sums.

        With K = XXᵀ and L = YYᵀ less their diagonals it is (tr KL + (1ᵀK1)(1ᵀL1) / ((n−1)(n−2)) − 2 · 1ᵀKL1 / (n−2)) / (n(n−3)).
        Each of the three terms is made of the sums that are kept here. Subtracting a fixed vector from all x changes nothing.
        """
        n = self.n
        trace = float(np.square(self.xy).sum()) - self.both
        totals = (float(self.x @ self.x) - self.x_square) * (float(self.y @ self.y) - self.y_square)
        cross = float(self.x @ self.xy @ self.y - self.x @ self.x_by_y - self.y @ self.y_by_x) + self.both
        return (trace + totals / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)) / (n * (n - 3))


def tiles(read: States, kept: Sequence[np.ndarray], memory: int) -> Iterator[list[Pair]]:
    """Pairs of layers, the upper half, in as few passes as hold at most `memory` bytes of products, or three matrices.

    Each pass has the pairs of two runs of layers, and each of these layers with itself.
    """
    count = read.n_layers
    most = max(3, memory // (2 * 8 * max(map(len, kept)) ** 2))
    if count * (count + 1) // 2 <= most:
        yield [(i, j) for i in range(count) for j in range(i, count)]
        return
    side = max(1, int(np.sqrt(most + 1)) - 1)
    runs = [range(low, min(low + side, count)) for low in range(0, count, side)]
    for place, down in enumerate(runs):
        for across in runs[place:] if side > 1 or count == 1 else runs[place + 1 :]:
            own = [(i, i) for i in sorted({*down, *across})]
            yield own + [(i, j) for i in down for j in across if i < j]


def pair_sums(read: States, kept: Sequence[np.ndarray], pairs: Sequence[Pair]) -> dict[Pair, PairSums]:
    """One pass over the data: the sums of some pairs of layers, of the `kept` dimensions of each."""
    sums = {(i, j): PairSums.empty(len(kept[i]), len(kept[j])) for i, j in pairs}
    going_on: dict[int, Runs | None] = dict.fromkeys(number for pair in pairs for number in pair)
    for low, x in _centred(read, kept, pairs):
        owner = read.groups.of[low : low + len(next(iter(x.values())))]
        runs: dict[int, Runs] = {}
        last = low + len(owner) == len(read)

        def cut(
            number: int,
            x: dict[int, np.ndarray] = x,
            owner: np.ndarray = owner,
            runs: dict[int, Runs] = runs,
            last: bool = last,
        ) -> None:
            runs[number], going_on[number] = Runs.of(owner, x[number]).cut(going_on[number], last)

        def add(pair: Pair, x: dict[int, np.ndarray] = x, runs: dict[int, Runs] = runs) -> None:
            sums[pair].add(x[pair[0]], x[pair[1]])
            sums[pair].between.add(runs[pair[0]], runs[pair[1]])

        with threadpool_limits(1, user_api="blas"):
            spread(cut, list(x))
            spread(add, list(sums))
    return sums


def group_products(
    read: States, kept: Sequence[np.ndarray], sums: dict[Pair, PairSums], groups: Groups
) -> tuple[dict[Pair, np.ndarray], dict[Pair, np.ndarray]]:
    """Another pass: how what each group of documents adds to the sums lies along the sums of all.

    With Sᵢⱼ the centred sum of products of a pair, and Sᵢⱼ(g) what a group adds to it: ⟨Sᵢⱼ, Sᵢⱼ(g)⟩ of every pair, and ⟨Sⱼⱼ, Sᵢᵢ(g)⟩
    of every two layers of one width, (group,) float64.
    """
    centred = {pair: each.centred for pair, each in sums.items()}
    mean = {i: (each.x / each.n).astype(np.float32) for (i, j), each in sums.items() if i == j}
    cross = {pair: np.zeros(groups.count) for pair in sums}
    own = {(i, j): np.zeros(groups.count) for i in mean for j in mean if len(kept[i]) == len(kept[j])}
    for low, x in _centred(read, kept, list(sums)):
        exact = {i: x[i] - mean[i] for i in x}
        segments = list(by_group(groups.of[low : low + len(next(iter(x.values())))]))

        def add(
            pair: Pair,
            exact: dict[int, np.ndarray] = exact,
            segments: list[tuple[int, np.ndarray]] = segments,
        ) -> None:
            i, j = pair
            for group, places in segments:
                part = (exact[i][places].T @ exact[j][places]).astype(np.float64)
                cross[pair][group] += np.vdot(centred[pair], part)
                if i == j:
                    for other in (o for o in mean if (i, o) in own):
                        own[i, other][group] += np.vdot(centred[other, other], part)

        with threadpool_limits(1, user_api="blas"):
            spread(add, list(sums))
    return cross, own


def _centred(
    read: States, kept: Sequence[np.ndarray], pairs: Sequence[Pair]
) -> Iterator[tuple[int, dict[int, np.ndarray]]]:
    """The first token of each piece, and by layer its states less a vector, (n, kept) float32.

    It is the stored mean, or where the first piece lies far from that, the mean of this piece.
    """
    numbers = sorted({number for pair in pairs for number in pair})
    some = only_sites(read, numbers)
    shift = centres(some)
    for piece in some.pieces():
        if not piece.low:
            far = [far_off(state - mean) for state, mean in zip(piece.states, shift, strict=True)]
            shift = [
                mean if off is None else mean + off.astype(np.float32) for mean, off in zip(shift, far, strict=True)
            ]
        x = {}
        for number, state, mean in zip(numbers, piece.states, shift, strict=True):
            x[number] = (state - mean) if len(kept[number]) == state.shape[1] else (state - mean)[:, kept[number]]
        yield piece.low, x
