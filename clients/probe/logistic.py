"""Logistic regression of all layers at once, a pass over the data for each step of their searches.

It minimises Σ ℓ + α/2 ‖W‖², ℓ the cross-entropy of softmax(W x + b), with each dimension of x divided by its standard deviation over
the tokens that are fitted: scikit-learn's `make_pipeline(StandardScaler(), LogisticRegression(C=1/alpha))`. Two classes are one
output. The searches go in coordinates in which the curvature at W = 0 is 1 everywhere, so that the first step is about
the least-squares solution.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from actcache.clients.covariance import one_pass
from actcache.clients.probe.descent import MEMORY, Search, descent
from actcache.clients.probe.examples import Examples
from actcache.clients.probe.moments import scales
from actcache.clients.probe.ridge import Normal
from actcache.clients.states import Piece
from actcache.schemas.errors import InvalidInput

MOST_BYTES = 8 << 30
"""What the searches remember, all together."""
MOST_PASSES = 500


@dataclass(eq=False)
class Problem:
    """One probe to find.

    Attributes:
        layer, answer: of which layer's states, and of which answers.
        alpha: the penalty.
        normal: what the layer's states are standardised by.
        basis: eigenvectors and eigenvalues of the standardised states' covariance.
        weight, bias: W (outputs, d) and b (outputs,) so far, of standardised dimensions.
        largest: the largest component of the gradient there.
    """

    layer: int
    answer: int
    alpha: float
    normal: Normal
    basis: tuple[np.ndarray, np.ndarray]
    weight: np.ndarray
    bias: np.ndarray
    largest: float = np.inf
    value: float = field(default=0.0)
    gradient: np.ndarray | None = None
    """Sums over tokens so far of the gradient with respect to (W, b), (outputs, d + 1)."""

    def __post_init__(self) -> None:
        vectors, values = self.basis
        share = np.clip(self.normal.y[self.answer], 1 / self.normal.n, None)[-len(self.bias) :]
        fisher = np.maximum(share * (1 - share), 1 / self.normal.n)[:, None]
        values = np.append(np.maximum(values, 0), 1)  # the intercept's is 1, and is not penalised
        penalty = np.append(np.full(len(vectors), self.alpha / self.normal.n), 0)
        self._curvature = np.sqrt(fisher * values + penalty)

    def start(self) -> Search:
        """The search, from where the probe is."""
        vectors, _ = self.basis
        return descent((np.column_stack([self.weight @ vectors, self.bias]) * self._curvature).ravel())

    def go(self, point: np.ndarray) -> None:
        """Take a point of the search."""
        vectors, _ = self.basis
        found = point.reshape(self._curvature.shape) / self._curvature
        self.weight, self.bias = found[:, :-1] @ vectors.T, found[:, -1]
        self.value, self.gradient = 0.0, np.zeros(found.shape)

    def count(self, x: np.ndarray, answer: np.ndarray) -> None:
        """Add up loss and gradient over standardised rows (n, d), float32, of classes (n,)."""
        loss, residual = cross_entropy(x @ self.weight.T.astype(np.float32) + self.bias.astype(np.float32), answer)
        assert self.gradient is not None
        self.value += float(loss.sum(dtype=np.float64))
        self.gradient[:, :-1] += residual.T @ x
        self.gradient[:, -1] += residual.sum(axis=0, dtype=np.float64)

    def centre(self) -> None:
        """Take from several outputs what they have in common, which no probability depends on: the penalty is least without it."""
        if len(self.bias) > 1:
            self.weight = self.weight - self.weight.mean(axis=0)
            self.bias = self.bias - self.bias.mean()

    def told(self) -> tuple[float, np.ndarray]:
        """Value and gradient of the mean loss in the coordinates of the search."""
        assert self.gradient is not None
        n, (vectors, _) = self.normal.n, self.basis
        value = (self.value + self.alpha / 2 * np.square(self.weight).sum()) / n
        gradient = self.gradient / n
        gradient[:, :-1] += self.alpha / n * self.weight
        self.largest = float(np.abs(gradient).max())
        turned = np.column_stack([gradient[:, :-1] @ vectors, gradient[:, -1]])
        return value, (turned / self._curvature).ravel()


def cross_entropy(logits: np.ndarray, answer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Loss of classes (n,) in nats, (n,), and its gradient with respect to logits (n, outputs); one output is that of class 1."""
    if logits.shape[1] == 1:
        z = logits[:, 0]
        is_one = answer == 1
        loss = np.logaddexp(0, np.where(is_one, -z, z))
        return loss, (np.exp(-np.logaddexp(0, -z)) - is_one).astype(np.float32)[:, None]
    logits = logits - logits.max(axis=1, keepdims=True)
    residual = np.exp(logits)
    total = residual.sum(axis=1, keepdims=True)
    rows = np.arange(len(answer))
    loss = np.log(total[:, 0]) - logits[rows, answer]
    residual /= total
    residual[rows, answer] -= 1
    return loss, residual


def remembered(layers: int, problems: int, d: int, outputs: int) -> None:
    """Refuse more problems than there is memory for.

    Raises:
        InvalidInput: there are too many.
    """
    needed = 8 * (problems * (2 * MEMORY + 6) * outputs * (d + 1) + layers * 2 * d * d)
    if needed > MOST_BYTES:
        raise InvalidInput(
            f"{problems:,} logistic probes of {outputs:,} classes × {d:,} dimensions at once take {needed / 2**30:.0f} GiB; "
            "give fewer sites=, one of alphas=, control=False, or method='ridge'"
        )


def solve(data: Examples, problems: Sequence[Problem], tolerance: float) -> int:
    """Find all of them, reading only the layers that are still searched. Returns how many passes over the data that took.

    A warning names the layers that did not converge to a gradient below `tolerance`, its largest component.
    """
    searches: dict[Problem, Search] = {}
    for problem in problems:
        searches[problem] = problem.start()
        problem.go(next(searches[problem]))
    passes = 0
    while searches and passes < MOST_PASSES:
        _one_pass(data, list(searches))
        passes += 1
        for problem, search in list(searches.items()):
            told = problem.told()
            if problem.largest <= tolerance:
                del searches[problem]
                continue
            try:
                problem.go(search.send(told))
            except StopIteration:
                del searches[problem]
    for problem in problems:
        problem.centre()
    failed = sorted({problem.layer for problem in problems if problem.largest > tolerance})
    if failed:
        worst = max(problem.largest for problem in problems)
        names = ", ".join(data.read.labels[layer] for layer in failed)
        warnings.warn(
            f"logistic probes of {names} did not converge: a gradient of {worst:.1e} is left after {passes} passes, and {tolerance:.0e} "
            "is asked for; a larger alpha is easier",
            stacklevel=2,
        )
    return passes


def losses(data: Examples, problems: Sequence[Problem]) -> list[float]:
    """The mean loss of each on other tokens, in nats."""
    for problem in problems:
        problem.value, problem.gradient = 0.0, np.zeros((len(problem.bias), problem.weight.shape[1] + 1))
    _one_pass(data, problems)
    return [problem.value / len(data.read) for problem in problems]


def _one_pass(data: Examples, problems: Sequence[Problem]) -> None:
    layers = sorted({problem.layer for problem in problems})
    spread = [scale.spread for scale in scales(data)]

    def count(number: int, x: np.ndarray, piece: Piece) -> None:
        layer = layers[number]
        own = [problem for problem in problems if problem.layer == layer]
        normal = own[0].normal
        rows = (x / spread[layer] - normal.mean.astype(np.float32)) / normal.spread.astype(np.float32)
        for problem in own:
            problem.count(rows, data.answers[problem.answer][piece.low : piece.high])

    one_pass(data.read, count, [data.read.sites[layer] for layer in layers])
